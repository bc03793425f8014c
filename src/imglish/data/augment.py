"""RandAugment (Cubuk et al. 2020) as the papers of this family use it: without inverted colours and without cut-outs.

A caption may name a colour or a thing that would be cut out, so ViLT leaves those two operations out (section 4.5), and
ALBEF, BLIP, VLMo and BEiT-3 keep only operations that leave hues alone. Nothing here mirrors a picture: that is the
transform's, which knows whether a caption says left or right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

PolicyName = Literal["albef", "blip", "vilt"]

_NEUTRAL = (
    *("identity", "autocontrast", "equalize", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
)
_ALL_BUT_INVERT_AND_CUTOUT = (
    *("autocontrast", "equalize", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast"),
    *("brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)


@dataclass(frozen=True)
class AugmentPolicy:
    """Which operations, how many and how strong.

    count: operations drawn for a picture (one may come twice), each applied with ``chance``; magnitude: of ``levels``,
    where all of them is full strength; shift: full translation as a share of the side; fill: grey of what a shifted
    or turned picture leaves empty.
    """

    operations: tuple[str, ...]
    count: int
    magnitude: float
    levels: float
    chance: float
    shift: float
    fill: int

    def __post_init__(self) -> None:
        if unknown := set(self.operations) - set(OPERATIONS):
            raise ValueError(f"no such operation: {', '.join(sorted(unknown))}; known: {', '.join(OPERATIONS)}")
        if not 0 <= self.magnitude <= self.levels:
            raise ValueError(f"a magnitude of {self.magnitude}: this policy has 0..{self.levels:g}")

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 ``(H, W, 3)`` to the same shape; ``rng`` makes all choices."""
        image = Image.fromarray(pixels)
        drawn = rng.integers(len(self.operations), size=self.count)
        applied = rng.random(self.count) < self.chance
        opposite = rng.random(self.count) < 0.5
        for i in np.flatnonzero(applied):
            image = OPERATIONS[self.operations[drawn[i]]](image, self, -1.0 if opposite[i] else 1.0)
        return np.asarray(image)

    @property
    def strength(self) -> float:
        return self.magnitude / self.levels


def policy(name: PolicyName, magnitude: float | None = None) -> AugmentPolicy:
    """The policy of a paper, with its own or another magnitude.

    albef: two of ten at 7 of 10, each with chance 1/2 (also VLMo and BEiT-3); blip: the same at 5 of 10; vilt: two of
    fourteen at 9 of 30. The published shifts are 10 pixels at side 256 and 100 pixels at side 384.
    """
    if name == "vilt":
        return AugmentPolicy(_ALL_BUT_INVERT_AND_CUTOUT, 2, _or(magnitude, 9), 30, 1.0, 100 / 384, fill=0)
    return AugmentPolicy(_NEUTRAL, 2, _or(magnitude, 7 if name == "albef" else 5), 10, 0.5, 10 / 256, fill=128)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


Operation = Callable[[Image.Image, AugmentPolicy, float], Image.Image]


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """Factor 1 leaves a picture as it is; full strength is 1.9, none 0.1, as in the published code."""
    return lambda image, p, sign: kind(image).enhance(0.1 + 1.8 * p.strength)


def _moved(image: Image.Image, p: AugmentPolicy, matrix: tuple[float, ...]) -> Image.Image:
    grey = (p.fill,) * 3
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=grey)


def _rotated(image: Image.Image, p: AugmentPolicy, sign: float) -> Image.Image:
    return image.rotate(30 * p.strength * sign, Image.Resampling.BILINEAR, fillcolor=(p.fill,) * 3)


def _solarize_add(image: Image.Image, p: AugmentPolicy, sign: float) -> Image.Image:
    table = [min(value + int(110 * p.strength), 255) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, p, sign: image,
    "autocontrast": lambda image, p, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, p, sign: ImageOps.equalize(image),
    "posterize": lambda image, p, sign: ImageOps.posterize(image, max(int(4 * p.strength), 1)),
    "solarize": lambda image, p, sign: ImageOps.solarize(image, math.ceil(256 * p.strength)),
    "solarize_add": _solarize_add,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, p, sign: _moved(image, p, (1, 0.3 * p.strength * sign, 0, 0, 1, 0)),
    "shear_y": lambda image, p, sign: _moved(image, p, (1, 0, 0, 0.3 * p.strength * sign, 1, 0)),
    "translate_x": lambda image, p, sign: _moved(image, p, (1, 0, p.shift * p.strength * sign * image.width, 0, 1, 0)),
    "translate_y": lambda image, p, sign: _moved(image, p, (1, 0, 0, 0, 1, p.shift * p.strength * sign * image.height)),
    "rotate": _rotated,
}
