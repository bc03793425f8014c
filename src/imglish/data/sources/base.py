"""What a source of records is, and what any sequence of records is asked."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from imglish.data.errors import Errors
from imglish.data.records import Record


@dataclass(frozen=True)
class Part:
    """Records ``start`` to ``stop`` (exclusive) of a mixture; weight: how often an epoch shows each of them."""

    start: int
    stop: int
    weight: float = 1.0


class Source(Sequence[Record]):
    """Records by number, made when they are asked for: what stays in memory is columns, not an object a record.

    The same number gives the same record in any process. A source can be sent to other processes (pickled) and opens
    its files there when they are first read. Slices and selections are views. ``errors``: what could not be used.
    """

    errors: Errors

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, number: int) -> Record:
        """Record ``number`` in ``0 .. len - 1``. Its picture is not read yet."""

    @abstractmethod
    def caption_counts(self) -> np.ndarray:
        """How many captions each record has, int64 ``(len,)``, without reading the captions."""

    def parts(self) -> tuple[Part, ...]:
        """The parts of a mixture, in order and without gaps; other sources are one part of weight 1."""
        return (Part(0, len(self)),)

    def digest(self) -> str:
        """Short text that changes when keys or captions change."""
        return _digest(self)

    @overload
    def __getitem__(self, number: int) -> Record: ...

    @overload
    def __getitem__(self, number: slice) -> Source: ...

    def __getitem__(self, number: int | slice) -> Record | Source:
        if isinstance(number, slice):
            return self.select(np.arange(len(self), dtype=np.int64)[number])
        if not -len(self) <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        return self.record(int(number) % len(self))

    def __iter__(self) -> Iterator[Record]:
        return (self.record(number) for number in range(len(self)))

    def select(self, numbers: np.ndarray) -> Source:
        """The records with these numbers (integers), in this order."""
        return Selection(self, np.asarray(numbers, dtype=np.int64))


class Selection(Source):
    """Some records of another source. The weights of a mixture do not apply to a choice of its records."""

    def __init__(self, source: Source, numbers: np.ndarray) -> None:
        self.source, self.numbers, self.errors = source, numbers, source.errors

    def __len__(self) -> int:
        return len(self.numbers)

    def record(self, number: int) -> Record:
        return self.source.record(int(self.numbers[number]))

    def caption_counts(self) -> np.ndarray:
        return self.source.caption_counts()[self.numbers]


def caption_counts(records: Sequence[Record]) -> np.ndarray:
    """How many captions each record has, int64 ``(len(records),)``."""
    if isinstance(records, Source):
        return records.caption_counts()
    return np.fromiter((len(record.captions) for record in records), dtype=np.int64, count=len(records))


def parts(records: Sequence[Record]) -> tuple[Part, ...]:
    """The parts of a mixture; any other sequence is one part."""
    return records.parts() if isinstance(records, Source) else (Part(0, len(records)),)


def digest(records: Sequence[Record]) -> str:
    """Short text that changes when keys, captions or wrong captions change."""
    return records.digest() if isinstance(records, Source) else _digest(records)


def _digest(records: Sequence[Record]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for record in records:
        found.update(repr((record.key, record.captions, record.swapped)).encode("utf-8", "surrogatepass"))
    return found.hexdigest()
