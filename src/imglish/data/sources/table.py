"""Rows with captions become records: rows that name one picture are one record, in the order of the first of them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from imglish.data.errors import DataError, Errors, Problem, printable
from imglish.data.records import Record
from imglish.data.sources.base import Source
from imglish.data.sources.columns import Texts, TextsBuilder, numbers, runs
from imglish.data.sources.config import SourceConfig
from imglish.data.sources.fields import Fields
from imglish.data.sources.files import allowed_roots, escapes, exists, inside, is_folder, is_remote, join, parent
from imglish.data.sources.pictures import FilePictures, Pictures, RowPictures
from imglish.data.sources.rows import CELLS, Row, read_rows, suffix

PROBED = 20  # pictures looked for when a file is read, so that a wrong folder is noticed before any work
CHECK_EVERY = 100_000  # rows between two looks at the share of bad ones


@dataclass(frozen=True)
class ColumnSource(Source):
    """Records in columns. keys: of the records; pictures: None for texts alone; captions: all of them, those of record
    i are ``starts[i]`` to ``starts[i + 1]``; swapped: beside the captions, empty where there is none, or None; groups:
    labels or None; errors: what could not be used."""

    keys: Texts
    pictures: Pictures | None
    captions: Texts
    starts: np.ndarray
    swapped: Texts | None
    groups: Texts | None
    errors: Errors

    def __len__(self) -> int:
        return len(self.keys)

    def record(self, number: int) -> Record:
        own = range(int(self.starts[number]), int(self.starts[number + 1]))
        swapped = tuple(self.swapped[c] for c in own) if self.swapped is not None else ()
        return Record(
            self.keys[number],
            self.pictures.picture(number) if self.pictures is not None else None,
            tuple(self.captions[c] for c in own),
            image_id=number,
            swapped=swapped if all(swapped) else (),
            group=self.groups[number] if self.groups is not None else "",
        )

    def caption_counts(self) -> np.ndarray:
        return np.diff(self.starts)

    def digest(self) -> str:
        found = hashlib.blake2b(digest_size=16)
        texts = [self.keys, self.captions, *([self.swapped] if self.swapped is not None else [])]
        for column in (*(part for text in texts for part in (text.data, text.starts)), self.starts):
            found.update(np.ascontiguousarray(column).data)
        return found.hexdigest()


class Collector:
    """Takes rows, gives columns."""

    def __init__(self, config: SourceConfig, errors: Errors) -> None:
        self.config, self.errors = config, errors
        self.fields = Fields(config)
        self.rows = 0
        self.names, self.captions, self.swapped, self.groups = (TextsBuilder() for _ in range(4))
        self.counts, self.hashes = array("q"), array("q")
        self.files, self.starts, self.sizes = array("q"), array("q"), array("q")
        self.holder: str | None = None
        self.any_swapped = self.any_group = False

    def add(self, row: Row | Problem) -> None:
        """Take a row, or count why there is none. Where pictures alone are wanted, a row may name several."""
        if isinstance(row, Row) and self.config.needs == "images":
            for one in self.fields.apart(row):
                self._add(one)
        else:
            self._add(row)

    def _add(self, row: Row | Problem) -> None:
        self.rows += 1
        if self.rows % CHECK_EVERY == 0:
            self.errors.check(self.rows, self.rows)
        if isinstance(row, Problem):
            self.errors.add(row)
            return
        found, problems = self.fields.read(row)
        if found is not None and self.config.needs != "texts" and found.encoded is None and _leaves(found.name):
            text = f"{row.where}: the picture {found.name!r} lies outside of the folder of pictures"
            found, problems = None, [Problem(row.where, "outside", text)]
        self.errors.extend(problems)
        if found is None:
            return
        stands_alone = self.config.needs == "texts" or found.encoded is not None
        self.holder = found.encoded or self.holder
        name = (row.key or row.where.rsplit("/", 1)[-1]) if stands_alone else found.name
        self.names.add(name)
        named = (name, found.group) if self.config.by_split else name
        self.hashes.append(len(self.hashes) if stands_alone else hash(named))
        self.counts.append(len(found.captions))
        for number, caption in enumerate(found.captions):
            self.captions.add(caption)
            self.swapped.add(found.swapped[number] if found.swapped else "")
        self.any_swapped = self.any_swapped or bool(found.swapped)
        self.groups.add(found.group)
        self.any_group = self.any_group or bool(found.group)
        for column, value in ((self.files, row.file), (self.starts, row.start), (self.sizes, row.size)):
            column.append(value)

    def source(self, pictures: Callable[[Texts, Collector, np.ndarray], Pictures | None]) -> ColumnSource:
        """The records. pictures: makes their column from the names, this collector and the numbers of the rows that
        are kept, int64 ``(N,)``. Raises :class:`DataError` when there are none or too many are unusable."""
        self.errors.check(self.rows, self.rows)
        if not len(self.names):
            raise DataError(f"{self.config.path}: {self._nothing()}")
        names, captions, swapped, groups = (b.build() for b in (self.names, self.captions, self.swapped, self.groups))
        counts = numbers(self.counts, np.int64)
        # Names are compared by 64-bit hashes with a secret key (Python's): no dictionary of millions of texts.
        _, first, inverse = np.unique(numbers(self.hashes, np.int64), return_index=True, return_inverse=True)
        kept = np.sort(first)
        if len(first) < len(counts):
            place = np.empty(len(first), dtype=np.int64)
            place[np.argsort(first)] = np.arange(len(first))
            record = place[inverse]
            order = _captions_of(np.argsort(record, kind="stable"), counts)
            names, captions, swapped, groups = (
                names.take(kept),
                captions.take(order),
                swapped.take(order),
                groups.take(kept),
            )
            counts = np.bincount(record, weights=counts, minlength=len(first)).astype(np.int64)
        return ColumnSource(
            names,
            None if self.config.needs in ("texts", "names") else pictures(names, self, kept),
            captions,
            runs(counts),
            swapped if self.any_swapped else None,
            groups if self.any_group else None,
            self.errors,
        )

    def _nothing(self) -> str:
        if self.config.split is not None and self.fields.splits:
            return f'no row has split "{self.config.split}" (there are: {", ".join(sorted(self.fields.splits))})'
        if not len(self.errors):
            return "no rows"
        return f"no records ({self.errors.summary()}); for example {printable(self.errors.named[0].message)}"


def _captions_of(rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Numbers of the captions of these rows, in this order of rows."""
    lengths, starts = counts[rows], runs(counts)[rows]
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)


def _leaves(name: str) -> bool:
    """Whether a name that is not absolute leaves its folder; absolute ones are looked at when they are read."""
    return escapes(name.lstrip("/"))


def collect(
    config: SourceConfig, rows: Iterable[Row | Problem], errors: Errors, near: Sequence[str] = ()
) -> ColumnSource:
    """Records of rows whose pictures are files. near: folders where the pictures may be."""
    collector = Collector(config, errors)
    for row in rows:
        collector.add(row)

    def pictures(names: Texts, found: Collector, kept: np.ndarray) -> Pictures:
        if found.holder is not None:
            return _encoded(config, found, kept)
        return FilePictures.below(picture_folder(config, names, near), names)

    return collector.source(pictures)


def open_table(config: SourceConfig, errors: Errors) -> ColumnSource:
    """A ``.jsonl``, ``.csv``, ``.tsv`` or JSON list."""
    folder = parent(config.path)
    return collect(config, read_rows(config.path), errors, (join(folder, "images"), folder))


def _encoded(config: SourceConfig, found: Collector, kept: np.ndarray) -> RowPictures:
    starts, sizes = numbers(found.starts, np.int64), numbers(found.sizes, np.int64)
    if config.path.endswith(".gz") or starts.min() < 0:
        raise DataError(f"{config.path}: pictures within rows need a .jsonl, .csv or .tsv file that is not packed")
    header: tuple[str, ...] = ()
    if suffix(config.path) in CELLS:
        first = next((row for row in read_rows(config.path) if isinstance(row, Row)), None)
        header = tuple(first.fields) if first is not None else ()
    assert found.holder is not None
    return RowPictures(config.path, found.holder, starts[kept], sizes[kept], header)


def picture_folder(config: SourceConfig, names: Texts, near: Sequence[str]) -> str:
    """The folder that the names are relative to: ``config.images``, or the first of ``near`` that holds some of them.

    Raises :class:`DataError` when none of the first pictures is there.
    """
    if config.images is not None and not is_folder(config.images):
        raise DataError(f"the image folder {config.images} does not exist")
    folders = [config.images] if config.images is not None else [folder for folder in near if is_folder(folder)]
    some = [names[i] for i in range(min(PROBED, len(names)))]
    for folder in folders:
        if any(_is_there(folder, name) for name in some):
            return folder
    hint = "is the image folder right?"
    if some[0].startswith("/"):
        hint = "these names are absolute: take a part off with strip, and name the folder with images"
    raise DataError(
        f"{config.path}: none of the first {len(some)} pictures is in {' or '.join(folders) or 'any known folder'} "
        f"(first of them: {some[0]}); {hint}"
    )


def _is_there(folder: str, name: str) -> bool:
    if name.startswith("/") and not is_remote(folder):
        return exists(name) and inside(allowed_roots(folder), name)
    return exists(join(folder, name))
