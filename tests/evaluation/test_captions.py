"""The captioning evaluation with a captioner whose captions are known, on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

from imglish.data.images import ImageError
from imglish.data.records import Record
from imglish.evaluation.captions import CaptioningConfig, CaptioningResult, evaluate_captioning
from imglish.evaluation.encoding import Machine
from imglish.generation.config import GenerationConfig
from tests.generation.toy import ToyCaptioner, pictures
from tests.ranks import run_ranks

NAMES = ["alpha", "beta", "end", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


class Words:
    bos_id, eos_id = 1, 2

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[1, *(NAMES.index(word) for word in text.split()), 2] for text in texts]

    def decode(self, ids: tuple[int, ...]) -> str:
        return " ".join(NAMES[i] for i in ids)


def records(count: int) -> list[Record]:
    return [Record(f"p{i}", None, ("alpha beta", "gamma delta zeta"), image_id=i) for i in range(count)]


def load(record: Record) -> Tensor:
    return pictures(8)[int(record.key[1:])]


def measure(block: int = 3, predictions: Path | None = None) -> CaptioningResult:
    config = CaptioningConfig(GenerationConfig(beams=2, max_length=8), machine=Machine(block, progress=False))
    model = ToyCaptioner(seed=3)
    return evaluate_captioning(model, Words(), records(8), config, load=load, predictions=predictions)


def test_a_perfect_captioner(tmp_path: Path) -> None:
    first = measure(predictions=tmp_path / "p.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["captions"] for line in lines] == [[one.caption] for one in first.predictions]
    own = [Record(one.key, None, (one.caption,), image_id=i) for i, one in enumerate(first.predictions)]
    config = CaptioningConfig(GenerationConfig(beams=2, max_length=8), machine=Machine(3, progress=False))
    perfect = evaluate_captioning(ToyCaptioner(seed=3), Words(), own, config, load=load)
    assert perfect.metrics["bleu1"] == pytest.approx(100, abs=1e-4)
    assert perfect.metrics["rouge_l"] == pytest.approx(100)
    assert perfect.metrics["cider"] > first.metrics["cider"]
    assert "CIDEr-D" in perfect.text()
    assert perfect.to_dict()["generation"]["beams"] == 2


def test_block_size_does_not_matter() -> None:
    assert [p.caption for p in measure(1).predictions] == [p.caption for p in measure(8).predictions]


def test_several_records_of_a_picture_are_one() -> None:
    same = [Record("p0", None, ("alpha",), image_id=0), Record("p0", None, ("beta",), image_id=0)]
    config = CaptioningConfig(GenerationConfig(max_length=6), machine=Machine(progress=False))
    found = evaluate_captioning(ToyCaptioner(), Words(), same, config, load=load)
    assert (found.images, found.references) == (1, 2)
    assert found.predictions[0].references == ("alpha", "beta")
    assert found.metrics["cider"] == 0  # one picture has no word weights


def test_the_model_is_put_back_and_errors_come_through() -> None:
    model = ToyCaptioner().train()

    def broken(record: Record) -> Tensor:
        raise ImageError("p0: nothing")

    with pytest.raises(ImageError, match="nothing"):
        evaluate_captioning(model, Words(), records(1), load=broken)
    assert model.training
    with pytest.raises(ValueError, match="no records"):
        evaluate_captioning(model, Words(), [])


def work(rank: int) -> tuple[dict[str, float], list[str]]:
    found = measure(block=2)
    return found.metrics, [one.caption for one in found.predictions]


def test_two_ranks_share_the_pictures() -> None:
    assert run_ranks(2, work) == [work(0)] * 2
