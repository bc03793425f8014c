"""Pictures whose data end before the picture does and that Pillow fills up without a word.

A file that is cut off is refused by Pillow. It does not notice a PNG or TIFF that has fewer rows than its header says
(what is missing stays zero: black, or the first colour of the palette), nor such a JPEG, nor one that was cut off and
then ended properly (what is missing is grey, of value 128). Most pictures do not end in such colours, so one look at
their last pixels is enough. The others are decoded once more in a way that changes what the data do not say.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator

from PIL import Image

JPEGS = ("JPEG", "MPO")
ZEROED = ("PNG", "TIFF")
_MORE = bytes((41 * n * n + 7 * n + 3) % 251 for n in range(64))  # image data for a decoder that still wants some
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # within image data; those between are a part of them


def is_incomplete(image: Image.Image, data: bytes, scale: int = 1) -> bool:
    """Whether pixels of ``image``, which was loaded from ``data``, are none of the data's.

    image: as Pillow gave it, before any conversion; scale: the reduction that a JPEG was decoded with (``draft``).
    Blind to scans that a progressive JPEG lacks as a whole, which make it coarse, and to less than a row of blocks
    where these happen to be grey.
    """
    if image.format in JPEGS:
        last = image.getpixel((image.width - 1, image.height - 1))
        values = last if isinstance(last, tuple) else (last,)
        return all(value in (127, 128) for value in values) and _differs_with_more(image, data, scale)
    return image.format in ZEROED and _has_zero_rows(image) and _differs_on_white(image, data)


def _has_zero_rows(image: Image.Image) -> bool:
    """Of the last two rows; the last alone may come early in an interlaced PNG."""
    rows = (image.crop((0, y, image.width, y + 1)).tobytes() for y in range(max(image.height - 2, 0), image.height))
    return any(not any(row) for row in rows)


def _differs_on_white(image: Image.Image, data: bytes) -> bool:
    """Whether pixels keep the colour of the memory that they are decoded into, zero before."""
    with Image.open(io.BytesIO(data), formats=ZEROED) as again:
        bands = len(again.getbands())
        again.im = Image.new(again.mode, again.size, 255 if bands == 1 else (255,) * bands).im
        again.load()
        return again.tobytes() != image.tobytes()


def _differs_with_more(image: Image.Image, data: bytes, scale: int) -> bool:
    """Whether further image data in its scans would change a JPEG. A complete one has no use for them."""
    ends = [0, *_ends_of_scans(data), len(data)]
    more = _MORE.join(data[start:end] for start, end in itertools.pairwise(ends))
    with Image.open(io.BytesIO(more), formats=("JPEG",)) as again:
        if scale > 1:
            again.draft("RGB", (again.width // scale, again.height // scale))
        again.load()
        return again.size != image.size or again.tobytes() != image.tobytes()


def _ends_of_scans(data: bytes) -> Iterator[int]:
    """Where the image data of each scan of the first picture in a JPEG file end."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xD9:
        if data[at + 1] == 0xFF:  # padding
            at += 1
            continue
        kind, at = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if kind == 0xDA:
            found = _MARKER.search(data, at)
            if found is None:
                return
            at = found.start()
            yield at
