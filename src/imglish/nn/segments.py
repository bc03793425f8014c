"""Packed rows: how T consecutive rows divide into sequences, without padding.

A batch of token sequences is a tensor of rows ``(T, D)`` plus a :class:`Segments`. Linear layers, norms and
feed-forwards run on the rows as they are; only attention asks which rows belong together. The lengths live on
the host, because they come from the collation there: nothing here ever waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


def _upload(values: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    host = torch.from_numpy(values).to(dtype)
    if device.type == "cuda":  # a pinned, non-blocking copy does not make the host wait
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


@dataclass(frozen=True)
class Segments:
    """Lengths of N consecutive sequences in T rows; a length of zero is allowed.

    ``lengths`` is a tuple of N Python integers, in row order. Index tensors are made once per device and kept.
    """

    lengths: tuple[int, ...]
    _on_device: dict[tuple[str, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @staticmethod
    def of(lengths: Iterable[int]) -> Segments:
        return Segments(tuple(int(n) for n in lengths))

    @staticmethod
    def equal(count: int, length: int) -> Segments:
        """``count`` sequences of one ``length``: the rows of ``(count, length, D)`` seen as ``(T, D)``."""
        if isinstance(count, torch.SymInt) or isinstance(length, torch.SymInt):
            return Grid(count, length)
        made = Segments((length,) * count)
        # known already; and torch.compile cannot trace the lock that Python 3.11 puts around cached properties
        made.__dict__.update(count=count, total=count * length, longest=length if count else 0, uniform=True)
        return made

    @cached_property
    def count(self) -> int:
        """N, the number of sequences."""
        return len(self.lengths)

    @cached_property
    def total(self) -> int:
        """T, the number of rows."""
        return sum(self.lengths)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def uniform(self) -> bool:
        """All sequences have one length, so ``(T, D)`` is ``(N, L, D)`` by a view."""
        return len(set(self.lengths)) <= 1

    @property
    def filled(self) -> bool:
        """Some slots of the padded view hold no row of a sequence, so attention needs :meth:`valid`."""
        return not self.uniform

    @cached_property
    def bounds(self) -> np.ndarray:
        """Row boundaries on the host, int64 ``(N + 1,)``."""
        return np.concatenate([[0], np.cumsum(np.asarray(self.lengths, dtype=np.int64))]).astype(np.int64)

    def offsets(self, device: torch.device) -> Tensor:
        """Row boundaries, int32 ``(N + 1,)``: the ``cu_seqlens`` of varlen attention kernels."""
        return self._cached("offsets", self.bounds, torch.int32, device)

    def starts(self, device: torch.device) -> Tensor:
        """First row of every sequence, int64 ``(N,)`` (where [CLS] stands)."""
        return self._cached("starts", self.bounds[:-1], torch.int64, device)

    def ends(self, device: torch.device) -> Tensor:
        """Last row of every sequence, int64 ``(N,)`` (where the end token stands)."""
        return self._cached("ends", self.bounds[1:] - 1, torch.int64, device)

    def positions(self, device: torch.device) -> Tensor:
        """Position of each row within its sequence, int64 ``(T,)``."""
        where = np.arange(self.total) - np.repeat(self.bounds[:-1], self.lengths)
        return self._cached("positions", where, torch.int64, device)

    def indices(self, device: torch.device) -> Tensor:
        """Number of the sequence that each row belongs to, int64 ``(T,)``."""
        return self._cached("indices", np.repeat(np.arange(self.count), self.lengths), torch.int64, device)

    def slots(self, device: torch.device) -> Tensor:
        """Place of each row in the padded view ``(N * longest,)``, int64 ``(T,)``."""
        where = np.arange(self.total) - np.repeat(self.bounds[:-1], self.lengths)
        where = where + np.repeat(np.arange(self.count) * self.longest, self.lengths)
        return self._cached("slots", where, torch.int64, device)

    def valid(self, device: torch.device) -> Tensor:
        """Which slots of the padded view hold a row, bool ``(N, longest)``."""
        mask = np.arange(self.longest)[None, :] < np.asarray(self.lengths)[:, None]
        return self._cached("valid", mask, torch.bool, device)

    def rows_of(self, order: Iterable[int]) -> np.ndarray:
        """Row numbers (host, int64) that bring the sequences into ``order``; one may occur many times."""
        chosen = np.asarray(list(order), dtype=np.int64)
        lengths = np.asarray(self.lengths, dtype=np.int64)[chosen]
        ends = np.cumsum(lengths)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return np.repeat(self.bounds[:-1][chosen], lengths) + within

    def select(self, order: Iterable[int]) -> Segments:
        """The segments of the rows that :meth:`rows_of` names."""
        return Segments(tuple(self.lengths[i] for i in order))

    def __add__(self, other: Segments) -> Segments:
        """Segments of two row tensors laid one behind the other."""
        return Segments(self.lengths + other.lengths)

    def _cached(self, name: str, values: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
        device = torch.device(device)
        if (name, device) not in self._on_device:
            self._on_device[name, device] = _upload(values, dtype, device)
        return self._on_device[name, device]


class Grid(Segments):
    """Sequences whose number and lengths no Python integer knows: what a model is traced with for export.

    The rows are all slots of ``(count, length)``, with filling behind the end of each sequence where ``mask``, bool
    ``(count, length)``, is false (None: no filling). Which row is whose follows from arithmetic on the device. What
    asks for the lengths on the host (selecting, joining, counting) is an error.
    """

    def __init__(self, count: int, length: int, mask: Tensor | None = None) -> None:
        self.__dict__.update(count=count, total=count * length, longest=length, uniform=True, mask=mask)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Grid):
            return NotImplemented
        mine, theirs = self.__dict__, other.__dict__
        return mine["mask"] is theirs["mask"] and all(mine[key] == theirs[key] for key in ("count", "longest"))

    __hash__ = None  # type: ignore[assignment]

    @property
    def filled(self) -> bool:
        return self.__dict__["mask"] is not None

    @property
    def lengths(self) -> tuple[int, ...]:
        raise TypeError("this part of the model needs the lengths of the texts on the host: it cannot be traced")

    def starts(self, device: torch.device) -> Tensor:
        return torch.arange(self.count, device=device) * self.longest

    def ends(self, device: torch.device) -> Tensor:
        mask: Tensor | None = self.__dict__["mask"]
        return self.starts(device) + (self.longest if mask is None else mask.sum(1)) - 1

    def positions(self, device: torch.device) -> Tensor:
        return torch.arange(self.longest, device=device).expand(self.count, -1).flatten()

    def indices(self, device: torch.device) -> Tensor:
        return torch.arange(self.count, device=device)[:, None].expand(-1, self.longest).flatten()

    def valid(self, device: torch.device) -> Tensor:
        mask: Tensor | None = self.__dict__["mask"]
        return torch.ones(self.count, self.longest, dtype=torch.bool, device=device) if mask is None else mask


@dataclass(frozen=True)
class Ragged:
    """Packed rows together with their segments: ``rows (T, ...)``; the sequences may differ in length."""

    rows: Tensor
    segments: Segments

    def __len__(self) -> int:
        """N, the number of sequences."""
        return self.segments.count

    def select(self, order: Iterable[int]) -> Ragged:
        """The sequences in ``order``; one may occur many times."""
        chosen = list(order)
        index = upload_index(self.segments.rows_of(chosen), self.rows.device)
        return Ragged(self.rows[index], self.segments.select(chosen))

    def map(self, change: Callable[[Tensor], Tensor]) -> Ragged:
        """The same with ``change`` applied to the rows (their number must stay)."""
        return Ragged(change(self.rows), self.segments)

    @staticmethod
    def cat(parts: Sequence[Ragged]) -> Ragged:
        """The sequences of all parts, one behind the other."""
        lengths = tuple(n for part in parts for n in part.segments.lengths)
        return Ragged(torch.cat([part.rows for part in parts]), Segments(lengths))


@dataclass(frozen=True)
class Rows:
    """Some of the rows of packed sequences: the ones that a head reads.

    index: int64 ``(M,)`` row numbers, ascending; segments: how many of the M lie in each sequence.
    """

    index: Tensor
    segments: Segments

    @staticmethod
    def first(segments: Segments, device: torch.device) -> Rows:
        """The first row of every sequence: [CLS]."""
        return Rows(segments.starts(device), Segments.equal(segments.count, 1))

    @staticmethod
    def last(segments: Segments, device: torch.device) -> Rows:
        """The last row of every sequence: the end token."""
        return Rows(segments.ends(device), Segments.equal(segments.count, 1))


def upload_index(values: np.ndarray, device: torch.device) -> Tensor:
    """Host row numbers as an int64 tensor on ``device``, without making the host wait."""
    return _upload(values, torch.int64, torch.device(device))


def upload_floats(values: np.ndarray, device: torch.device) -> Tensor:
    """Host numbers as a float32 tensor on ``device``, without making the host wait."""
    return _upload(values, torch.float32, torch.device(device))


class HostCopy:
    """A device tensor on its way to the host: the copy is started here and waited for in :meth:`numpy`.

    What the device was given in between keeps it busy, so waiting for the copy does not drain its queue.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def numpy(self) -> np.ndarray:
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()
