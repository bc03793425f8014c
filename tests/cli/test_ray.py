"""Workers as tasks of Ray: what is asked of Ray, with a stand-in for it that runs the tasks here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from imglish.bootstrapping.stage import Stage
from imglish.cli import main
from tests.bootstrapping.conftest import models, photos

__all__ = ["models", "photos"]


class Tasks:
    """A data set of rows, each of which becomes a task."""

    def __init__(self, count: int, override_num_blocks: int) -> None:
        assert count == override_num_blocks  # a task a row
        self.rows: list[dict[str, Any]] = [{"id": number} for number in range(count)]

    def map(self, work: Callable[[dict[str, Any]], dict[str, Any]], num_gpus: int) -> Tasks:
        assert num_gpus == 0
        self.rows = [work(row) for row in reversed(self.rows)]
        return self

    def take_all(self) -> list[dict[str, Any]]:
        return self.rows


def test_each_task_is_a_worker(
    models: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ray: Any = ModuleType("ray")
    ray.data, ray.init, ray.cluster_resources = ModuleType("ray.data"), lambda **_: None, lambda: {"GPU": 1.0}
    ray.data.range = Tasks
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ray.data)
    monkeypatch.chdir(tmp_path)  # tasks begin in folders of their own, paths are those of the command
    before = os.getcwd()
    score = ["score", str(photos), "--model", str(models / "blip-tiny"), "--per-shard", "2", "--device", "cpu"]
    assert main([*score, "--out", "scores", "--ray", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("texts scored in") == 2
    assert "14 texts scored in 4 shards" in said
    assert not Stage.open(Path("scores")).missing()
    assert os.getcwd() == before
    assert main([*score, "--out", "scores", "--ray=0"]) == 2
    assert "at least one worker" in capsys.readouterr().err


def test_without_ray_it_is_said_how_to_get_it(
    models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    score = ["score", str(photos), "--model", str(models / "blip-tiny"), "--out", str(tmp_path / "scores")]
    assert main([*score, "--ray", "2"]) == 2
    assert "imglish[ray]" in capsys.readouterr().err
