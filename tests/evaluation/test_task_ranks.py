"""Tasks measured by two processes, and in blocks of other sizes, give what one process gives."""

from __future__ import annotations

from typing import Any

import pytest

from imglish.evaluation.classify import ZeroShotConfig, evaluate_zeroshot
from imglish.evaluation.compositional import evaluate_compositional
from imglish.evaluation.encoding import Machine
from imglish.evaluation.probe import evaluate_probe
from imglish.evaluation.sharing import on_first
from tests.evaluation.fakes import Fusion, Words
from tests.evaluation.test_compositional import _classes, _items
from tests.evaluation.test_probe import _load, _records
from tests.ranks import run_ranks


def work(rank: int, block: int = 2) -> dict[str, Any]:
    machine = Machine(image_block=block, text_block=block, pair_block=2 * block, progress=False)
    items, pictures, model = _items()
    suites = evaluate_compositional(model, Words(), items, lambda r: pictures[r.key[-1]], machine)
    records, shown = _classes(Fusion())
    config = ZeroShotConfig(("{}", "{} w20"), rerank=8, machine=machine)
    classes = evaluate_zeroshot(Fusion(), Words(), records, lambda r: shown[r.image_id], config)
    probe = evaluate_probe(Fusion(), _records(30, 0), _records(9, 100), _load, machine)
    return {
        "margins": suites.margin,
        "fusion": classes.fusion,
        "notes": classes.notes,
        "scores": classes.scores.tolist(),
        "probe": (probe.found, probe.strength, probe.scores.tolist()),
        "first": on_first(lambda: rank + 7),
    }


def test_two_processes_give_what_one_gives() -> None:
    alone = work(0)
    assert "rerank 8 clamped to the 3 classes" in alone["notes"]
    assert run_ranks(2, work) == [alone] * 2  # to the bit; ``on_first`` gives both what the first has made


def test_blocks_do_not_matter() -> None:
    small, large = work(0, 1), work(0, 40)
    assert small["margins"] == pytest.approx(large["margins"])
    assert (small["fusion"], small["probe"][:2]) == (large["fusion"], large["probe"][:2])


def _refuses(rank: int) -> str:
    def fail() -> None:
        raise ValueError("only the first can know")

    try:
        on_first(fail)
    except ValueError as error:
        return str(error)
    return ""


def test_what_goes_wrong_on_the_first_is_raised_on_all() -> None:
    assert run_ranks(2, _refuses) == ["only the first can know"] * 2
