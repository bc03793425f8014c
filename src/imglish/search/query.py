"""What is searched for, checked once; the same for Python, the command and the server."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from imglish.api import Picture
from imglish.search.filters import Filter, parse


@dataclass(frozen=True)
class Query:
    """A text, a picture, or both together.

    not_text: what the pictures should not show; k, offset: which page; rerank: how many of the towers' first the fusion
    tower orders by the text (0: none), they stand before all others; where: see :mod:`imglish.search.filters`;
    min_match: leave out pictures whose match probability is below; those that were not reranked are left out too;
    exact: no approximation in the recall of large indexes. Raises ``FilterError``, ``ValueError``.
    """

    text: str | None = None
    image: Picture | None = None
    not_text: str | None = None
    k: int = 20
    rerank: int = 40
    where: str | None = None
    min_match: float | None = None
    offset: int = 0
    exact: bool = False
    condition: Filter | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        for name in ("text", "not_text", "where"):
            object.__setattr__(self, name, (getattr(self, name) or "").strip() or None)
        if self.text is None and self.image is None:
            raise ValueError("nothing to search for: give a text, a picture, or both")
        if self.k < 1 or self.offset < 0 or self.rerank < 0:
            raise ValueError(
                f"k is {self.k}, offset {self.offset}, rerank {self.rerank}: expected k from 1, the others from 0"
            )
        if self.min_match is not None and not 0 <= self.min_match <= 1:
            raise ValueError(f"min_match is {self.min_match}: it is a probability, 0..1")
        object.__setattr__(self, "condition", parse(self.where))

    @property
    def texts(self) -> tuple[str, ...]:
        """The words, and those that the pictures should not show."""
        return tuple(text for text in (self.text, self.not_text) if text is not None)

    @property
    def name(self) -> Hashable:
        """What asks for the same vector has the same name."""
        return (self.text, _name(self.image) if self.image is not None else None, self.not_text)


def _name(picture: Picture) -> Hashable:
    """A file by its path, else by what it holds."""
    if isinstance(picture, (str, Path, bytes)):
        return picture
    if isinstance(picture, Image.Image):
        return (picture.size, picture.mode, blake2b(picture.tobytes()).digest())
    return id(picture)
