"""Runs of a model without towers: exact resume with patches drawn anew, parts, and validations that read every pair."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import imglish
from imglish.data.batch import Batch
from imglish.data.patches import PatchBatch
from imglish.data.records import Record
from imglish.training.settings import SettingsError
from imglish.training.step import Stepper
from imglish.training.trainer import Run, train
from tests.training.support import assert_same, final_state, recipe, records

GROUPS: dict[str, Any] = {"tokenizer": {"append_sep": True}, "validation": {"data": "given", "limit": 6}}


def test_a_stopped_run_ends_as_if_nothing_had_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = train(recipe(tmp_path / "calm", "vilt", **GROUPS), records(), records(6))
    real, shapes = Stepper.__call__, set()

    def interrupted(self: Stepper, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        assert isinstance(batch.images, PatchBatch)
        shapes.update(batch.images.segments.lengths)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return real(self, batch, step)

    monkeypatch.setattr(Stepper, "__call__", interrupted)
    settings = recipe(tmp_path / "stopped", "vilt", **GROUPS)
    assert train(settings, records(), records(6)).stopped == "SIGTERM"
    monkeypatch.setattr(Stepper, "__call__", real)
    resumed = train(settings, records(), records(6))
    assert_same(final_state(tmp_path / "calm"), final_state(tmp_path / "stopped"))
    assert resumed.best["r_mean"] == calm.best["r_mean"]
    assert shapes == {4}  # 16 x 16 pixels are four patches of 8, and no more than four stay


def test_losses_metrics_and_the_value_of_chance(tmp_path: Path) -> None:
    result = train(recipe(tmp_path, "vilt", batch={"accumulate": 2}, **GROUPS), records(), records(6))
    steps = [event for event in result.events if event["event"] == "step"]
    assert set(steps[-1]["losses"]) == {"mlm", "itm", "wpa"}
    assert 0 <= steps[-1]["metrics"]["itm_accuracy"] <= 1
    found = [event for event in result.events if event["event"] == "validation"]
    assert found[-1]["towers"] is None
    assert found[-1]["reranked"]["t2i_r10"] == 100
    assert "no towers" not in (tmp_path / "log.jsonl").read_text()


def test_the_alarm_knows_that_half_of_the_pairs_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = Run._log_if_due

    def log(self: Run) -> None:
        seen.append(self.interval.chance(8, None, self.model.itm_pairs).itm)  # type: ignore[arg-type]
        real(self)

    monkeypatch.setattr(Run, "_log_if_due", log)
    train(recipe(tmp_path, "vilt", tokenizer={"append_sep": True}), records())
    assert seen[0] == pytest.approx(np.log(2))


def test_too_many_pairs_to_validate_stop_the_run_before_its_work(tmp_path: Path) -> None:
    many = [Record(f"{n}", records(1)[0].image, ("a thing",) * 2, image_id=n) for n in range(800)]
    with pytest.raises(SettingsError, match=r"validation\.limit.*1,280,000 pairs"):
        train(recipe(tmp_path, "vilt", tokenizer={"append_sep": True}), records(), many)
    assert not (tmp_path / "log.jsonl").exists()


def test_texts_end_with_a_token_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="append_sep"):
        train(recipe(tmp_path, "vilt"), records())


def test_the_exported_model_ranks_all_pictures(tmp_path: Path) -> None:
    result = train(recipe(tmp_path, "vilt", **GROUPS), records(), records(6))
    assert result.model is not None
    model = imglish.load(result.model)
    pictures = [record.image for record in records(7) if isinstance(record.image, bytes)]
    found = model.rank("a red square", pictures, top=7)
    match = model.match(pictures, ["a red square"])[:, 0]
    assert sorted(f.index for f in found) == list(range(7))
    assert [f.match for f in found] == pytest.approx([match[f.index].item() for f in found], abs=1e-6)
    with pytest.raises(TypeError, match="encodesimages"):
        model.encode_images(pictures)
