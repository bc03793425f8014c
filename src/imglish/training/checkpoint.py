"""Checkpoints of a run, for exact resuming: one file each, complete or not there at all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from imglish import atomic
from imglish.checkpoints.native import CheckpointError
from imglish.training.config import CheckpointRecipe

FORMAT = 1

# Settings that may change between stop and resume, because the result does not depend on them (or only by rounding).
FREE = (
    "output",
    "data.train",
    "data.images",
    "data.source.max_errors",
    "data.source.index",
    "data.workers",
    "data.cache",
    "batch.accumulate",
    "compute",
    "checkpoint",
    "validation",
    "log",
    "tokenizer.load",
)


class ResumeError(ValueError):
    """A run folder whose checkpoint does not belong to the recipe."""


class CheckpointFolder:
    """The checkpoints of one run: ``step-00001000.pt``, the newest ``keep`` of them."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = (path.stem.removeprefix("step-") for path in self.folder.glob("step-*.pt"))
        return sorted(int(step) for step in found if step.isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of ``step``, then remove the oldest ones and what killed processes left.

        state: tensors, numbers, texts and containers of them. Raises :class:`CheckpointError` when the disk refuses;
        the earlier checkpoints then stay as they are.
        """
        path = self.path(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.write_file(path, lambda file: _write({"format": FORMAT, "step": step, **state}, file))
        except (OSError, RuntimeError) as error:
            last = self.steps()
            newest = f"the newest complete one is {self.path(last[-1])}" if last else "there is none yet"
            raise CheckpointError(
                f"cannot write the checkpoint {path}: {error}. Is the disk full? {newest}; "
                "after making room, the same command continues from it"
            ) from error
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)
        for rest in self.folder.glob(f"*{atomic.TEMPORARY}"):
            rest.unlink(missing_ok=True)
        return path

    def load(self, step: int | None = None) -> dict[str, Any] | None:
        """The newest checkpoint (or that of ``step``) on the CPU; None if there is none. Runs no code of the file."""
        steps = self.steps()
        if not steps:
            return None
        path = self.path(steps[-1] if step is None else step)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen kinds for a damaged file
            others = f"delete it to continue from step {steps[-2]}" if len(steps) > 1 else "it is the only one"
            raise CheckpointError(f"{path} is damaged ({type(error).__name__}); {others}") from error
        if state.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {state.get('format')!r}; this version reads format {FORMAT}")
        return dict(state)


def _write(state: Mapping[str, Any], file: BinaryIO) -> None:
    torch.save(dict(state), file)


@dataclass
class SaveClock:
    """Says when a checkpoint is due, by steps and by minutes."""

    recipe: CheckpointRecipe
    _last: float = 0.0

    def __post_init__(self) -> None:
        self._last = time.monotonic()

    def due_by_steps(self, step: int) -> bool:
        every = self.recipe.every_steps
        return every is not None and step % every == 0

    def due_by_time(self) -> bool:
        minutes = self.recipe.every_minutes
        return minutes is not None and time.monotonic() - self._last >= 60 * minutes

    def saved(self) -> None:
        self._last = time.monotonic()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """Settings outside of :data:`FREE` that differ between two recipes, each as ``key: old, new`` in words."""
    found = []
    for name in sorted(set(old) | set(new)):
        key = f"{where}.{name}" if where else name
        if key in FREE:
            continue
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, key)
        elif a != b:
            found.append(f"{key}: {a!r} in the checkpoint, {b!r} now")
    return found


def require_same(state: Mapping[str, Any], recipe: Mapping[str, Any], data: str, folder: Path) -> None:
    """Raise :class:`ResumeError` unless the checkpoint was made by this recipe on this training data (a digest)."""
    if changed := differences(state["recipe"], recipe):
        raise ResumeError(
            f"{folder} holds a checkpoint of step {state['step']} that was made with other settings; "
            + "; ".join(changed)
            + ". Restore them to continue, choose another output for a new run, or start from the exported model "
            "with model.init"
        )
    if state["data"] != data:
        raise ResumeError(
            f"{folder} holds a checkpoint of step {state['step']} that was made on other training data (its keys or "
            "captions differ), so the place in it means nothing: restore the data or choose another output"
        )
