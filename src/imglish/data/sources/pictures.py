"""Where the pictures of a source are: files named in a column, or bytes within the rows of a text file."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from imglish.data.errors import Problem
from imglish.data.images import ImageError
from imglish.data.records import ImageSource
from imglish.data.sources.columns import Texts
from imglish.data.sources.fields import reach
from imglish.data.sources.files import StoredFile, allowed_roots, is_remote, open_raw
from imglish.data.sources.rows import CELLS, cell_row, parse_object, suffix


class Pictures(Protocol):
    """A column of pictures, read when a record's picture is asked for."""

    def picture(self, number: int) -> ImageSource: ...


@dataclass(frozen=True)
class FilePictures:
    """Files below ``root``, by name."""

    root: str
    names: Texts
    roots: tuple[str, ...]

    @staticmethod
    def below(root: str, names: Texts) -> FilePictures:
        return FilePictures(root, names, () if is_remote(root) else allowed_roots(root))

    def picture(self, number: int) -> ImageSource:
        return StoredFile(self.root, self.names[number], self.roots)


@dataclass(frozen=True)
class RowPictures:
    """base64 in the field ``field`` of rows of a text file; starts, sizes: bytes of the rows, int64 ``(N,)``."""

    path: str
    field: str
    starts: np.ndarray
    sizes: np.ndarray
    header: tuple[str, ...] = ()

    def picture(self, number: int) -> ImageSource:
        return EncodedPicture(self.path, self.field, int(self.starts[number]), int(self.sizes[number]), self.header)


@dataclass(frozen=True)
class EncodedPicture:
    """One picture of :class:`RowPictures`. Calling it reads its row again."""

    path: str
    field: str
    start: int
    size: int
    header: tuple[str, ...]

    def __call__(self) -> bytes:
        where = f"{self.path} at byte {self.start}"
        try:
            with open_raw(self.path) as file:
                file.seek(self.start)
                data = file.read(self.size)
        except OSError as error:
            raise ImageError(f"{where}: cannot be read: {error}", "not readable") from error
        fields: Mapping[str, Any] | Problem
        if suffix(self.path) in CELLS:
            fields = cell_row(data, list(self.header), "\t" if suffix(self.path) == ".tsv" else ",")
        else:
            fields = parse_object(data, where)
        text = None if isinstance(fields, Problem) else reach(fields, self.field)
        if not isinstance(text, str):
            raise ImageError(f"{where}: the row has changed since the file was opened", "not readable")
        try:
            return base64.b64decode(text.split("base64,", 1)[-1], validate=False)
        except binascii.Error as error:
            raise ImageError(f"{where}: the field {self.field!r} is not base64: {error}", "damaged") from error
