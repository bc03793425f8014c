"""Pictures in and out: uploads are decoded under limits, what goes out is drawn anew."""

from __future__ import annotations

import io

from PIL import Image

from imglish.data.images import ImageError, decode
from imglish.search import Index

LARGE = 2048  # longest side of the large picture
SMALL = 512  # of one in the grid, where the index holds none
QUERY = 1024  # of a query's picture that waits in the queue


def uploaded(data: bytes, pixels: int) -> Image.Image:
    """A query's picture, RGB, at most :data:`QUERY` a side. Raises :class:`ImageError`."""
    image = decode(data, QUERY, name="the picture that was sent", max_pixels=pixels)
    return _within(image, QUERY)


def large(index: Index, key: str, pixels: int) -> bytes:
    """A JPEG of the original without its metadata (which may tell where it was taken); where the original cannot be
    read any more, the index's small one. Raises ``KeyError``, :class:`ImageError` where there is neither."""
    try:
        return _original(index, key, LARGE, pixels)
    except ImageError:
        kept = index.thumbnail(key)
        if not kept:
            raise
        return kept


def small(index: Index, key: str, pixels: int) -> bytes:
    """The JPEG of the index; without one it is made of the original. Raises as :func:`large`."""
    return index.thumbnail(key) or _original(index, key, SMALL, pixels)


def _original(index: Index, key: str, side: int, pixels: int) -> bytes:
    return _jpeg(_within(decode(index.original(key), side, name=key, max_pixels=pixels), side))


def _within(image: Image.Image, side: int) -> Image.Image:
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return image


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
