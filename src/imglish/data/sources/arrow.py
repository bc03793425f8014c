"""Parquet files and directories that Hugging Face `datasets` saved, read with pyarrow alone."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np

from imglish.data.errors import DataError, Errors, printable
from imglish.data.images import ImageError
from imglish.data.records import ImageSource
from imglish.data.sources.columns import Texts, numbers
from imglish.data.sources.config import SourceConfig, in_split
from imglish.data.sources.fields import ENCODED, IMAGE
from imglish.data.sources.files import (
    OpenFiles,
    Stat,
    StoredFile,
    allowed_roots,
    escapes,
    inside,
    is_folder,
    is_remote,
    join,
    names_in,
    open_raw,
    parent,
    status,
)
from imglish.data.sources.pictures import FilePictures, Pictures
from imglish.data.sources.rows import Row
from imglish.data.sources.table import Collector, ColumnSource, picture_folder

log = logging.getLogger(__name__)

BATCH = 1024  # rows that are turned into Python objects at a time
KEPT_BYTES = 256 * 2**20  # of decoded row groups that a process keeps
LARGE_GROUP = 64 * 2**20  # bytes of a row group from which on a warning is due


def pyarrow() -> Any:
    """The package, or how to get it."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("parquet and arrow files need pyarrow: pip install 'imglish[arrow]'") from error
    return pyarrow


def read_parquet(path: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file with these columns. Raises :class:`DataError`."""
    arrow = pyarrow()
    try:
        with open_raw(path) as file, arrow.parquet.ParquetFile(file) as table:
            if missing := [name for name in columns if name not in table.schema_arrow.names]:
                raise DataError(f"{path}: has no column {missing[0]!r}, only {', '.join(table.schema_arrow.names)}")
            for batch in table.iter_batches(BATCH, columns=list(columns)):
                yield from batch.to_pylist()
    except DataError:
        raise
    except _damage(arrow) as error:
        raise DataError(f"{path}: cannot be read as parquet: {printable(str(error))}") from error


def _damage(arrow: Any) -> tuple[type[BaseException], ...]:
    return arrow.ArrowException, OSError, ValueError, TypeError, LookupError, MemoryError, OverflowError


@dataclass(frozen=True)
class Table:
    """One file: parquet, or arrow's stream or file format; ``stat``: its state when it was looked through; split: that
    its name says, empty if none."""

    path: str
    stat: Stat
    split: str = ""

    @staticmethod
    def at(path: str, split: str = "") -> Table:
        found = status(path)
        if found is None:
            raise DataError(f"{path} does not exist or is not a file")
        return Table(path, found, split)


# ---- finding the files ----------------------------------------------------------------------------------------------


def open_parquet(config: SourceConfig, errors: Errors) -> ColumnSource:
    """A parquet file, or a folder of them, also in sub-folders. As on the Hugging Face hub (``train-00000-of-00002``) a
    ``split`` chooses files by the first word of their names."""
    path = config.path
    if not is_folder(path):
        return _open(config, [Table.at(path)], errors)
    names = [f"{folder}{name}" for folder in _folders(path) for name in names_in(join(path, folder))]
    found = [name for name in names if name.endswith(".parquet")]
    if config.split is not None and any(in_split(config.split, _split_of(name)) for name in found):
        found = [name for name in found if in_split(config.split, _split_of(name))]
        config = _without_split(config)
    _confine(path, found)
    return _open(config, [Table.at(join(path, name), _split_of(name)) for name in found], errors)


def _folders(path: str) -> list[str]:
    return ["", *(f"{name}/" for name in names_in(path) if is_folder(join(path, name)))]


def _split_of(name: str) -> str:
    return name.rsplit("/", 1)[-1].removesuffix(".parquet").split("-", 1)[0]


def _without_split(config: SourceConfig) -> SourceConfig:
    return replace(config, split=None)


def open_arrow(config: SourceConfig, errors: Errors) -> ColumnSource:
    """What ``Dataset.save_to_disk`` wrote (``state.json`` and ``.arrow`` files), or ``DatasetDict.save_to_disk`` with a
    folder for each split; or one ``.arrow`` file."""
    path = config.path
    if not is_folder(path):
        return _open(config, [Table.at(path)], errors)
    if "dataset_dict.json" in names_in(path):
        splits = [name for name in names_in(path) if is_folder(join(path, name))]
        chosen = [name for name in splits if in_split(config.split, name)]
        if not chosen:
            raise DataError(f'{path}: has no split "{config.split}" (there are: {", ".join(splits)})')
        config = _without_split(config)
        found = {f"{split}/{name}": split for split in chosen for name in _arrow_files(join(path, split))}
    else:
        found = dict.fromkeys(_arrow_files(path), "")
    _confine(path, list(found))
    return _open(config, [Table.at(join(path, name), split) for name, split in found.items()], errors)


def _arrow_files(folder: str) -> list[str]:
    state = join(folder, "state.json")
    try:
        with open_raw(state) as file:
            files = [entry["filename"] for entry in json.load(file)["_data_files"]]
    except FileNotFoundError:
        files = [name for name in names_in(folder) if name.endswith(".arrow")]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise DataError(f"{state}: does not say which files there are: {error!r}") from error
    if not files or not all(isinstance(name, str) for name in files):
        raise DataError(f"{folder}: there are no arrow files")
    return files


def _confine(folder: str, names: Sequence[str]) -> None:
    if not names:
        raise DataError(f"{folder}: there are no files to read")
    roots = () if is_remote(folder) else allowed_roots(folder)
    for name in names:
        if escapes(name) or (roots and not inside(roots, join(folder, name))):
            raise DataError(f"{folder}: {printable(name)} leads out of the folder")


# ---- rows -----------------------------------------------------------------------------------------------------------


def _open(config: SourceConfig, tables: list[Table], errors: Errors) -> ColumnSource:
    arrow = pyarrow()
    collector = Collector(config, errors)
    for number, table in enumerate(tables):
        try:
            for row in _rows(arrow, table, number, config):
                collector.add(row)
        except DataError:
            raise
        except _damage(arrow) as error:
            raise DataError(f"{table.path}: cannot be read: {printable(str(error))}") from error

    def pictures(names: Texts, found: Collector, kept: np.ndarray) -> Pictures:
        if found.holder is None:
            folder = config.path if is_folder(config.path) else parent(config.path)
            return FilePictures.below(picture_folder(config, names, (join(folder, "images"), folder)), names)
        files, rows = numbers(found.files, np.int64)[kept], numbers(found.starts, np.int64)[kept]
        root = config.images or (config.path if is_folder(config.path) else parent(config.path))
        roots = () if is_remote(root) else allowed_roots(root)
        return TablePictures(tuple(tables), found.holder, files.astype(np.int32), rows, root, roots)

    return collector.source(pictures)


def _rows(arrow: Any, table: Table, number: int, config: SourceConfig) -> Iterator[Row]:
    """Rows of one file; columns with pictures or vectors are not read."""
    handle = _OPEN.get(table.path, table.stat)
    holder = None if config.needs == "texts" else _holder(arrow, handle.schema, config)
    columns = [
        field.name
        for field in handle.schema
        if not _holds_bytes(arrow, field.type) and not _is_vector(arrow, field.type)
    ]
    said = {config.split_field: table.split} if config.by_split and table.split else {}
    count = 0
    for batch in handle.batches(columns):
        names = batch.schema.names
        for values in zip(*(column.to_pylist() for column in batch.columns)):
            where = f"{table.path}:{count}"
            yield Row(where, {**said, **dict(zip(names, values))}, count, 0, number, holder)
            count += 1


def _holder(arrow: Any, schema: Any, config: SourceConfig) -> str | None:
    names = [config.image_field] if config.image_field else [*IMAGE, *ENCODED]
    return next((n for n in names if n in schema.names and _holds_bytes(arrow, schema.field(n).type)), None)


def _is_vector(arrow: Any, kind: Any) -> bool:
    """Whether a column holds embeddings or the like, which nobody asks for here."""
    types = arrow.types
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return lists and bool(types.is_floating(kind.value_type) or types.is_integer(kind.value_type))


def _holds_bytes(arrow: Any, kind: Any) -> bool:
    types = arrow.types
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


class _Parquet:
    """An open parquet file; row groups that were read stay for a while."""

    def __init__(self, path: str) -> None:
        arrow = pyarrow()
        self.file = arrow.parquet.ParquetFile(open_raw(path))
        self.schema = self.file.schema_arrow
        meta = self.file.metadata
        self.ends = np.cumsum([meta.row_group(i).num_rows for i in range(meta.num_row_groups)])
        self.path, self._warned = path, False
        self._groups: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self._lock = Lock()

    def batches(self, columns: list[str]) -> Iterator[Any]:
        yield from self.file.iter_batches(BATCH, columns=columns)

    def cell(self, column: str, row: int) -> Any:
        """The value as Python has it. Row groups read for it are kept, a few of them, for the next cells."""
        group = int(np.searchsorted(self.ends, row, side="right"))
        first = int(self.ends[group - 1]) if group else 0
        with self._lock:  # a parquet file has one reader
            key = (group, column)
            if key not in self._groups:
                self._groups[key] = found = self.file.read_row_group(group, columns=[column]).column(0)
                if found.nbytes > LARGE_GROUP and not self._warned:
                    self._warned = True
                    log.warning(
                        "%s has row groups of %d MiB, and each picture read at random costs a whole one; to train on "
                        "them write them with `imglish data shard`",
                        self.path,
                        found.nbytes >> 20,
                    )
                while len(self._groups) > 1 and sum(c.nbytes for c in self._groups.values()) > KEPT_BYTES:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key][row - first].as_py()


class _Arrow:
    """A mapped arrow file: reading a row touches only its own bytes."""

    def __init__(self, path: str) -> None:
        arrow = pyarrow()
        source = open_raw(path) if is_remote(path) else arrow.memory_map(path)
        try:
            reader = arrow.ipc.open_stream(source)
            self.parts = list(reader)
        except arrow.ArrowInvalid:
            reader = arrow.ipc.open_file(source)
            self.parts = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.schema = reader.schema
        for part in self.parts:
            part.validate(full=True)  # offsets of a damaged file would lead out of its memory
        self.ends = np.cumsum([part.num_rows for part in self.parts])

    def batches(self, columns: list[str]) -> Iterator[Any]:
        for part in self.parts:
            yield part.select(columns)

    def cell(self, column: str, row: int) -> Any:
        part = int(np.searchsorted(self.ends, row, side="right"))
        first = int(self.ends[part - 1]) if part else 0
        return self.parts[part].column(column)[row - first].as_py()


def _opened(path: str) -> _Parquet | _Arrow:
    return _Parquet(path) if path.lower().endswith(".parquet") else _Arrow(path)


_OPEN: OpenFiles[_Parquet | _Arrow] = OpenFiles(_opened)


# ---- pictures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TablePictures:
    """Pictures in a column of tables: number of the file int32 ``(N,)``, row in it int64 ``(N,)``. Where a cell has
    only the picture's path, that is looked for below ``root``."""

    tables: tuple[Table, ...]
    column: str
    files: np.ndarray
    rows: np.ndarray
    root: str
    roots: tuple[str, ...]

    def picture(self, number: int) -> ImageSource:
        table = self.tables[int(self.files[number])]
        return TablePicture(table, self.column, int(self.rows[number]), self.root, self.roots)


@dataclass(frozen=True)
class TablePicture:
    """One picture in a table. Calling it reads its bytes."""

    table: Table
    column: str
    row: int
    root: str
    roots: tuple[str, ...]

    def __call__(self) -> bytes:
        where = f"{self.table.path}:{self.row}"
        arrow = pyarrow()
        try:
            value = _OPEN.get(self.table.path, self.table.stat).cell(self.column, self.row)
        except FileNotFoundError as error:
            raise ImageError(f"{where}: the file does not exist", "missing") from error
        except _damage(arrow) as error:
            raise ImageError(f"{where}: cannot be read: {printable(str(error))}", "not readable") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and isinstance(value.get("path"), str):
            return StoredFile(self.root, value["path"], self.roots)()
        if not isinstance(data, bytes):
            raise ImageError(f"{where}: there are no bytes in the field {self.column!r}", "missing")
        return data
