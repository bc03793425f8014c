"""What happens between two lines of the log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from imglish.data.batch import Batch
from imglish.data.tasks.batch import TaskBatch
from imglish.objectives.itm import itm_prior_entropy
from imglish.training.alarms import Chance, itc_chance
from imglish.training.ranks import mean_over_ranks


class Interval:
    """Sums on the device, so that a step waits for nothing; :meth:`means` reads them.

    steps: in the interval; waited: seconds for data; began: start, moved on by what is no training; swapped: the
    batches hold wrong captions; captions: how many each picture has.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0
        self.steps = 0
        self.swapped = False
        self.captions = 1
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None

    def add(self, names: Sequence[str], values: Tensor, batch: Batch | TaskBatch) -> None:
        """One step's ``values (K,)`` under ``names``, the same names in every step."""
        if self._sums is not None and tuple(names) != self._names:
            raise ValueError(f"losses changed their names from {self._names} to {tuple(names)}")
        self._names = tuple(names)
        self._sums = values.clone() if self._sums is None else self._sums.add_(values)
        self.steps += 1
        if isinstance(batch, Batch):
            self.swapped = batch.swapped is not None
            self.captions = batch.captions

    def means(self) -> dict[str, float]:
        """Means over steps and ranks; waits for the device."""
        if self._sums is None:
            return {}
        values = mean_over_ranks(self._sums / self.steps).tolist()
        return dict(zip(self._names, values, strict=True))

    def chance(self, batch_size: int, teacher: Any, itm_pairs: tuple[float, float] = (1, 2)) -> Chance:
        """Losses of a model that has learned nothing, for ``batch_size`` pictures and this teacher's queue.

        itm_pairs: matching and other pairs that the ITM sees of each picture, beside a wrong caption of the data.
        """
        queue = getattr(teacher, "queue", None)
        candidates = batch_size + (queue.filled if queue is not None else 0)
        itc = (itc_chance(candidates) + itc_chance(candidates * self.captions)) / 2  # among pictures, among texts
        positives, negatives = itm_pairs
        return Chance(itc, itm_prior_entropy(negatives + self.swapped, positives))
