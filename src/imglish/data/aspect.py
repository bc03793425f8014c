"""Pictures that keep their shape: resized by their shorter side, cut into patches (ViLT, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from imglish.data.images import CACHE_MARGIN, ImageTransform
from imglish.data.patches import Patches, cut_pixels


@dataclass(frozen=True)
class AspectTransform:
    """From a picture of any shape to pixels and :class:`Patches`, without padding and (but for ``crop_scale``) whole.

    The shorter side becomes ``size`` pixels, the longer side at most ``longest``; then both are rounded down to
    multiples of ``patch``, so the shape changes by less than a patch. A strip that is too thin for this keeps one
    patch across. most: patches of a picture that stay in training, drawn anew each time (None: all). crop_scale: in
    training, a random part with that share of the area, in the shape that it has.
    """

    size: int
    longest: int
    patch: int
    most: int | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop_scale: tuple[float, float] | None = None
    flip: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.patch <= self.size <= self.longest:
            raise ValueError(f"patch {self.patch}, size {self.size}, longest {self.longest}: none may exceed the next")
        if self.most is not None and self.most < 1:
            raise ValueError(f"{self.most} patches of a picture")

    @property
    def cache_size(self) -> int:
        """Side at which a picture is kept, squashed, in memory between epochs: no less detail than the longer side."""
        return self.longest if self.crop_scale is None else int(np.ceil(self.longest * CACHE_MARGIN))

    def shape(self, width: float, height: float) -> tuple[int, int]:
        """Pixels (down, across) of a picture or part of ``width`` x ``height``."""
        scale = min(self.size / min(width, height), self.longest / max(width, height))
        down, across = (int(int(side * scale + 0.5) // self.patch) for side in (height, width))
        return max(down, 1) * self.patch, max(across, 1) * self.patch

    def least(self, width: int, height: int, rng: np.random.Generator | None) -> tuple[float, float]:
        """Size of a whole picture at which the part that ``rng`` chooses has the pixels that it is resized to."""
        left, upper, right, lower = self._part.box(width, height, rng)
        down, across = self.shape(right - left, lower - upper)
        return across * width / (right - left), down * height / (lower - upper)

    def __call__(
        self,
        image: Image.Image,
        rng: np.random.Generator | None = None,
        *,
        may_flip: bool = True,
        original: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """uint8 ``(H, W, 3)``, to be augmented and :meth:`cut`. rng makes the random choices, else there are none;
        original: (width, height) of the picture before it was squashed into ``image`` (from a cache) or decoded at a
        reduced size."""
        width, height = original or image.size
        left, upper, right, lower = self._part.box(width, height, rng)
        down, across = self.shape(right - left, lower - upper)
        x, y = image.width / width, image.height / height
        box = (left * x, upper * y, min(right * x, image.width), min(lower * y, image.height))
        pixels = np.asarray(image.resize((across, down), Image.Resampling[self.interpolation.upper()], box=box))
        if self.flip and may_flip and rng is not None and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels)

    def cut(self, pixels: np.ndarray, rng: np.random.Generator | None = None) -> Patches:
        """The transformed picture as patches, of which ``rng`` draws those that stay."""
        return cut_pixels(pixels, self.patch, self.most, rng)

    def squashed(self, image: Image.Image) -> np.ndarray:
        """The whole picture for the cache, uint8 ``(side, side, 3)``."""
        side = self.cache_size
        return np.asarray(image.resize((side, side), Image.Resampling[self.interpolation.upper()]))

    @property
    def _part(self) -> ImageTransform:
        """Chooses the part, as for square pictures."""
        return ImageTransform(self.size, crop_scale=self.crop_scale)
