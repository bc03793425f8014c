"""Which token is which: rows of pictures and texts, alone and fused, laid out so that an expert's rows are one slice.

Four kinds of tokens exist: those of a picture or a text that is encoded alone, and those of one that is fused with its
partner. A :class:`Route` names the expert of each kind. Rows lie sorted: pictures alone, fused pictures, fused texts,
texts alone. In this order the rows of every expert of each of the routes here are one slice, so an expert is one matrix
product on a view, and no row is moved between layers. Only attention brings the two parts of a fused sequence together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from imglish.nn.segments import Segments, upload_index


@dataclass(frozen=True)
class Route:
    """Name of the expert for each kind of token, in the order in which rows lie."""

    image: str
    fused_image: str
    fused_text: str
    text: str

    @property
    def names(self) -> tuple[str, ...]:
        """The experts, each once."""
        return tuple(dict.fromkeys((self.image, self.fused_image, self.fused_text, self.text)))


SHARED = Route("all", "all", "all", "all")
BY_MODALITY = Route("image", "image", "text", "text")
FUSED_APART = Route("image", "fused", "fused", "text")


NONE = Segments(())
"""No sequence at all."""


@dataclass(frozen=True)
class Packing:
    """What T rows are, in four stretches one behind the other; each field holds the lengths in its stretch.

    image: pictures alone; fused_image and fused_text: the two parts of fused sequences, as many of one as of the other
    (a length of zero where a picture or a text passes the fused experts without a partner); text: texts alone.
    Sequences are numbered in this order: pictures alone, fused ones, texts alone.
    """

    image: Segments = NONE
    fused_image: Segments = NONE
    fused_text: Segments = NONE
    text: Segments = NONE
    _on_device: dict[tuple[str, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.fused_image.count != self.fused_text.count:
            raise ValueError(f"{self.fused_image.count} fused pictures meet {self.fused_text.count} fused texts")

    @cached_property
    def stretches(self) -> tuple[Segments, Segments, Segments, Segments]:
        return (self.image, self.fused_image, self.fused_text, self.text)

    @cached_property
    def starts(self) -> tuple[int, int, int, int]:
        """First row of each stretch."""
        sizes = np.cumsum([0, *(stretch.total for stretch in self.stretches)])
        return (int(sizes[0]), int(sizes[1]), int(sizes[2]), int(sizes[3]))

    @cached_property
    def total(self) -> int:
        """T, the number of rows."""
        return sum(stretch.total for stretch in self.stretches)

    @cached_property
    def count(self) -> int:
        """N, the number of sequences."""
        return self.image.count + self.fused_image.count + self.text.count

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of the picture and of the text of each sequence, int64 ``(2, N)``."""
        alone, none = self.image.lengths, (0,) * self.text.count
        pictures = alone + self.fused_image.lengths + none
        texts = (0,) * self.image.count + self.fused_text.lengths + self.text.lengths
        return np.array([pictures, texts], dtype=np.int64).reshape(2, -1)

    @cached_property
    def first_rows(self) -> np.ndarray:
        """Row of the first token of the picture and of the text of each sequence, int64 ``(2, N)``; it has a meaning
        only where that part has tokens."""
        one, two, three, four = (
            start + segments.bounds[:-1] for start, segments in zip(self.starts, self.stretches, strict=True)
        )
        return np.stack([np.concatenate([one, two, four * 0]), np.concatenate([one * 0, three, four])])

    @cached_property
    def groups(self) -> Groups:
        """Pictures alone, pairs, texts alone: attention takes together what has similar lengths."""
        has = self.lengths > 0
        kinds = (has[0] & ~has[1], has[0] & has[1], ~has[0] & has[1])
        return Groups(self, [np.flatnonzero(kind) for kind in kinds if kind.any()])

    def positions(self, device: torch.device) -> Tensor:
        """Position of each row in its sequence, the picture before the text; int64 ``(T,)``."""

        def make() -> np.ndarray:
            where = np.zeros(self.total, dtype=np.int64)
            for group in self.groups.list:
                bounds, lengths = group.segments.bounds, group.segments.lengths
                where[group.rows] = np.arange(group.segments.total) - np.repeat(bounds[:-1], lengths)
            return where

        return self._cached("positions", make, device)

    def sequence_numbers(self, device: torch.device) -> Tensor:
        """Number of the sequence that each row belongs to, int64 ``(T,)``."""

        def make() -> np.ndarray:
            found = np.zeros(self.total, dtype=np.int64)
            for group in self.groups.list:
                found[group.rows] = np.repeat(group.sequences, group.segments.lengths)
            return found

        return self._cached("sequences", make, device)

    def spans(self, route: Route) -> list[tuple[str, int]]:
        """(expert, number of consecutive rows) in row order, the same expert side by side as one; none is empty."""
        names = (route.image, route.fused_image, route.fused_text, route.text)
        spans: list[tuple[str, int]] = []
        for name, stretch in zip(names, self.stretches, strict=True):
            if spans and spans[-1][0] == name:
                spans[-1] = (name, spans[-1][1] + stretch.total)
            elif stretch.total:
                spans.append((name, stretch.total))
        return spans

    def _cached(self, name: str, make: Callable[[], np.ndarray], device: torch.device) -> Tensor:
        if (name, device) not in self._on_device:
            self._on_device[name, device] = upload_index(make(), device)
        return self._on_device[name, device]


@dataclass(frozen=True)
class Group:
    """Some sequences of a :class:`Packing`, by their numbers in it.

    rows: host row numbers, sequence behind sequence, within each the picture before the text; segments: lengths of the
    sequences; image, text: tokens of the longest picture and of the longest text.
    """

    sequences: np.ndarray
    rows: np.ndarray
    segments: Segments
    image: int
    text: int

    @staticmethod
    def of(packing: Packing, sequences: np.ndarray) -> Group:
        lengths = packing.lengths[:, sequences]
        pieces = lengths.T.reshape(-1)  # picture, text, picture, text ...
        first = packing.first_rows[:, sequences].T.reshape(-1)
        within = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        segments = Segments.of(lengths.sum(0))
        image, text = (int(part.max(initial=0)) for part in lengths)
        return Group(sequences, np.repeat(first, pieces) + within, segments, image, text)


class Groups:
    """All sequences of a packing, divided into groups; takes rows apart for attention and lays them back."""

    def __init__(self, packing: Packing, sequences: Sequence[np.ndarray]) -> None:
        self.list = tuple(Group.of(packing, numbers) for numbers in sequences)
        everything = np.concatenate([np.zeros(0, dtype=np.int64), *(group.rows for group in self.list)])
        self._back = None if _consecutive(everything) else np.argsort(everything)
        self._on_device: dict[tuple[int, torch.device], Tensor] = {}

    def gather(self, x: Tensor) -> list[Tensor]:
        """The rows of each group out of ``x (T, ...)``: a view where they lie one behind the other."""
        parts = []
        for number, group in enumerate(self.list):
            if not _consecutive(group.rows):
                parts.append(x[self._cached(number, group.rows, x.device)])
            elif len(group.rows) == x.shape[0]:
                parts.append(x)
            else:
                parts.append(x[int(group.rows[0]) :][: len(group.rows)] if len(group.rows) else x[:0])
        return parts

    def scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`gather`."""
        joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return joined if self._back is None else joined[self._cached(-1, self._back, joined.device)]

    def _cached(self, number: int, rows: np.ndarray, device: torch.device) -> Tensor:
        if (number, device) not in self._on_device:
            self._on_device[number, device] = upload_index(rows, device)
        return self._on_device[number, device]


def _consecutive(rows: np.ndarray) -> bool:
    return len(rows) < 2 or bool((np.diff(rows) == 1).all())


@dataclass(frozen=True)
class Read:
    """The rows that heads read of a packing: only these are carried through a block that is given them.

    index: int64 ``(M,)`` row numbers on the device, in the order of ``packing``; packing: the same sequences with the
    numbers of rows that are read of each part (zero where none is).
    """

    index: Tensor
    packing: Packing

    @staticmethod
    def first(packing: Packing, device: torch.device, fused: Literal["image", "text"] = "text") -> Read:
        """The first row of every sequence, [CLS]; of fused pairs the first of the part ``fused``."""
        has = packing.lengths > 0
        use = has.copy()
        other = 0 if fused == "text" else 1
        use[other] &= ~(has[0] & has[1])
        ends = packing.image.count, packing.image.count + packing.fused_image.count
        alone, pairs, texts = slice(0, ends[0]), slice(*ends), slice(ends[1], None)
        parts = ((0, alone), (0, pairs), (1, pairs), (1, texts))
        rows = np.concatenate([packing.first_rows[part, which][use[part, which]] for part, which in parts])
        kept = (Segments.of(use[part, which].astype(int)) for part, which in parts)
        return Read(upload_index(rows, device), Packing(*kept))
