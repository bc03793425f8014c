"""Block-wise masking of picture patches for masked image modelling (BEiT, Bao et al. 2022, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from imglish.data.batch import PatchMasks

ATTEMPTS = 10  # blocks tried in a row before a mask is left as it is


class Draws(Protocol):
    """What is asked of a source of random numbers; ``numpy.random.Generator`` is one. ``integers(n)``: below n."""

    def random(self) -> float: ...

    def integers(self, low: int, /) -> Any: ...


@dataclass(frozen=True)
class PatchMaskConfig:
    """ratio: share of the patches to be predicted (BEiT 75 of 196, BEiT-3 0.4); min_patches: of one block (BEiT 16);
    aspect: smallest ratio of a block's sides, the largest is its inverse."""

    ratio: float = 0.4
    min_patches: int = 16
    aspect: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"a share of {self.ratio} of the patches to be masked: it must lie between 0 and 1")
        if self.min_patches < 1:
            raise ValueError(f"a block of at least {self.min_patches} patches")
        if not 0 < self.aspect <= 1:
            raise ValueError(f"an aspect ratio of {self.aspect}: it must lie in 0..1")

    def draw(self, grid: tuple[int, int], rng: Draws) -> np.ndarray:
        """A mask for a picture of ``grid`` (rows, columns) patches, bool ``(rows, columns)``; one patch at least."""
        return block_mask(grid, max(1, round(self.ratio * grid[0] * grid[1])), rng, self.min_patches, self.aspect)


def block_mask(grid: tuple[int, int], count: int, rng: Draws, min_patches: int = 16, aspect: float = 0.3) -> np.ndarray:
    """Rectangles until ``count`` patches are covered: bool ``(rows, columns)``, True where a patch is to be predicted.

    A block has at least ``min_patches`` (where so many are still allowed: the last blocks are smaller) and sides in a
    ratio between ``aspect`` and its inverse; blocks may overlap. Never more than ``count`` patches are masked; where
    ten blocks in a row do not fit, fewer. An attempt draws the area, the logarithm of the ratio, the row, the column.
    """
    mask = np.zeros(grid, dtype=bool)
    left = count
    while left > 0 and (added := _add_block(mask, left, rng, min_patches, math.log(aspect))):
        left -= added
    return mask


def _add_block(mask: np.ndarray, allowed: int, rng: Draws, min_patches: int, log_aspect: float) -> int:
    """Cover one more block of at most ``allowed`` new patches, in place; returns how many are new, 0 for none."""
    rows, columns = mask.shape
    for _ in range(ATTEMPTS):
        area = min_patches + (allowed - min_patches) * rng.random()  # runs downwards near the end, as officially
        ratio = math.exp(log_aspect * (1 - 2 * rng.random()))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height >= rows or width >= columns:
            continue
        top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        block = mask[top : top + height, left : left + width]
        new = block.size - int(block.sum())
        if 0 < new <= allowed:
            block[...] = True
            return new
    return 0


def pack_patch_masks(masks: Sequence[np.ndarray]) -> PatchMasks | None:
    """Masks of several pictures, each bool ``(rows, columns)`` of one size -> the numbers of their masked patches;
    None for no masks."""
    if not masks:
        return None
    rows = np.flatnonzero(np.stack(masks))
    counts = tuple(int(mask.sum()) for mask in masks)
    return PatchMasks(torch.from_numpy(rows.astype(np.int64)), counts, masks[0].size)
