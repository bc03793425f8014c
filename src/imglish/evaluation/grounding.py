"""Where a text is in a picture: a heat map chooses among proposed boxes (RefCOCO), or points (the pointing game).

Boxes are ``(left, top, width, height)`` in pixels of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[float, float, float, float]


class GroundingError(ValueError):
    """Boxes or heat maps that cannot be used."""


@dataclass(frozen=True)
class Choice:
    """Which proposal a heat map chose, the scores of all, and its overlap with the true box."""

    chosen: int
    scores: tuple[float, ...]
    overlap: float

    @property
    def right(self) -> bool:
        """At least one half, as RefCOCO counts."""
        return self.overlap >= 0.5


def overlap(one: Sequence[float], other: Sequence[float], *, pixels: bool = False) -> float:
    """Intersection over union of two boxes.

    pixels: as MAttNet and ALBEF count, the last pixel of a box is inside of it, so that boxes that share one row or
    one column of pixels do not overlap; else boxes are continuous.
    """
    least = 1.0 if pixels else 0.0
    wide = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    high = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    inside = wide * high if wide > least and high > least else 0.0
    union = one[2] * one[3] + other[2] * other[3] - inside
    return inside / union if union > 0 else 0.0


def enlarge(heat_hw: Tensor, width: int, height: int) -> Tensor:
    """A heat map ``(h, w)`` in the size of its picture ``(height, width)``, bicubic."""
    if heat_hw.ndim != 2:
        raise GroundingError(f"a heat map has shape (h, w), not {tuple(heat_hw.shape)}")
    if not bool(heat_hw.isfinite().all()):
        raise GroundingError("a heat map holds a value that is not a number")
    return F.interpolate(heat_hw[None, None].float(), size=(height, width), mode="bicubic", align_corners=False)[0, 0]


def proposal_scores(heat_HW: Tensor, proposals: Sequence[Sequence[float]], alpha: float = 0.5) -> Tensor:
    """Score of each proposal ``(P,)``: the sum of the map inside, divided by its area to the power ``alpha``.

    alpha 0 prefers large boxes, 1 is the mean inside; ALBEF takes 0.5.
    """
    scores = []
    for left, top, width, height in proposals:
        if width <= 0 or height <= 0:
            raise GroundingError(f"a proposal of {width} by {height} pixels")
        inside = heat_HW[int(top) : int(top + height), int(left) : int(left + width)]
        scores.append(inside.sum() / (width * height) ** alpha)
    if not scores:
        raise GroundingError("there are no proposals")
    return torch.stack(scores)


def choose(
    heat_hw: Tensor,
    size: tuple[int, int],
    proposals: Sequence[Sequence[float]],
    truth: Sequence[float],
    alpha: float = 0.5,
) -> Choice:
    """The proposal with the highest score (the first of equal ones) and its overlap with ``truth``.

    size: (width, height) of the picture. Where no proposal has a positive score the official code keeps the box of the
    reference before; here the highest one is taken all the same.
    """
    scores = proposal_scores(enlarge(heat_hw, *size), proposals, alpha)
    best = int(scores.argmax())
    return Choice(best, tuple(scores.tolist()), overlap(proposals[best], truth, pixels=True))


def points_at(heat_hw: Tensor, size: tuple[int, int], boxes: Sequence[Sequence[float]], tolerance: float = 0.0) -> bool:
    """The pointing game (Zhang et al. 2016): is the highest point of the map inside of one of ``boxes``?

    size: (width, height); tolerance: pixels that a box is enlarged by on each side (15 in the original).
    """
    heat = enlarge(heat_hw, *size)
    y, x = divmod(int(heat.argmax()), heat.shape[1])
    across, down = x + 0.5, y + 0.5  # the centre of the pixel
    return any(
        left - tolerance <= across <= left + width + tolerance and top - tolerance <= down <= top + height + tolerance
        for left, top, width, height in boxes
    )
