"""What keeps an index: rows of pictures with their vectors, behind one protocol for files and for servers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from imglish.search.filters import Filter


class StoreError(Exception):
    """An index that cannot be opened, read or written; the message names it, the cause, and what can be done."""


@dataclass(frozen=True)
class Row:
    """One picture.

    key: its name, unique in the index; vector: ``(E,)`` float16, L2-normalised; digest: of the content (hex); stamp:
    size and time of the file, or its place in a tar: equal stamps mean unchanged content; place: where the original can
    be read again (:mod:`imglish.search.originals`), "" where it cannot; source: what was indexed when it was added;
    date: ISO 8601 in the picture's own time, "" where unknown; width, height: of the original, upright; phash: 16 hex
    digits, "" for none; duplicate_of: the key of the first picture of which it is a
    duplicate, "" for that first one and where there is none; thumbnail: a JPEG, b""
    for none; tokens: for the fusion tower (:mod:`imglish.search.tokens`), b"" for none.
    """

    key: str
    vector: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float16), repr=False)
    digest: str = ""
    stamp: str = ""
    place: str = ""
    source: str = ""
    captions: tuple[str, ...] = ()
    date: str = ""
    tags: tuple[str, ...] = ()
    width: int = 0
    height: int = 0
    phash: str = ""
    duplicate_of: str = ""
    thumbnail: bytes = field(default=b"", repr=False)
    tokens: bytes = field(default=b"", repr=False)


COLUMNS = tuple(name for name in Row.__dataclass_fields__ if name != "vector")
CARD = ("key", "captions", "date", "tags", "width", "height", "duplicate_of")
"""What a list of results shows of a picture."""


@dataclass(frozen=True)
class Hit:
    """A picture that a search found. score: the dot product."""

    key: str
    score: float


@dataclass(frozen=True)
class StoreInfo:
    """url: as it was opened; engine: its name and version; version: of the data, rises with every change; rows: how
    many; size: bytes on this machine's disk, None for a server; recall: how a search finds its candidates now."""

    url: str
    engine: str
    version: int
    rows: int
    dimension: int
    size: int | None
    recall: str


class Store(Protocol):
    """Rows by key, and the nearest of them by dot product.

    Rows are whole or not there, also after a kill. In a folder this holds for all rows of a change together, and
    readers see one version at a time while another process writes. All methods raise :class:`StoreError`.
    """

    url: str
    dimension: int

    @property
    def version(self) -> int:
        """Number of the newest version; another one means that the data have changed."""
        ...

    def upsert(self, rows: Sequence[Row]) -> None:
        """Add rows; a row whose key is there replaces it. Keys within ``rows`` must differ."""
        ...

    def delete(self, keys: Collection[str]) -> None:
        """Take out rows; keys that are not there do not matter."""
        ...

    def mark_duplicates(self, first: dict[str, str]) -> None:
        """Set the column ``duplicate_of`` of the rows with these keys."""
        ...

    def search(self, vectors: np.ndarray, k: int, where: Filter | None = None, exact: bool = False) -> list[list[Hit]]:
        """The ``k`` nearest rows of each of the ``vectors`` ``(Q, E)`` float32 among those that ``where`` accepts, best
        first, ties by key. exact: compare with all of them, whatever it costs."""
        ...

    def get(self, keys: Collection[str], columns: Sequence[str] = CARD, vectors: bool = False) -> dict[str, Row]:
        """The rows with these keys, those that are there; columns that are not asked for are empty."""
        ...

    def scan(self, columns: Sequence[str], vectors: bool = False, where: Filter | None = None) -> Iterator[list[Row]]:
        """All rows of one version, in blocks; columns that are not asked for are empty."""
        ...

    def count(self, where: Filter | None = None) -> int: ...

    def info(self) -> StoreInfo: ...

    def optimize(self) -> None:
        """Put the data in order after many changes; beyond the rows that are searched exactly, build the index for
        approximate search. Minutes for millions of rows; readers and their results are not disturbed."""
        ...

    def writing(self, wait: float = 0.0) -> AbstractContextManager[None]:
        """The right to write, held while the block runs. One that is taken is waited for ``wait`` seconds, then refused
        with a message that says who holds it. It ends with its process, also when that is killed (on a server half a
        minute later)."""
        ...

    def note(self, name: str) -> str | None:
        """A text kept with the data (the manifest), None if there is none."""
        ...

    def set_note(self, name: str, text: str) -> None: ...

    def close(self) -> None: ...


def open_store(url: str, dimension: int | None = None) -> Store:
    """The store at ``url``: a folder or a URL of object storage (LanceDB), or ``qdrant+http://HOST:PORT/NAME``.

    dimension: of the vectors; given, a store that is not there is made, else that is a :class:`StoreError`.
    """
    if url.startswith("qdrant+"):
        from imglish.search.qdrant import QdrantStore

        return QdrantStore.open(url, dimension)
    from imglish.search.lance import LanceStore

    return LanceStore.open(url, dimension)


def missing_extra(name: str, package: str) -> StoreError:
    """The error for a library of an extra that is not installed."""
    return StoreError(f'this needs {package}, which is not installed: pip install "imglish[{name}]"')
