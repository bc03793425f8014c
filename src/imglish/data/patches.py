"""Pictures of any size as patches: a row a patch, so that a batch of several sizes holds no padding.

Cutting happens on the host, where the size of a picture is known: the model never looks for the end of a picture, and
patches that are left out (ViLT, section 3.1, "max_image_len") never travel to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from imglish.nn.segments import Segments


@dataclass(frozen=True)
class Patches:
    """One picture. pixels: ``(n, 3, p, p)`` uint8, or normalised floats; grid: patches (down, across) of the whole
    picture; kept: the numbers of the n patches in that grid, row by row, rising (None: all of them)."""

    pixels: Tensor
    grid: tuple[int, int]
    kept: np.ndarray | None = None


@dataclass(frozen=True)
class PatchBatch:
    """B pictures of any sizes, patch behind patch: pixels ``(T, 3, p, p)``; grids, kept: of each, as in Patches."""

    pixels: Tensor
    grids: tuple[tuple[int, int], ...]
    kept: tuple[np.ndarray | None, ...]

    @staticmethod
    def of(pictures: Sequence[Patches]) -> PatchBatch:
        pixels = torch.cat([picture.pixels for picture in pictures])
        return PatchBatch(pixels, tuple(p.grid for p in pictures), tuple(p.kept for p in pictures))

    @staticmethod
    def cut(images: Tensor, patch: int) -> PatchBatch:
        """Pictures of one size ``(B, 3, H, W)``, uint8 or normalised, on their device; a remainder at the right and
        lower edge is an error."""
        if images.shape[2] % patch or images.shape[3] % patch:
            size = tuple(images.shape[2:])
            raise ValueError(f"pictures of {size} pixels do not divide into {patch}-pixel patches")
        grid = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B 3 h p w p
        down, across = grid.shape[2], grid.shape[4]
        pixels = grid.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return PatchBatch(pixels, ((down, across),) * len(images), (None,) * len(images))

    @cached_property
    def segments(self) -> Segments:
        """How many patches each picture has."""
        return Segments.of(
            h * w if kept is None else len(kept) for (h, w), kept in zip(self.grids, self.kept, strict=True)
        )

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, some: slice) -> PatchBatch:
        """Consecutive pictures, as a view."""
        first, last, _ = some.indices(len(self))
        rows = slice(int(self.segments.bounds[first]), int(self.segments.bounds[max(first, last)]))
        return PatchBatch(self.pixels[rows], self.grids[some], self.kept[some])

    def map(self, move: Callable[[Tensor], Tensor]) -> PatchBatch:
        return PatchBatch(move(self.pixels), self.grids, self.kept)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PatchBatch:
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each patch lies in its picture, as (down, across) in 0..1: the centres of the corner patches are 0 and
        1, float64 ``(T,)`` each. In a single row or column the place is 0."""
        down, across = [], []
        for (h, w), kept in zip(self.grids, self.kept, strict=True):
            numbers = np.arange(h * w) if kept is None else kept
            down.append(numbers // w / max(h - 1, 1))
            across.append(numbers % w / max(w - 1, 1))
        return np.concatenate(down), np.concatenate(across)


def cut_pixels(
    pixels: np.ndarray, patch: int, most: int | None = None, rng: np.random.Generator | None = None
) -> Patches:
    """A picture uint8 ``(H, W, 3)``, sides multiples of ``patch``, as patches.

    most: of a picture with more patches, this many stay, drawn by ``rng`` without replacement; without ``rng`` all.
    """
    grid = pixels.shape[0] // patch, pixels.shape[1] // patch
    cut = pixels.reshape(grid[0], patch, grid[1], patch, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, patch, patch)
    total, kept = grid[0] * grid[1], None
    if most is not None and total > most and rng is not None:
        kept = np.sort(rng.choice(total, most, replace=False))
        cut = cut[kept]
    return Patches(torch.from_numpy(np.ascontiguousarray(cut)), grid, kept)
