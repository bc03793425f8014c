"""Image-caption records. :mod:`imglish.data.sources` reads them from files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ImageSource = Path | bytes | Callable[[], Image.Image | bytes]
"""Where a picture comes from: a file, the bytes of one, or a function (picklable, for loader workers) that gives a
picture or the bytes of its file."""


@dataclass(frozen=True)
class Record:
    """One picture with its captions; either may be missing (None, no captions) where a job needs only the other.

    key: its name in messages and results; image_id: equal for records that show the same picture.
    swapped: optionally, for each caption, one that is false for this picture (a hard negative known beforehand).
    group: optionally, a label that pictures of one thing share (a product, a place), for picture-to-picture search.
    """

    key: str
    image: ImageSource | None
    captions: tuple[str, ...]
    image_id: int
    swapped: tuple[str, ...] = ()
    group: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.captions, str):
            raise TypeError(f"{self.key}: captions must be a tuple of strings, not one string")
        if self.swapped and len(self.swapped) != len(self.captions):
            raise ValueError(f"{self.key}: {len(self.swapped)} swapped captions for {len(self.captions)} captions")
