"""Batches in a fixed order: the same for any number of workers and ranks, and from any position on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from imglish.data.dataset import PairDataset, Purpose, collate, collate_unpaired, stream
from imglish.data.errors import Errors, Problem
from imglish.data.mixgen import MixGen


@dataclass(frozen=True, order=True)
class Position:
    """Where in the endless stream of samples a run stands: ``sample`` items of ``epoch``, of all ranks, are done."""

    epoch: int = 0
    sample: int = 0


def epoch_order(items: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int64 ``(items,)``."""
    return stream(seed, epoch, 0, Purpose.ORDER).permutation(items)


class Samples(Protocol):
    """A data set: numbered items, each of which is a sample of its own in every epoch."""

    def __len__(self) -> int: ...

    def sample(self, seed: int, epoch: int, item: int) -> Any: ...


def training_batches(
    dataset: Samples,
    batch_size: int,
    position: Position = Position(),
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    prefetch: int = 4,
    pin_memory: bool | None = None,
    errors: Errors | None = None,
    mixgen: MixGen | None = None,
    beside: Beside | None = None,
    join: Callable[[Sequence[Any]], Any] = collate,
) -> Iterator[tuple[Any, Position]]:
    """Batches without end from ``position``, each with the position after it; ``join`` makes them of samples.

    batch_size: pairs of all ranks together; rank r takes the r-th of ``world_size`` equal slices. The last items of an
    epoch that fill no batch are left out (other ones each epoch). Order and all random choices come from (seed,
    epoch, item), so neither ``workers`` nor ``world_size`` nor a resume changes a sample.
    pin_memory: default, where there is a CUDA device. prefetch: batches made ahead by each worker.
    errors: takes the pictures that cannot be read, each once (default: a log with a limit of 1 %); the next readable
    one stands in for each. mixgen: makes mixtures of pairs. beside: pictures and texts that every batch has beside its
    pairs. Raises :class:`imglish.data.errors.DataError` above the
    limit, ``ValueError`` for settings that cannot work.
    """
    if batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(f"a batch of {batch_size} pairs cannot be divided for rank {rank} of {world_size}")
    if batch_size > len(dataset):
        raise ValueError(f"a batch of {batch_size} pairs is larger than the data set with {len(dataset)}")
    if not 0 <= position.sample <= len(dataset):
        raise ValueError(f"position {position.sample} in a data set of {len(dataset)} items")
    stretches = _Stretches(len(dataset), batch_size, position, seed, rank, world_size)
    sources: list[tuple[Samples, int]] = [(dataset, seed)]
    sizes: list[int] = []
    if beside is not None:
        sizes = beside.sizes(world_size)
        sources += [(part, seed + (number << 32)) for number, part in enumerate(beside.datasets, 1)]
    loader = DataLoader(
        _Samples(sources),
        batch_sampler=_Places(stretches, beside, seed),
        collate_fn=partial(_loaded, mixgen=mixgen, sizes=sizes, join=join),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else the loader takes its seed from the global generator and so shifts it
    )
    errors = Errors() if errors is None else errors
    seen = 0
    for loaded, after in zip(loader, stretches.positions()):
        seen += len(loaded.batch)
        errors.extend(loaded.unreadable)
        errors.check(seen, len(dataset))
        yield loaded.batch, after


@dataclass(frozen=True)
class _Stretches:
    """The batch sampler: (epoch, item) of every sample of this rank's slice of every batch."""

    items: int
    batch_size: int
    position: Position
    seed: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.world_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for start in self._starts():
            if start.epoch != epoch:
                epoch, order = start.epoch, epoch_order(self.items, self.seed, start.epoch)
            first = start.sample + self.rank * share
            yield [(epoch, int(item)) for item in order[first : first + share]]

    @property
    def batches_before(self) -> int:
        """Batches between the start of the run and the position."""
        start = self._whole(self.position)
        return start.epoch * (self.items // self.batch_size) + start.sample // self.batch_size

    def positions(self) -> Iterator[Position]:
        """The position after each batch."""
        for start in self._starts():
            yield self._after(start)

    def _starts(self) -> Iterator[Position]:
        start = self._whole(self.position)
        while True:
            yield start
            start = self._after(start)

    def _after(self, start: Position) -> Position:
        return self._whole(Position(start.epoch, start.sample + self.batch_size))

    def _whole(self, start: Position) -> Position:
        """``start``, or the next epoch where no whole batch is left."""
        return start if start.sample + self.batch_size <= self.items else Position(start.epoch + 1, 0)


@dataclass(frozen=True)
class Beside:
    """Pictures alone and texts alone that every batch has beside its pairs; numbers are of all ranks together.

    They are taken in orders of their own, so that each is shown once before any comes again, whatever the pairs do.
    """

    pictures: PairDataset
    texts: PairDataset
    pictures_a_batch: int
    texts_a_batch: int

    @property
    def datasets(self) -> tuple[PairDataset, PairDataset]:
        return self.pictures, self.texts

    def sizes(self, world_size: int) -> list[int]:
        """Pictures and texts in a batch of one rank; ``ValueError`` where they cannot be given."""
        wanted = (self.pictures_a_batch, self.texts_a_batch)
        for what, size, dataset in zip(("pictures", "texts"), wanted, self.datasets, strict=True):
            if size % world_size or not 0 < size <= len(dataset):
                raise ValueError(f"{size} {what} a batch, of {len(dataset)}, for {world_size} ranks")
        return [size // world_size for size in wanted]


@dataclass(frozen=True)
class _Places:
    """The batch sampler: (source, epoch, item) of every sample of a batch, pairs first, then pictures, then texts."""

    pairs: _Stretches
    beside: Beside | None
    seed: int

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        others = [] if self.beside is None else [self._of(number) for number in range(2)]
        for places in zip(self.pairs, *others):
            yield [(source, epoch, item) for source, part in enumerate(places) for epoch, item in part]

    def _of(self, number: int) -> Iterator[list[tuple[int, int]]]:
        """Places of pictures (0) or texts (1), from the batch that the pairs are at."""
        assert self.beside is not None
        items = len(self.beside.datasets[number])
        size = (self.beside.pictures_a_batch, self.beside.texts_a_batch)[number]
        epoch, batch = divmod(self.pairs.batches_before, items // size)
        position, seed = Position(epoch, batch * size), self.seed + (number + 1 << 32)
        return iter(_Stretches(items, size, position, seed, self.pairs.rank, self.pairs.world_size))


class _Samples(Dataset[Any]):
    """sources: data sets with the seed of each."""

    def __init__(self, sources: Sequence[tuple[Samples, int]]) -> None:
        self.sources = sources

    def __getitem__(self, place: tuple[int, int, int]) -> Any:
        source, epoch, item = place
        dataset, seed = self.sources[source]
        return dataset.sample(seed, epoch, item)


@dataclass(frozen=True)
class _Loaded:
    """A batch with the pictures that could not be read for it."""

    batch: Any
    unreadable: tuple[Problem, ...]

    def pin_memory(self) -> _Loaded:
        return _Loaded(self.batch.pin_memory(), self.unreadable)


def _loaded(
    samples: Sequence[Any], mixgen: MixGen | None, sizes: Sequence[int], join: Callable[[Sequence[Any]], Any]
) -> _Loaded:
    """sizes: how many of the last samples are pictures alone and texts alone; empty where there are none."""
    pairs = samples[: len(samples) - sum(sizes)]
    batch = join(pairs if mixgen is None else mixgen.join(pairs))
    if sizes:
        alone = samples[len(pairs) :]
        batch = replace(batch, unpaired=collate_unpaired(alone[: sizes[0]], alone[sizes[0] :]))
    problems = tuple(problem for sample in samples for problem in sample.unreadable)
    return _Loaded(batch if mixgen is None else replace(batch, mixed=mixgen.every), problems)


def _start_worker(_: int) -> None:
    """Workers are many: one thread each, and no thread pool that a fork would have broken."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
