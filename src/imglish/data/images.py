"""Pictures: safe decoding, and transforms to square uint8 arrays. Normalisation is the model's, on its device."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from imglish.data.records import ImageSource

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
CACHE_MARGIN = 1.25  # pictures are kept this much larger than the crop, so that random crops stay real
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    Image.DecompressionBombError,
)  # of Pillow's plug-ins


class ImageError(ValueError):
    """A picture that is missing, broken or too large; the message begins with its name."""


def decode(
    source: ImageSource | Image.Image,
    shrink_to: int | None = None,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """The picture as RGB, upright (EXIF), transparency on white, first frame only.

    shrink_to: the side that it will be resized to; a JPEG may then be decoded at a reduced size of at least twice
    that (``draft``: 2-3 times as fast, mean error 0.5 of 255). None decodes in full, for evaluation.
    name: how messages call it (default: the path). The number of pixels is checked on the header, before decoding.

    Raises :class:`ImageError`.
    """
    name = name or (str(source) if isinstance(source, Path) else type(source).__name__)
    if callable(source):
        source = source()
    if isinstance(source, Image.Image):
        return _rgb(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{name}: {width}x{height} pixels are more than the limit of {max_pixels:,}")
            if shrink_to is not None:
                image.draft("RGB", (2 * shrink_to, 2 * shrink_to))
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name}: the picture does not exist") from error
    except _UNREADABLE as error:
        raise ImageError(f"{name}: cannot be read as a picture: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageTransform:
    """From a picture to uint8 ``(size, size, 3)``.

    Without ``crop_scale`` (evaluation): ``resize="squash"`` brings the whole picture to the square (ALBEF, BLIP), or
    ``"center"`` resizes the shorter side and cuts out the centre (CLIP). With ``crop_scale`` (training): a random
    part with that share of the area and with sides in a ratio within ``crop_ratio``, resized (Szegedy et al. 2015).
    flip: mirrors half of the pictures, where the caller allows it.
    """

    size: int
    resize: Literal["squash", "center"] = "squash"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a picture of side {self.size}")
        for name, limits, most in (("crop_scale", self.crop_scale, 1.0), ("crop_ratio", self.crop_ratio, np.inf)):
            if limits is not None and not 0 < limits[0] <= limits[1] <= most:
                raise ValueError(f"{name} {limits}: expected 0 < low <= high <= {most}")

    @property
    def cache_size(self) -> int:
        """Side at which a picture is kept in memory between epochs."""
        return self.size if self.crop_scale is None else int(np.ceil(self.size * CACHE_MARGIN))

    def box(self, width: int, height: int, rng: np.random.Generator | None) -> tuple[float, float, float, float]:
        """The part of a picture that is used: left, upper, right, lower in pixels."""
        if self.crop_scale is not None and rng is not None:
            return _random_box(width, height, rng, self.crop_scale, self.crop_ratio)
        if self.resize == "center":
            side = min(width, height)
            left, upper = (width - side) / 2, (height - side) / 2
            return left, upper, left + side, upper + side
        return 0.0, 0.0, float(width), float(height)

    def __call__(
        self,
        image: Image.Image,
        rng: np.random.Generator | None = None,
        *,
        may_flip: bool = True,
        original: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """uint8 ``(size, size, 3)``. rng makes the random choices; without it there are none.

        original: (width, height) of the picture before it was squashed into ``image`` (from a cache); crops are
        chosen in its geometry, so that they do not depend on the cache.
        """
        width, height = original or image.size
        box = self.box(width, height, rng)
        if (width, height) != image.size:
            x, y = image.width / width, image.height / height
            box = (box[0] * x, box[1] * y, min(box[2] * x, image.width), min(box[3] * y, image.height))
        pixels = np.asarray(self._resized(image, box))
        if self.flip and may_flip and rng is not None and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels)

    def _resized(self, image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
        if image.size == (self.size, self.size) and box == (0, 0, self.size, self.size):
            return image
        return image.resize((self.size, self.size), _RESAMPLING[self.interpolation], box=box)

    def squashed(self, image: Image.Image) -> np.ndarray:
        """The whole picture at ``cache_size``, uint8 ``(side, side, 3)``."""
        side = self.cache_size
        if image.size != (side, side):
            image = image.resize((side, side), _RESAMPLING[self.interpolation])
        return np.asarray(image)


def _random_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[float, float, float, float]:
    """A random part by area and aspect ratio; where its shape does not fit, it is cut to the picture's sides."""
    area = width * height * rng.uniform(*scale)
    aspect = float(np.exp(rng.uniform(*np.log(ratio))))
    across, down = min((area * aspect) ** 0.5, width), min((area / aspect) ** 0.5, height)
    left, upper = rng.random() * (width - across), rng.random() * (height - down)
    return left, upper, min(left + across, width), min(upper + down, height)
