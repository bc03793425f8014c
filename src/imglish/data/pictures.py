"""The forms in which pictures reach a model: squares of one size, patches of any size, regions of a detector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from imglish.data.aspect import AspectTransform
from imglish.data.images import ImageTransform
from imglish.data.patches import PatchBatch, Patches
from imglish.data.regions import RegionBatch, Regions

Picture = np.ndarray | Tensor | Patches | Regions
"""One picture: an array ``(H, W, 3)`` uint8, a tensor ``(3, H, W)`` uint8 or floating, patches, or regions."""

Pictures = Tensor | PatchBatch | RegionBatch
"""B pictures: ``(B, 3, H, W)``, packed patches, or packed regions. All have ``len``, slices and ``to``."""


def picture_of(
    pixels: np.ndarray, transform: ImageTransform | AspectTransform, rng: np.random.Generator | None = None
) -> Tensor | Patches:
    """What ``transform`` made, uint8 ``(H, W, 3)``, in the form that the model takes: ``(3, H, W)`` or patches.

    rng: where a transform keeps only some patches, draws them.
    """
    if isinstance(transform, AspectTransform):
        return transform.cut(pixels, rng)
    return torch.tensor(pixels).permute(2, 0, 1).contiguous()


def stack(pictures: Sequence[Picture]) -> Pictures:
    """Pictures of one form as a batch; tensors must have one size."""
    patches = [picture for picture in pictures if isinstance(picture, Patches)]
    regions = [picture for picture in pictures if isinstance(picture, Regions)]
    tensors = [picture for picture in pictures if isinstance(picture, Tensor)]
    arrays = [picture for picture in pictures if isinstance(picture, np.ndarray)]
    if max(len(patches), len(regions), len(tensors), len(arrays)) < len(pictures):
        raise TypeError("pictures of different forms do not make a batch")
    if arrays:
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    if patches:
        return PatchBatch.of(patches)
    return RegionBatch.of(regions) if regions else torch.stack(tensors)
