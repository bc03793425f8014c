"""How a picture enters ViLT's Transformer: patches of a picture of any shape (ViLT, section 3.1), or the regions of an
object detector (UNITER, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from imglish.data.aspect import AspectTransform
from imglish.data.patches import PatchBatch
from imglish.data.pictures import Pictures
from imglish.data.regions import RegionBatch
from imglish.models.vit import check_channels
from imglish.nn.embed import PatchEmbed, grid_positions
from imglish.nn.segments import Ragged, Segments, upload_index


@dataclass(frozen=True)
class AspectInput:
    """Pictures that keep their shape: shorter side ``size`` pixels, longer side at most ``longest`` (800 : 1333, as in
    detection), both multiples of ``patch``. At 384, 639 and 32 that is at most 12 x 19 = 228 patches.

    most: patches of a picture that a training step sees, drawn anew each time (published: 200); None: all.
    """

    size: int = 384
    longest: int = 639
    patch: int = 32
    most: int | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.size % self.patch:
            raise ValueError(f"image size {self.size} is not a multiple of patch size {self.patch}")
        check_channels(self.mean, self.std)

    def transform(self, crop_scale: tuple[float, float] | None = None, flip: bool = False) -> AspectTransform:
        """How a picture becomes such input; without ``crop_scale`` and ``flip`` as in evaluation."""
        return AspectTransform(self.size, self.longest, self.patch, self.most, crop_scale=crop_scale, flip=flip)

    def build(self, width: int, dropout: float, norm_eps: float) -> PatchRows:
        return PatchRows(self, width, dropout)


@dataclass(frozen=True)
class RegionInput:
    """Boxes with ``features`` numbers each, from a region file (:mod:`imglish.data.regions`); no pixels are read."""

    features: int = 2048

    def transform(self, crop_scale: tuple[float, float] | None = None, flip: bool = False) -> None:
        """Nothing to do with pixels."""

    def build(self, width: int, dropout: float, norm_eps: float) -> RegionRows:
        return RegionRows(self, width, dropout, norm_eps)


class PatchRows(nn.Module):
    """A class token and linear embeddings of the patches, each with its place in a learned grid that is stretched over
    the picture. ``leading``: rows of a picture that are no patch."""

    leading = 1

    def __init__(self, config: AspectInput, width: int, dropout: float) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config.patch, width, config.mean, config.std)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(1 + (config.size // config.patch) ** 2, width))
        self.dropout = nn.Dropout(dropout)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, pictures: Pictures) -> Ragged:
        """Patches (or squares ``(B, 3, H, W)``, which are cut here) -> rows ``(T + B, D)``, class token first."""
        if isinstance(pictures, Tensor):
            pictures = PatchBatch.cut(pictures, self.patch_embed.patch)
        if isinstance(pictures, RegionBatch):
            raise TypeError("this model reads pixels, not the regions of a detector")
        patches = self.patch_embed.rows(pictures.pixels) + grid_positions(self.positions[1:], pictures)
        first = (self.class_token + self.positions[0]).to(patches.dtype).expand(len(pictures), -1)
        pieces = Segments.equal(len(pictures), 1) + pictures.segments
        order = [piece for b in range(len(pictures)) for piece in (b, len(pictures) + b)]
        rows = torch.cat([first, patches])[upload_index(pieces.rows_of(order), patches.device)]
        return Ragged(self.dropout(rows), Segments.of(1 + n for n in pictures.segments.lengths))


class RegionRows(nn.Module):
    """Sum of a linear embedding of a region's features and one of its box, each normalised, then normalised again."""

    leading = 0

    def __init__(self, config: RegionInput, width: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.features = nn.Linear(config.features, width)
        self.features_norm = nn.LayerNorm(width, eps=norm_eps)
        self.places = nn.Linear(7, width)
        self.places_norm = nn.LayerNorm(width, eps=norm_eps)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pictures: Pictures) -> Ragged:
        """Regions -> rows ``(R, D)``."""
        if not isinstance(pictures, RegionBatch):
            raise TypeError("this model reads the regions of a detector, not pixels")
        left, upper, right, lower = pictures.boxes.unbind(1)
        across, down = right - left, lower - upper
        places = torch.stack([left, upper, right, lower, across, down, across * down], dim=1)
        features = pictures.features.to(self.features.weight.dtype)
        rows = self.features_norm(self.features(features)) + self.places_norm(self.places(places))
        return Ragged(self.dropout(self.norm(rows)), pictures.segments)


def neighbours(count: int) -> np.ndarray:
    """For each picture of a batch another one that may stand in its place: pairs of neighbours exchange theirs.

    The order of an epoch is a random permutation, so the neighbour is a random other picture of the data set, and
    a batch that is divided into parts of even size has the same neighbours.
    """
    other = np.arange(count) ^ 1
    return np.where(other < count, other, max(count - 2, 0))
