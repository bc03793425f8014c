"""Captions while training: their metrics in the log, the captions with their pictures in the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from imglish.training.settings import SettingsError
from imglish.training.trainer import train
from tests.training.support import recipe, records


def test_metrics_in_the_log_and_pictures_in_the_report(tmp_path: Path) -> None:
    wanted = recipe(
        tmp_path,
        "blip",
        tokenizer={"append_sep": True},
        validation={"every": 1.0, "captions": 5},
        schedule={"steps": 10},
    )
    result = train(wanted, records(40), records(6))
    found = [event["captions"] for event in result.events if event["event"] == "validation"]
    assert len(found) == 2
    assert set(found[0]) >= {"bleu4", "rouge_l", "cider"}
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Captions of the validation pictures" in report
    assert "Closest to the references" in report
    assert report.count("data:image") == 15  # at random, closest, furthest


def test_without_the_option_the_report_shows_a_few(tmp_path: Path) -> None:
    result = train(
        recipe(tmp_path, "blip", tokenizer={"append_sep": True}, schedule={"steps": 3, "warmup_steps": 1}),
        records(40),
        records(20),
    )
    assert all("captions" not in event for event in result.events)
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Captions of pictures drawn at random" in report
    assert "Closest to the references" not in report
    assert report.count("data:image") == 12


def test_a_model_that_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"validation\.captions: Clip writes no captions"):
        train(recipe(tmp_path / "a", "clip", validation={"captions": 3}), records(40), records(6))
    train(recipe(tmp_path / "b", "clip", schedule={"steps": 3, "warmup_steps": 1}), records(40), records(6))
    assert "Captions" not in (tmp_path / "b" / "report.html").read_text(encoding="utf-8")
