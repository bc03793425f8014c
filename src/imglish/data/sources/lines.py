"""Texts without pictures: a file with one on each line."""

from __future__ import annotations

from collections.abc import Iterator

from imglish.data.errors import DataError, Errors, Problem
from imglish.data.sources.config import SourceConfig
from imglish.data.sources.files import opened
from imglish.data.sources.rows import Row, read_lines
from imglish.data.sources.table import ColumnSource, collect


def open_lines(config: SourceConfig, errors: Errors) -> ColumnSource:
    """A ``.txt`` file (``.gz`` or not); blank lines are left out. For jobs that need texts only."""
    if config.needs != "texts":
        raise DataError(f"{config.path}: a text file has no pictures, it serves jobs that need texts only")
    return collect(config, _rows(config.path), errors)


def _rows(path: str) -> Iterator[Row | Problem]:
    with opened(path) as file:
        for line in read_lines(file, path):
            if isinstance(line, Problem):
                yield line
                continue
            where, _, data = line
            try:
                yield Row(where, {"caption": data.decode("utf-8-sig").strip()})
            except UnicodeDecodeError as error:
                yield Problem(where, "broken text", f"{where}: not UTF-8: {error.reason}")
