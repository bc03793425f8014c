"""Alarms in plain words: a loss that is not finite, and training that runs without learning."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from imglish.nn.segments import HostCopy


class LossNotFinite(ArithmeticError):  # noqa: N818 (it says what happened)
    """A loss or the gradient became infinite or not a number; names the entry, the step, the epoch and the samples."""

    def __init__(self, names: Sequence[str], step: int, epoch: float, keys: Sequence[str]) -> None:
        shown = ", ".join(keys[:16]) + (f" and {len(keys) - 16} more" if len(keys) > 16 else "")
        what = " and ".join(names) if names else "a loss on another process"
        super().__init__(
            f"{what} became infinite or not a number in step {step} (epoch {epoch:.2f}). "
            f"Samples of the batch: {shown}. The weights of the newest checkpoint are from before this step. "
            "Usual reasons: optimiser.lr too high or schedule.warmup_steps too short, clipping switched off, "
            "or a damaged picture among these samples."
        )
        self.names, self.step, self.epoch, self.keys = tuple(names), step, epoch, tuple(keys)


LEAST_USAGE = 0.05  # of a codebook, below which it counts as collapsed


@dataclass(frozen=True)
class _Pending:
    copy: HostCopy
    names: tuple[str, ...]
    step: int
    epoch: float
    keys: tuple[str, ...]


class FiniteWatch:
    """Checks every step's losses one step later, so that the step itself never waits for the device."""

    def __init__(self) -> None:
        self._pending: _Pending | None = None

    def push(self, names: Sequence[str], values: Tensor, step: int, epoch: float, keys: Sequence[str]) -> None:
        """Start copying this step's ``values (K,)`` to the host; raise :class:`LossNotFinite` about the step before."""
        before, self._pending = self._pending, _Pending(HostCopy(values), tuple(names), step, epoch, tuple(keys))
        _raise_if_not_finite(before)

    def check(self) -> None:
        """Wait for what is under way: before weights are saved, and at the end."""
        before, self._pending = self._pending, None
        _raise_if_not_finite(before)


def _raise_if_not_finite(pending: _Pending | None) -> None:
    if pending is None:
        return
    wrong = [name for name, value in zip(pending.names, pending.copy.numpy(), strict=True) if not math.isfinite(value)]
    if wrong:
        raise LossNotFinite(wrong, pending.step, pending.epoch, pending.keys)


@dataclass(frozen=True)
class Chance:
    """Loss values of a model that has learned nothing: ITC is the log of the number of candidates, ITM the entropy of
    the share of matched pairs. A value of None is not watched."""

    itc: float | None = None
    itm: float | None = None


def itc_chance(candidates: int) -> float:
    """ITC of a model that guesses among ``candidates`` (the batch of all ranks and the filled queue)."""
    return math.log(candidates)


@dataclass(frozen=True)
class Alarm:
    """kind: short name; text: what is wrong and what to try."""

    kind: str
    text: str


class LearningWatch:
    """Looks at the mean losses of each log interval and says once what goes wrong.

    patience: steps after the warm-up that a loss may stay at its value of chance.
    """

    def __init__(self, warmup_steps: int, patience: int, raised: Sequence[str] = ()) -> None:
        self._from = warmup_steps + patience
        self._raised = set(raised)
        self._excess: deque[float] = deque(maxlen=5)
        self._first: tuple[float, float] | None = None
        self._warmup = warmup_steps

    def look(
        self, step: int, losses: Mapping[str, float], chance: Chance, metrics: Mapping[str, float] | None = None
    ) -> list[Alarm]:
        """Alarms that the means ``losses`` and ``metrics`` of the interval up to ``step`` raise for the first time."""
        found = [*self._stuck(step, losses, chance), *self._rising(step, losses, chance)]
        found += self._collapsed(step, metrics or {})
        new = [alarm for alarm in found if alarm.kind not in self._raised]
        self._raised.update(alarm.kind for alarm in new)
        return new

    def _stuck(self, step: int, losses: Mapping[str, float], chance: Chance) -> list[Alarm]:
        if step < self._from:
            return []
        found = []
        itm, itc = losses.get("itm"), losses.get("itc")
        if itm is not None and chance.itm is not None and abs(itm - chance.itm) < 0.01 * chance.itm:
            found.append(
                Alarm(
                    "itm-at-prior",
                    f"ITM is stuck at {itm:.4f}, the entropy of its classes ({chance.itm:.4f}): the matcher only knows "
                    "how many pairs match and has learned nothing about pictures and texts. Usual reasons: the towers "
                    "are not aligned yet (is ITC still falling? then train on), optimiser.lr is too high or "
                    "schedule.warmup_steps too short, or captions do not belong to their pictures.",
                )
            )
        if itc is not None and chance.itc is not None and itc > 0.99 * chance.itc:
            found.append(
                Alarm(
                    "itc-at-chance",
                    f"ITC is stuck at {itc:.4f}, the value of guessing among all candidates (log = {chance.itc:.4f}): "
                    "pictures and captions are not being aligned. Usual reasons: optimiser.lr too high or too low, "
                    "captions that do not belong to their pictures, or all captions alike.",
                )
            )
        return found

    def _collapsed(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        usage = metrics.get("code_usage")
        if step < self._from or usage is None or usage >= LEAST_USAGE:
            return []
        text = (
            f"the visual tokenizer uses {usage:.1%} of its codebook (perplexity of the codes, over their number): few "
            "codes stand for everything, and masked image modelling on them would learn little. Fewer codes, more "
            "pictures, model.restart (VQ-KD), or more model.information and a higher last model.temperature (discrete "
            "VAE) help."
        )
        return [Alarm("codebook-collapse", text)]

    def _rising(self, step: int, losses: Mapping[str, float], chance: Chance) -> list[Alarm]:
        total = sum(losses.values())
        excess = total - (chance.itc or 0.0)  # a queue that fills makes ITC harder without anything being wrong
        if self._first is None:
            self._first = (total, excess)
        self._excess.append(excess)
        full = len(self._excess) == self._excess.maxlen
        at_first, excess_at_first = self._first
        if step < self._warmup or not full or min(self._excess) - excess_at_first < 0.2 * at_first:
            return []
        text = (
            f"the loss is {total:.3f}, it was {at_first:.3f} at the start: training diverges. Lower optimiser.lr "
            "(to a third), or lengthen schedule.warmup_steps."
        )
        return [Alarm("diverging", text)]
