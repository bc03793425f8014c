"""One picture of a source, read once: its content's digest, its pixels for the model, its thumbnail, what it tells."""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from imglish.data.errors import Problem
from imglish.data.images import FORMATS, ImageError, decode_sized
from imglish.data.pictures import Picture, picture_of
from imglish.data.records import ImageSource, Record
from imglish.search.duplicates import perceptual_hash
from imglish.search.originals import place_of
from imglish.search.store import Row

QUALITY = 87  # of thumbnails
_DATE = re.compile(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)")
_EXIF, _TAKEN, _CHANGED = ExifTags.IFD.Exif, 36867, 306


@dataclass(frozen=True)
class Reading:
    """A picture ready to be encoded. row: without vector and tokens; pixels: for the model, None where ``same`` says
    which row of the index has the same content; seconds: of this thread's processor time."""

    row: Row
    pixels: Picture | None
    same: str | None
    seconds: float


def read_picture(
    record: Record, key: str, source: str, stamp: str, transform: Any, thumbnail: int, known: Collection[str]
) -> Reading | Problem:
    """Read the picture of ``record``, to be called ``key``; what is wrong with it where that fails.

    known: digests that the index holds, whose pictures are not decoded; thumbnail: longest side, 0 for none.
    """
    began = time.thread_time()
    try:
        data = _content(record.image, key)
        digest = _digest(data)
        tags = tuple(part for part in record.group.split("/") if part)
        row = Row(key, digest=digest, stamp=stamp, place=place_of(record.image), source=source)
        row = replace(row, captions=record.captions, tags=tags)
        if digest in known:
            return Reading(row, None, digest, time.thread_time() - began)
        least = max(thumbnail, getattr(transform, "size", 0)) or None
        picture, (width, height) = decode_sized(data, least, name=key)
        pixels = picture_of(_transformed(transform, picture, (width, height)), transform)
        row = replace(
            row,
            width=width,
            height=height,
            date=_date(data) if isinstance(data, bytes) else "",
            phash=perceptual_hash(picture),
            thumbnail=make_thumbnail(picture, thumbnail) if thumbnail else b"",
        )
    except ImageError as error:
        return Problem(key, error.reason, str(error))
    return Reading(row, pixels, None, time.thread_time() - began)


def _transformed(transform: Any, picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    pixels: np.ndarray = transform(picture, original=size) if picture.size != size else transform(picture)
    return pixels


def make_thumbnail(picture: Image.Image, side: int) -> bytes:
    """A JPEG whose longest side is at most ``side``, without any of the original's metadata."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    small.info.clear()
    out = io.BytesIO()
    small.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def _content(source: ImageSource | None, key: str) -> bytes | Image.Image:
    try:
        found = source.read_bytes() if isinstance(source, Path) else source() if callable(source) else source
    except FileNotFoundError as error:
        raise ImageError(f"{key}: the picture does not exist", "missing") from error
    except OSError as error:
        raise ImageError(f"{key}: cannot be read: {error.strerror or error}", "not readable") from error
    if found is None:
        raise ImageError(f"{key}: the record has no picture", "missing")
    return found


def _digest(data: bytes | Image.Image) -> str:
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()[:32]
    pixels = np.asarray(data)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:32]


def _date(data: bytes) -> str:
    """When the picture was taken, as its EXIF block says; "" where it does not."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            exif = image.getexif()
            said = exif.get_ifd(_EXIF).get(_TAKEN) or exif.get(_CHANGED)
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, RuntimeError, Image.DecompressionBombError):
        return ""
    found = _DATE.match(said) if isinstance(said, str) else None
    if found is None or found.group(1) == "0000":
        return ""
    year, month, day, hour, minute, second = found.groups()
    return f"{year}-{month}-{day}T{hour}:{minute}:{second}"
