"""A whole run: it learns, and leaves log, report, checkpoints and an exported model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from imglish import atomic
from imglish.checkpoints.native import load
from imglish.training.journal import Journal, read_events
from imglish.training.settings import SettingsError
from imglish.training.trainer import train
from tests.training.support import recipe, records


@pytest.mark.parametrize("family", ["albef", "clip"])
def test_a_run_learns_and_tells(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = recipe(
        tmp_path,
        family,
        schedule={"steps": 60, "warmup_steps": 5},
        batch={"size": 16, "accumulate": 2},
        compute={"precision": "bf16"},
        validation={"every": 10.0, "rerank": 4},
        average=0.9,
        log={"every": 10},
    )
    result = train(settings, records(), records(16))
    steps = [event for event in result.events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [10, 20, 30, 40, 50, 60]
    first, last = steps[0]["losses"], steps[-1]["losses"]
    assert last.keys() == ({"itc", "itm", "mlm"} if family == "albef" else {"itc"})
    falls = "mlm" if family == "albef" else "itc"  # ITC against a filling queue grows at first
    assert last[falls] < 0.9 * first[falls]
    for event in steps:
        assert event["pairs_per_second"] > 0
        assert event["memory_gib"] > 0.1
        assert 0 <= event["waiting_for_data"] < 1
        assert event["gradient_norm"] > 0
    assert steps[-1]["epoch"] == 20.0
    [work] = [event for event in result.events if event["event"] == "work"]
    parameters = result.events[0]["parameters"]
    assert work["step"] == 1
    assert 6 * parameters < work["flops_per_pair"] < 600 * parameters  # forward, backward, a handful of rows a pair
    validations = [event for event in result.events if event["event"] == "validation"]
    assert [event["step"] for event in validations] == [30, 60]
    assert (validations[0]["reranked"] is not None) == (family == "albef")
    assert result.best["r_mean"] == max((e["reranked"] or e["towers"])["r_mean"] for e in validations)
    assert load(tmp_path / "best").meta["step"] == result.best["step"]
    assert result.model is not None
    assert load(result.model).meta["step"] == 60
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    for part in (
        "GFLOP a pair",
        "GiB",
        "Losses",
        "Retrieval on the validation pairs",
        "gradient norm",
        "optimiser.lr",
        "mean recall",
    ):
        assert part in report
    assert "the best so far" in capsys.readouterr().err
    assert read_events(tmp_path / "log.jsonl") == json.loads(json.dumps(result.events))
    again = train(settings, records(), records(16))  # finished already: nothing is trained or logged twice
    assert again.events == read_events(tmp_path / "log.jsonl")
    assert len(again.events) == len(result.events)


def test_the_journal_forgets_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, active=True)
    for step in (1, 2, 3):
        journal.write("step", step, losses={"itc": float("nan") if step == 1 else 1.0})
    with journal.path.open("a") as file:
        file.write('{"event": "st')  # cut off by a kill
    again = Journal(tmp_path, active=True)
    again.rewind(2)
    assert [event["step"] for event in again.events] == [1, 2]
    assert again.events[0]["losses"]["itc"] == "nan"
    assert len(journal.path.read_text().splitlines()) == 2
    silent = Journal(tmp_path / "other", active=False)
    silent.write("step", 1)
    silent.rewind(0)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_compiled_run_equals_a_plain_one(tmp_path: Path) -> None:
    results = [
        train(recipe(tmp_path / str(flag), "albef", compute={"compile": flag}, average=0.9), records())
        for flag in (False, True)
    ]
    plain, compiled = ([e["losses"] for e in r.events if e["event"] == "step"] for r in results)
    assert len(plain) == 3
    for one, other in zip(plain, compiled, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_what_cannot_be_compiled_is_said(tmp_path: Path) -> None:
    model = {"name": "clip-rn50", "vision": {"width": 8, "layers": [1, 1, 1, 1], "heads": 4, "image": {"size": 64}}}
    settings = recipe(tmp_path, "clip", compute={"compile": True})
    settings.model.clear()
    settings.model.update(model)
    with pytest.raises(SettingsError, match=r"compute\.compile: this model has no vision Transformer"):
        train(settings, records())


def test_tensorboard_gets_the_numbers_or_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SettingsError, match=r"log\.tensorboard: TensorBoard is not installed: pip install"):
        train(recipe(tmp_path, "clip", log={"tensorboard": True}), records())
    written: dict[tuple[str, int], float] = {}

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written[name, step] = value

        def close(self) -> None:
            written["closed", 0] = 1.0

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    result = train(recipe(tmp_path, "clip", log={"tensorboard": True}), records())
    steps = [event for event in result.events if event["event"] == "step"]
    assert all(written["step/losses/itc", event["step"]] == event["losses"]["itc"] for event in steps)
    assert ("closed", 0) in written


def test_the_score_rule_is_a_setting_that_stays_with_the_model(tmp_path: Path) -> None:
    held = records(8)
    rules = {"validation": {"rerank": 2, "score_rule": "itm+itc"}}
    first = train(recipe(tmp_path / "a", "albef", schedule={"steps": 2, "warmup_steps": 0}, **rules), records(), held)
    assert load(first.model).score_rule == "itm+itc"
    model = {"init": str(first.model), "mlm": False}
    again = recipe(tmp_path / "b", "albef", schedule={"steps": 1, "warmup_steps": 0})
    again = replace(again, model=model)
    second = train(again, records(), held)
    assert load(second.model).score_rule == "itm+itc"  # retrieval fine-tuning goes on with the rule of its start
    assert not any(name.startswith("mlm") for event in second.events for name in event.get("losses", {}))
    with pytest.raises(SettingsError, match=r"validation\.score_rule: Clip matches no pairs"):
        train(recipe(tmp_path / "c", "clip", **rules), records(), held)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    """The lock ends with the process that holds it, however that ends."""
    program = "import sys, time; from pathlib import Path; from imglish import atomic\n"
    program += "with atomic.alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SettingsError, match="output: another run works in"):
            train(recipe(tmp_path, schedule={"steps": 2, "warmup_steps": 0}), records())
    finally:
        other.kill()
        other.wait()
    assert train(recipe(tmp_path, schedule={"steps": 2, "warmup_steps": 0}), records()).model is not None
    with atomic.alone(tmp_path):  # a run that ended holds nothing
        pass
