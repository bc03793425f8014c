"""Pictures: safe decoding, and transforms to square uint8 arrays. Normalisation is the model's, on its device."""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from imglish.data.incomplete import JPEGS, is_incomplete
from imglish.data.records import ImageSource

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
MAX_FILE = 512 * 2**20  # bytes
MAX_SCANS = 200  # of a progressive JPEG, each of which decodes the whole picture once more; usual are 10
CACHE_MARGIN = 1.25  # pictures are kept this much larger than the crop, so that random crops stay real
Detail = Literal["full", "good", "fast"]
Reason = Literal[
    "missing",
    "not readable",
    "outside",
    "empty",
    "not a picture",
    "too large",
    "truncated",
    "damaged",
    "unknown colours",
]
Least = int | Callable[[int, int], tuple[float, float]]
# How many times the wanted side a JPEG decoded at 1/8, 1/4, 1/2 must have. One half at 1.5 times differs less from the
# whole (1.9 of 255 on COCO's photographs) than one quarter at twice (2.3): benchmarks/decode.py.
_LEAST = {"good": {8: 2.0, 4: 2.0, 2: 1.5}, "fast": {8: 1.0, 4: 1.0, 2: 1.0}}
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's plug-ins raise on damaged and hostile bytes (tests/data/test_decode.py mutates thousands of files).
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)


class ImageError(ValueError):
    """A picture that is missing, broken or too large. The message begins with its name; ``reason`` is one of a few
    words, for counting."""

    def __init__(self, message: str, reason: Reason = "damaged") -> None:
        super().__init__(message)
        self.reason: Reason = reason


def decode(
    source: ImageSource | Image.Image | None,
    shrink_to: Least | None = None,
    *,
    detail: Detail = "good",
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """The picture as RGB, upright (EXIF), transparency on white, first frame only; see :func:`decode_sized`."""
    return decode_sized(source, shrink_to, detail=detail, name=name, max_pixels=max_pixels)[0]


def decode_sized(
    source: ImageSource | Image.Image | None,
    shrink_to: Least | None = None,
    *,
    detail: Detail = "good",
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Image.Image, tuple[int, int]]:
    """The picture as RGB, upright (EXIF), transparency on white, first frame only; and its own (width, height), which
    are larger than those of the picture where a JPEG was decoded at a reduced size.

    shrink_to: the side that the picture will be resized to, or a function from its (width, height) to the size of the
    whole that is wanted (where only a part of it is used). A JPEG is then decoded (``draft``) at the smallest of 1/1,
    1/2, 1/4, 1/8 that is at least 1.5 times (one half) or twice (smaller ones) that, twice as fast as in full. detail:
    ``"fast"`` is content with once that size, ``"full"`` never reduces. None decodes in full, for evaluation.
    name: how messages call it (default: the path). The number of pixels is checked on the header, before decoding.

    16-bit grey keeps its upper 8 bits; CMYK, palettes and grey become RGB. Raises :class:`ImageError`.
    """
    name = name or (str(source) if isinstance(source, Path) else type(source).__name__)
    try:
        if callable(source):
            source = source()
        if source is None:
            raise ImageError(f"{name}: the record has no picture", "missing")
        if isinstance(source, Image.Image):
            image = _rgb(source, name)
            return image, image.size
        data = _content(source, name)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, data, name, max_pixels)
            orientation = _orientation(image)
            sideways = orientation in (5, 6, 7, 8)
            width, height = image.size[::-1] if sideways else image.size
            scale = 1
            if shrink_to is not None and detail != "full" and image.format in JPEGS:
                across, down = (shrink_to, shrink_to) if isinstance(shrink_to, int) else shrink_to(width, height)
                scale = _scale(width / across, height / down, detail)
                image.draft("RGB", (image.width // scale, image.height // scale))
            image.load()
            if is_incomplete(image, data, scale):
                raise ImageError(
                    f"{name}: the data end before the picture of {width}x{height} pixels does", "truncated"
                )
            rgb = _rgb(image, name)
            return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb, (width, height)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}", "too large") from error
    except FileNotFoundError as error:
        raise ImageError(f"{name}: the picture does not exist", "missing") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: cannot be read as a picture: it does not begin like {', '.join(FORMATS)}", "not a picture"
        ) from error
    except _DAMAGE as error:
        why = str(error) or type(error).__name__
        raise ImageError(f"{name}: cannot be read as a picture: {why}", _reason(error)) from error


def _reason(error: Exception) -> Reason:
    if isinstance(error, OSError) and error.errno is not None:  # of the system, not of Pillow
        return "not readable"
    return "truncated" if isinstance(error, EOFError) or "truncated" in str(error) else "damaged"


def _content(source: Path | bytes, name: str) -> bytes:
    """The bytes of a picture. A pipe or a device would wait for ever, so only regular files are opened."""
    if isinstance(source, Path):
        found = os.stat(source)
        if not stat.S_ISREG(found.st_mode):
            raise ImageError(f"{name}: cannot be read as a picture: it is not a file", "not a picture")
        if found.st_size > MAX_FILE:
            raise ImageError(f"{name}: the file is larger than {MAX_FILE >> 20} MiB", "too large")
        source = source.read_bytes()
    if not source:
        raise ImageError(f"{name}: cannot be read as a picture: it is empty", "empty")
    return source


def _check_size(image: Image.Image, data: bytes, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width}x{height} pixels are more than the limit of {max_pixels:,}", "too large")
    if image.format in JPEGS and data.count(b"\xff\xda") > MAX_SCANS:
        raise ImageError(f"{name}: a JPEG of more than {MAX_SCANS} scans", "too large")


def _scale(across: float, down: float, detail: Literal["good", "fast"]) -> int:
    """The reduction of a JPEG that is ``across`` and ``down`` times as wide and high as what is wanted of it."""
    return next((n for n, least in _LEAST[detail].items() if min(across, down) / n >= least), 1)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or the EXIF block is damaged, as viewers have it."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:
        return 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**16:
            raise ImageError(f"{name}: grey values of 32 bits, whose range is not known", "unknown colours")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name}: floating grey values, whose range is not known", "unknown colours")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageTransform:
    """From a picture to uint8 ``(size, size, 3)``.

    Without ``crop_scale`` (evaluation): ``resize="squash"`` brings the whole picture to the square (ALBEF, BLIP), or
    ``"center"`` resizes the shorter side and cuts out the centre (CLIP); ``centre`` is the share of both sides, or of
    the shorter one, that stays. With ``crop_scale`` (training): a random part with that share of the area and with
    sides in a ratio within ``crop_ratio``, resized (Szegedy et al. 2015). flip: mirrors half of the pictures, where the
    caller allows it.
    """

    size: int
    resize: Literal["squash", "center"] = "squash"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    centre: float = 1.0
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
            across = down = min(width, height) * self.centre
        else:
            across, down = width * self.centre, height * self.centre
        left, upper = (width - across) / 2, (height - down) / 2
        return left, upper, left + across, upper + down

    def least(self, width: int, height: int, rng: np.random.Generator | None) -> tuple[float, float]:
        """Size of a whole picture at which the part that ``rng`` chooses has ``size`` pixels a side."""
        left, upper, right, lower = self.box(width, height, rng)
        return self.size * width / (right - left), self.size * height / (lower - upper)

    def __call__(
        self,
        image: Image.Image,
        rng: np.random.Generator | None = None,
        *,
        may_flip: bool = True,
        original: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """uint8 ``(size, size, 3)``. rng makes the random choices; without it there are none.

        original: (width, height) of the picture before it was squashed into ``image`` (from a cache) or decoded at a
        reduced size; crops are chosen in its geometry, so that they depend on neither.
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
