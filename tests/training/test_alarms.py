"""What is said when training cannot work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from imglish.data.batch import Batch
from imglish.objectives.itm import itm_prior_entropy
from imglish.training.alarms import Chance, FiniteWatch, LearningWatch, LossNotFinite, itc_chance
from imglish.training.interval import Interval
from imglish.training.journal import read_events
from imglish.training.step import Stepper
from imglish.training.trainer import train
from tests.training.support import recipe, records

CHANCE = Chance(itc=itc_chance(64), itm=itm_prior_entropy(2))


def kinds(watch: LearningWatch, step: int, **losses: float) -> list[str]:
    return [alarm.kind for alarm in watch.look(step, losses, CHANCE)]


def test_itm_at_its_prior_raises_an_alarm_once() -> None:
    watch = LearningWatch(warmup_steps=100, patience=200)
    assert kinds(watch, 250, itm=0.6365) == []
    assert kinds(watch, 300, itm=0.6365) == ["itm-at-prior"]
    assert kinds(watch, 400, itm=0.6365) == []
    assert kinds(LearningWatch(100, 200, raised=["itm-at-prior"]), 400, itm=0.6365) == []
    assert kinds(LearningWatch(100, 200), 400, itm=0.61) == []
    swapped = Chance(itm=itm_prior_entropy(3))
    alarms = LearningWatch(0, 0).look(10, {"itm": 0.5623}, swapped)
    assert "0.5623" in alarms[0].text


def test_itc_at_chance_and_rising_losses_raise_alarms() -> None:
    assert kinds(LearningWatch(0, 100), 150, itc=4.158) == ["itc-at-chance"]
    assert kinds(LearningWatch(0, 100), 150, itc=3.9) == []
    watch = LearningWatch(0, 1000)
    raised = [kind for step in range(10) for kind in kinds(watch, step, itc=3.0 + 0.3 * step)]
    assert raised == ["diverging"]


def test_a_filling_queue_is_no_divergence() -> None:
    watch = LearningWatch(0, 1000)
    for step in range(10):
        chance = Chance(itc=itc_chance(8 + 500 * step))
        assert watch.look(step, {"itc": 0.8 * chance.itc}, chance) == []  # type: ignore[operator]


def test_the_chance_follows_batch_queue_and_wrong_captions() -> None:
    class Queue:
        filled = 100

    class Teacher:
        queue = Queue()

    interval = Interval()
    assert interval.chance(28, None) == Chance(itc_chance(28), itm_prior_entropy(2))
    interval.swapped = True
    assert interval.chance(28, Teacher()) == Chance(itc_chance(128), itm_prior_entropy(3))
    assert itm_prior_entropy(2) == pytest.approx(0.6365, abs=1e-4)


def test_the_finite_watch_names_what_where_and_which() -> None:
    watch = FiniteWatch()
    watch.push(("itc", "itm"), torch.tensor([1.0, 2.0]), 1, 0.1, ("a", "b"))
    watch.push(("itc", "itm"), torch.tensor([1.0, float("nan")]), 2, 0.2, ("c", "d"))
    with pytest.raises(LossNotFinite, match=r"itm became .* step 2 \(epoch 0\.20\).*c, d") as caught:
        watch.push(("itc", "itm"), torch.tensor([1.0, 1.0]), 3, 0.3, ("e", "f"))
    assert (caught.value.names, caught.value.step, caught.value.keys) == (("itm",), 2, ("c", "d"))
    watch.push(("itc",), torch.tensor([float("inf")]), 4, 0.4, tuple(f"k{i}" for i in range(20)))
    with pytest.raises(LossNotFinite, match=r"k15 and 4 more"):
        watch.check()
    watch.check()


def test_a_run_stops_at_a_loss_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture full of NaN in step 6: the run names the batch, and no checkpoint holds what came after."""
    real = Stepper.__call__
    poisoned: list[tuple[str, ...]] = []

    def poison(self: Stepper, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        if step == 5:
            batch = replace(batch, images=batch.images.float())
            batch.images[3] = float("nan")
            poisoned.append(batch.keys)
        return real(self, batch, step)

    monkeypatch.setattr(Stepper, "__call__", poison)
    with pytest.raises(LossNotFinite) as caught:
        train(recipe(tmp_path, "albef", checkpoint={"every_steps": 1}), records())
    assert caught.value.step == 6
    assert caught.value.keys == poisoned[0]
    assert {"itc", "gradient norm"} <= set(caught.value.names)
    newest = max((tmp_path / "checkpoints").glob("step-*.pt"))
    state = torch.load(newest, weights_only=True)
    assert state["step"] == 5
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert read_events(tmp_path / "log.jsonl")[-1]["event"] == "error"


def test_an_alarm_reaches_log_and_report(tmp_path: Path) -> None:
    """All captions alike: nothing can be aligned, and the run says so."""
    same = [replace(record, captions=("a thing",)) for record in records()]
    settings = recipe(
        tmp_path,
        "clip",
        schedule={"steps": 260, "warmup_steps": 2},
        optimiser={"lr": 1e-4},
        log={"every": 20},
        checkpoint={"every_steps": None},
    )
    result = train(settings, same)
    alarms = [event for event in result.events if event["event"] == "alarm"]
    assert [alarm["kind"] for alarm in alarms] == ["itc-at-chance"]
    assert alarms[0]["step"] == 220
    assert "ITC is stuck" in (tmp_path / "report.html").read_text(encoding="utf-8")
