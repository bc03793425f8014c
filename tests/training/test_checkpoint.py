"""Checkpoints of a run: whole or absent, newest kept, read without running code."""

from __future__ import annotations

import os
import pickle
import resource
from pathlib import Path

import pytest
import torch

from imglish.checkpoints.native import CheckpointError, load
from imglish.training.checkpoint import CheckpointFolder, SaveClock, differences
from imglish.training.config import CheckpointRecipe
from imglish.training.trainer import train
from tests.training.support import assert_same, final_state, recipe, records


def state(value: float) -> dict[str, object]:
    return {"weights": torch.full((1000,), value)}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "c", keep=2)
    assert folder.load() is None
    for step in (1, 5, 10):
        folder.save(step, state(step))
    assert folder.steps() == [5, 10]
    loaded = folder.load()
    assert loaded is not None
    assert (loaded["step"], float(loaded["weights"][0])) == (10, 10.0)


def test_a_kill_while_writing_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(1, state(1))
    (tmp_path / "step-00000002.pt.writing").write_bytes(b"half")  # what SIGKILL leaves behind
    assert folder.steps() == [1]

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(
            CheckpointError, match=r"cannot write .*step-00000003.*Is the disk full\? the newest .*00000001"
        ):
            folder.save(3, state(3))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000001.pt", "step-00000002.pt.writing"]
    folder.save(4, state(4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001.pt", "step-00000004.pt"]


def test_a_full_disk_is_said_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    """A real limit on the size of files, in the middle of writing."""
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(1, {"weights": torch.zeros(10)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
            folder.save(2, {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert folder.steps() == [1]
    assert folder.load() is not None
    assert not list(tmp_path.glob("*.writing"))


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    folder.save(1, state(1))
    path = folder.save(2, state(2))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"00000002\.pt is damaged .*delete it to continue from step 1"):
        folder.load()

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'run'}",)

    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="damaged"):
        folder.load()
    assert not (tmp_path / "run").exists()
    torch.save({"format": 9, "step": 2}, path)
    with pytest.raises(CheckpointError, match="has format 9"):
        folder.load()


def test_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = SaveClock(CheckpointRecipe(every_steps=5, every_minutes=1))
    assert [step for step in range(1, 16) if clock.due_by_steps(step)] == [5, 10, 15]
    assert not clock.due_by_time()
    now[0] += 60
    assert clock.due_by_time()
    clock.saved()
    assert not clock.due_by_time()
    off = SaveClock(CheckpointRecipe(every_steps=None, every_minutes=None))
    assert not off.due_by_steps(5)
    assert not off.due_by_time()


def test_saving_by_time_happens_in_a_run(tmp_path: Path) -> None:
    settings = recipe(tmp_path, "clip", checkpoint={"every_steps": None, "every_minutes": 1e-9, "keep": 100})
    train(settings, records())
    assert len(list((tmp_path / "checkpoints").iterdir())) == 13  # before the first step, and after each


def test_differences_leave_out_what_does_not_matter() -> None:
    old, new = recipe("a", "clip").to_dict(), recipe("b", "clip", data={"workers": 3}, log={"every": 1}).to_dict()
    assert differences(old, new) == []
    other = recipe("a", "clip", seed=4, schedule={"steps": 13}).to_dict()
    assert differences(old, other) == [
        "schedule.steps: 12 in the checkpoint, 13 now",
        "seed: 0 in the checkpoint, 4 now",
    ]


def test_workers_and_cache_do_not_change_a_run(tmp_path: Path) -> None:
    train(recipe(tmp_path / "a", "albef"), records())
    train(recipe(tmp_path / "b", "albef", data={"workers": 2}), records())
    assert_same(final_state(tmp_path / "a"), final_state(tmp_path / "b"))


def test_the_average_is_what_is_exported_and_init_starts_from_it(tmp_path: Path) -> None:
    first = train(recipe(tmp_path / "a", "albef", average=0.9), records())
    assert first.model is not None
    exported = load(first.model)
    state = torch.load(max((tmp_path / "a" / "checkpoints").glob("*.pt")), weights_only=True)
    weights = exported.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in state["average"]["model"].items())
    assert not torch.equal(weights["itm_head.weight"], state["model"]["itm_head.weight"])
    assert exported.meta["step"] == 12
    settings = recipe(tmp_path / "b", "albef")
    settings.model.clear()
    settings.model.update({"init": str(first.model), "teacher": {"alpha": 0.1}})
    train(settings, records())
    begun = torch.load(tmp_path / "b" / "checkpoints" / "step-00000008.pt", weights_only=True)
    assert begun["tokenizer"] == exported.tokenizer.inner.to_str()
    assert begun["recipe"]["model"]["teacher"] == {"alpha": 0.1}
