"""Tar shards as WebDataset and img2dataset write them: a sample is the members with one name up to the first dot.

An index, made once, gives random access: places of the pictures, and the captions. The tars are opened when they are
first read, in each process of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, BinaryIO, cast

import numpy as np

from imglish.data.errors import DataError, Errors, Problem, printable
from imglish.data.images import MAX_FILE, ImageError
from imglish.data.records import ImageSource
from imglish.data.sources.columns import runs
from imglish.data.sources.config import SourceConfig
from imglish.data.sources.files import (
    OpenFiles,
    Stat,
    allowed_roots,
    escapes,
    inside,
    is_folder,
    is_remote,
    join,
    names_in,
    open_raw,
    parent,
    remote,
    status,
)
from imglish.data.sources.folder import PICTURES
from imglish.data.sources.rows import Row, parse_object
from imglish.data.sources.table import Collector
from imglish.data.sources.tar_scan import Member, scan

MAX_TEXT = 4 * 2**20  # bytes of a member with text
TEXTS = (".txt", ".json")


@dataclass(frozen=True)
class Shard:
    """A tar file below ``folder`` and its state when it was indexed."""

    folder: str
    name: str
    stat: Stat

    @property
    def path(self) -> str:
        """Of the tar file."""
        return join(self.folder, self.name)


def find_shards(path: str) -> list[Shard]:
    """The tars that a folder, a file, or a pattern (``{00000..00009}``, ``*``, ``?``) names, sorted by name."""
    if is_folder(path):
        folder, names = path, [name for name in names_in(path) if name.endswith(".tar")]
    else:
        folder, pattern = parent(path), path.rsplit("/", 1)[-1]
        names = _expanded(pattern) if "{" in pattern else [pattern]
        if any(c in pattern for c in "*?["):
            names = [name for name in names_in(folder) if fnmatchcase(name, pattern)]
    if not names:
        raise DataError(f"{path}: there are no tar files")
    roots = () if is_remote(folder) else allowed_roots(folder)
    shards = []
    for name in names:
        found = status(join(folder, name))
        if found is None:
            raise DataError(f"{join(folder, name)} does not exist or is not a file")
        if roots and is_folder(path) and not inside(roots, join(folder, name)):
            raise DataError(f"{join(folder, name)} is a link that leads out of the folder")
        shards.append(Shard(folder, name, found))
    return shards


def _expanded(pattern: str) -> list[str]:
    """``{000..012}`` and ``{a,b}`` written out."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        return [pattern]
    low, high, several = found.groups()
    if several is not None:
        words = several.split(",")
    elif int(high) - int(low) > 1_000_000:
        raise DataError(f"{pattern}: more than a million shards")
    else:
        words = [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return [name for word in words for name in _expanded(pattern[: found.start()] + word + pattern[found.end() :])]


# ---- samples of one shard -------------------------------------------------------------------------------------------


def read_shard(shard: Shard, config: SourceConfig) -> Collector:
    """All samples of a shard as columns; its problems are in ``errors.named``."""
    collector = Collector(config, Errors(share=1, what="samples", quiet=True))
    with open_raw(shard.path) as file:
        for row in _samples(file, shard, config):
            collector.add(row)
    return collector


def _samples(file: BinaryIO, shard: Shard, config: SourceConfig) -> Iterator[Row | Problem]:
    where = shard.path
    samples: dict[str, dict[str, Member]] = {}
    for member in scan(file, shard.stat.size, where):
        if isinstance(member, Problem):
            yield member
        elif (problem := _sort_in(member, samples, where)) is not None:
            yield problem
    if not samples:
        yield Problem(where, "empty", f"{where}: there are no samples in this tar")
    beside: Mapping[str, Mapping[str, Any]] = {}
    try:
        beside = _sibling(shard, config)
    except DataError as error:
        yield Problem(f"{where} (parquet)", "missing member", str(error))
    for key, members in samples.items():
        yield from _sample(file, shard, key, members, config, beside)


def _sort_in(member: Member, samples: dict[str, dict[str, Member]], where: str) -> Problem | None:
    name = member.name.removeprefix("./")
    at = f"{where}/{printable(name)}"
    if member.kind == "folder":
        return None
    if member.kind == "other":
        return Problem(at, "link", f"{at}: a link or no regular file: not followed")
    if escapes(name) or not name:
        return Problem(at, "outside", f"{at}: this name leads out of the tar's folder")
    folder, _, base = name.rpartition("/")
    if base.startswith(".") or folder.startswith("__MACOSX"):
        return None
    stem, dot, ending = base.partition(".")
    members = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
    ending = (dot + ending).lower()
    if ending in members:
        return Problem(at, "duplicate key", f"{at}: this name was there before, the first one counts")
    members[ending] = member
    return None


def _sample(
    file: BinaryIO,
    shard: Shard,
    key: str,
    members: Mapping[str, Member],
    config: SourceConfig,
    beside: Mapping[str, Mapping[str, Any]],
) -> Iterator[Row | Problem]:
    where = f"{shard.path}/{printable(key)}"
    picture = next((members[ending] for ending in PICTURES if ending in members), None)
    if picture is None and config.needs != "texts":
        yield Problem(where, "missing member", f"{where}: no picture among {printable(', '.join(members))}")
        return
    if picture is not None and picture.size > MAX_FILE:
        yield Problem(where, "too large", f"{where}: the picture has {picture.size:,} bytes")
        return
    fields: dict[str, Any] = {}
    for ending in reversed(TEXTS):
        found = _text(file, members[ending], ending, where) if ending in members else {}
        if isinstance(found, Problem):
            yield found
        else:
            fields |= found
    if beside:
        fields["parquet"] = beside.get(key, {})
    start, size = (picture.offset, picture.size) if picture is not None else (-1, 0)
    yield Row(where, fields, start, size, holder="the tar", key=f"{shard.name}/{key}")


def _text(file: BinaryIO, member: Member, ending: str, where: str) -> Mapping[str, Any] | Problem:
    at = where + ending
    if member.size > MAX_TEXT:
        return Problem(at, "long caption", f"{at}: {member.size:,} bytes of text")
    file.seek(member.offset)
    data = file.read(member.size)
    if ending == ".json":
        return parse_object(data, at)
    try:
        return {"txt": data.decode("utf-8-sig").strip()}
    except UnicodeDecodeError as error:
        return Problem(at, "broken text", f"{at}: not UTF-8: {error.reason}")


def _sibling(shard: Shard, config: SourceConfig) -> Mapping[str, Mapping[str, Any]]:
    """Rows of ``00000.parquet`` beside ``00000.tar`` by key, where a caption field asks for them."""
    wanted = [name.removeprefix("parquet.") for name in config.caption_fields if name.startswith("parquet.")]
    if not wanted:
        return {}
    from imglish.data.sources.arrow import read_parquet

    path = shard.path.removesuffix(".tar") + ".parquet"
    return {str(row["key"]): row for row in read_parquet(path, ["key", *wanted])}


# ---- pictures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarPictures:
    """Pictures of all shards: those of shard s are ``ends[s]`` to ``ends[s + 1]``; int64 offsets and sizes ``(N,)``."""

    shards: tuple[Shard, ...]
    ends: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    @staticmethod
    def of(shards: tuple[Shard, ...], counts: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> TarPictures:
        return TarPictures(shards, runs(counts), offsets, sizes)

    def picture(self, number: int) -> ImageSource:
        shard = int(np.searchsorted(self.ends, number, side="right")) - 1
        return TarPicture(self.shards[shard], int(self.offsets[number]), int(self.sizes[number]))


@dataclass(frozen=True)
class TarPicture:
    """One picture in a tar. Calling it reads its bytes."""

    shard: Shard
    offset: int
    size: int

    def __call__(self) -> bytes:
        where = f"{self.shard.path} at byte {self.offset}"
        try:
            if is_remote(self.shard.path):
                files = remote(self.shard.path)
                data = cast(bytes, files.cat_file(self.shard.path, self.offset, self.offset + self.size))
            else:
                data = os.pread(_OPEN.get(self.shard.path, self.shard.stat).fileno(), self.size, self.offset)
        except FileNotFoundError as error:
            raise ImageError(f"{where}: the tar file does not exist", "missing") from error
        except OSError as error:
            raise ImageError(f"{where}: cannot be read: {error}", "not readable") from error
        if len(data) != self.size:
            raise ImageError(f"{where}: the tar file ends within the picture", "truncated")
        return data


_OPEN: OpenFiles[BinaryIO] = OpenFiles(open_raw)
