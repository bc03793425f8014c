"""Data as people have them: every layout becomes a sequence of records with random access.

>>> records = open_source("photos/captions.csv", split="train")
>>> records[7].captions
('a dog in the snow',)
"""

from __future__ import annotations

from codecs import BOM_UTF8
from dataclasses import replace
from pathlib import Path
from typing import Any

from imglish.data.errors import FILE as ERRORS
from imglish.data.errors import DataError, Errors
from imglish.data.sources.arrow import open_arrow, open_parquet
from imglish.data.sources.base import Source
from imglish.data.sources.coco import is_coco, is_karpathy, open_coco, open_karpathy
from imglish.data.sources.config import Kind, Needs, SourceConfig, SourceOptions
from imglish.data.sources.drawn import SCHEME, open_scenes
from imglish.data.sources.files import DAMAGED_GZIP, exists, is_folder, is_remote, join, names_in, opened
from imglish.data.sources.folder import METADATA, open_folder
from imglish.data.sources.lines import open_lines
from imglish.data.sources.mixture import open_mixture
from imglish.data.sources.rows import CELLS, LINES, read_json, suffix
from imglish.data.sources.table import open_table
from imglish.data.sources.tar_index import open_tars

__all__ = ["Kind", "Needs", "Source", "SourceConfig", "SourceOptions", "kind_of", "open_source"]

_ENDINGS: dict[str, Kind] = {
    **dict.fromkeys((*LINES, *CELLS), "table"),
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "tars",
    ".txt": "lines",
    ".yaml": "mixture",
    ".yml": "mixture",
}
_OPENERS = {
    "table": open_table,
    "list": open_table,
    "coco": open_coco,
    "karpathy": open_karpathy,
    "folder": open_folder,
    "tars": open_tars,
    "parquet": open_parquet,
    "arrow": open_arrow,
    "lines": open_lines,
    "scenes": open_scenes,
}


def open_source(source: str | Path | SourceConfig, *, errors_file: Path | None = None, **settings: Any) -> Source:
    """The records at a path, of any kind of layout (docs/data.md lists them).

    settings: of :class:`SourceConfig`, by name. errors_file: CSV that names what cannot be used, beside the log and the
    source's ``errors``. Raises :class:`DataError` where nothing can be read or too much is unusable.
    """
    config = (
        replace(source, **settings) if isinstance(source, SourceConfig) else SourceConfig(path=str(source), **settings)
    )
    return _open(config, Errors(config.max_errors, errors_file, "records"))


def _open(config: SourceConfig, errors: Errors) -> Source:
    config = _table_in_folder(config)
    kind = config.kind or kind_of(config.path)
    try:
        if kind == "mixture":
            return open_mixture(config, errors, _open)
        return _OPENERS[kind](config, errors)
    except OSError as error:
        raise DataError(f"{config.path}: {error.strerror or error}") from error
    except DAMAGED_GZIP as error:
        raise DataError(f"{config.path}: cannot be unpacked, it is damaged or cut off: {error}") from error


def kind_of(path: str) -> Kind:
    """What kind of layout lies at ``path``. Raises :class:`DataError` where nothing known does."""
    if path.startswith(SCHEME):
        return "scenes"
    ending = suffix(path)
    if path.lower().endswith((".tar.gz", ".tgz")):
        raise DataError(f"{path}: a packed tar has no random access; unpack it to .tar first")
    if ending == ".tar" or (not is_remote(path) and "{" in path):
        return "tars"
    if not exists(path):
        raise DataError(f"{path} does not exist")
    if is_folder(path):
        return _kind_of_folder(path)
    if ending == ".json":
        return _kind_of_json(path)
    if ending not in _ENDINGS:
        raise DataError(f"{path}: cannot read {ending or 'a file without a suffix'}; known: .json {' '.join(_ENDINGS)}")
    return _ENDINGS[ending]


def _kind_of_folder(path: str) -> Kind:
    names = names_in(path)
    if {"dataset_dict.json", "state.json"} & set(names):
        return "arrow"
    if any(name.endswith(".tar") for name in names):
        return "tars"
    parquet = any(name.endswith(".parquet") for name in names)
    if parquet or set(METADATA) & set(names):
        return "parquet" if parquet else "folder"
    for name in names:
        if is_folder(join(path, name)):
            inner = names_in(join(path, name))
            if set(METADATA) & set(inner):
                return "folder"
            parquet = parquet or any(file.endswith(".parquet") for file in inner)
    return "parquet" if parquet else "folder"


def _table_in_folder(config: SourceConfig) -> SourceConfig:
    """The table that a folder is about, ``captions.*`` or the only one in it; the folder itself where it has none."""
    if config.kind is not None or not is_folder(config.path) or _kind_of_folder(config.path) != "folder":
        return config
    names = names_in(config.path)
    if set(METADATA) & set(names):
        return config
    tables = [name for name in names if suffix(name) in (*LINES, *CELLS, ".json") and name != ERRORS]
    chosen = [name for name in tables if name.split(".", 1)[0] == "captions"] or tables
    if len(chosen) > 1:
        raise DataError(f"{config.path}: which of these is meant: {', '.join(chosen)}? Name the file")
    return replace(config, path=join(config.path, chosen[0])) if chosen else config


def _kind_of_json(path: str) -> Kind:
    with opened(path) as file:
        if file.read(1 << 16).removeprefix(BOM_UTF8).lstrip().startswith(b"["):
            return "list"
    data = read_json(path)
    if isinstance(data, dict) and is_coco(data):
        return "coco"
    return "karpathy" if isinstance(data, dict) and is_karpathy(data) else "list"
