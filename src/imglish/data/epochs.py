"""Which items an epoch shows when the parts of a mixture have weights: exact, and from (seed, epoch) alone."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imglish.data.sources.base import Part

ROUNDS = 4  # of the Feistel network; four rounds of a good hash cannot be told from a random permutation


@dataclass(frozen=True)
class EpochItems:
    """The places of an epoch, and the item at each. Items are pictures or captions, numbered over all parts.

    A part of n items with weight w has ``k = round(w * n)`` places (at least one) in every epoch, so an epoch has as
    many places as the sum of them, always. The places of a part in all epochs are one endless row of passes: each pass
    shows every item of the part once, and epoch e takes the places ``e * k`` to ``(e + 1) * k`` of the row. So no item
    comes a second time before all others of its part have come, weight 2 shows everything twice an epoch, and weight
    1/2 shows one half in one epoch and the other half in the next. A pass that an epoch boundary divides goes in an
    order from (seed, part, pass).
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        for part in self.parts:
            if part.stop <= part.start:
                raise ValueError("a part of the mixture has no items")
            if not 0 < part.weight < float("inf"):
                raise ValueError(f"a part of the mixture has weight {part.weight}: expected a number above 0")

    @staticmethod
    def of(parts: Sequence[Part], starts: np.ndarray | None = None) -> EpochItems:
        """starts: first item of each record and the total, int64 ``(records + 1,)``; None: a record is an item."""
        if starts is not None:
            parts = [Part(int(starts[part.start]), int(starts[part.stop]), part.weight) for part in parts]
        return EpochItems(tuple(parts))

    def __len__(self) -> int:
        return sum(map(_places, self.parts))

    def item(self, seed: int, epoch: int, place: int) -> int:
        """The item at ``place`` in ``0 .. len - 1`` of ``epoch``."""
        for number, part in enumerate(self.parts):
            places, items = _places(part), part.stop - part.start
            if place >= places:
                place -= places
                continue
            if places % items == 0:  # whole passes every epoch
                return part.start + place % items
            turn, position = divmod(epoch * places + place, items)
            return part.start + scattered(position, items, (seed, number, turn))
        raise IndexError(f"place beyond the {len(self)} of an epoch")


def _places(part: Part) -> int:
    return max(1, round(part.weight * (part.stop - part.start)))


def scattered(position: int, count: int, key: tuple[int, int, int]) -> int:
    """Where ``position`` of ``0 .. count - 1`` goes in a permutation chosen by ``key``, without making the permutation.

    A Feistel network over the next even number of bits, repeated until the number falls below ``count`` (Black and
    Rogaway 2002, "cycle walking").
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    secret = struct.pack("<3q", *key)
    while True:
        left, right = position >> half, position & mask
        for turn in range(ROUNDS):
            hashed = hashlib.blake2b(struct.pack("<Bq", turn, right), digest_size=8, key=secret).digest()
            left, right = right, left ^ (int.from_bytes(hashed, "little") & mask)
        position = left << half | right
        if position < count:
            return position
