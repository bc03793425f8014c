"""Folders of pictures: with a metadata file (imagefolder), with text files beside them, or named as classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from imglish.data.errors import DataError, Errors, Problem, printable
from imglish.data.images import ImageError
from imglish.data.sources.config import SourceConfig
from imglish.data.sources.files import StoredFile, allowed_roots, is_folder, is_remote, join, names_in, walk
from imglish.data.sources.rows import Row, read_rows
from imglish.data.sources.table import ColumnSource, collect

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
SIDECAR = ".txt"


def open_folder(config: SourceConfig, errors: Errors) -> ColumnSource:
    """Pictures below ``config.path``. Captions come from ``metadata.jsonl`` or ``.csv`` (in the folder, or in each of
    its sub-folders, which are then splits), else from a ``.txt`` file beside each picture (one caption a line), else
    from the name of the folder that a picture lies in, which is also its group.

    With a ``split``, a sub-folder of that name is the folder. Links are not followed, they are counted.
    """
    root = config.path
    if config.split is not None and is_folder(join(root, config.split)):
        root, config = join(root, config.split), replace(config, split=None)
    config = replace(config, images=root)
    tables = _metadata(root)
    rows = _with_metadata(root, tables, config) if tables else _rows(_listing(root), config)
    return collect(config, rows, errors)


def _metadata(root: str) -> list[str]:
    """Metadata files, relative to ``root``: its own one, or those of its sub-folders."""
    here = names_in(root)
    if own := [name for name in METADATA if name in here]:
        return own[:1]
    found = []
    for name in here:
        if is_folder(join(root, name)):
            found += [f"{name}/{table}" for table in METADATA if table in names_in(join(root, name))][:1]
    return found


def _with_metadata(root: str, tables: list[str], config: SourceConfig) -> Iterator[Row | Problem]:
    field = config.image_field or "file_name"
    for table in tables:
        folder = table.rpartition("/")[0]
        for row in read_rows(join(root, table)):
            if isinstance(row, Problem) or not folder:
                yield row
                continue
            name = row.fields.get(field)
            inner: Mapping[str, Any] = {config.split_field: folder} | dict(row.fields)
            yield replace(row, fields={**inner, field: f"{folder}/{name}"} if isinstance(name, str) else inner)


@dataclass
class _Listing:
    root: str
    pictures: list[str]
    texts: set[str]
    links: list[str]


def _listing(root: str) -> _Listing:
    found = _Listing(root, [], set(), [])
    for name, regular in walk(root):
        ending = "." + name.rpartition(".")[2].lower()
        if not regular:
            found.links.append(name)
        elif ending in PICTURES:
            found.pictures.append(name)
        elif ending == SIDECAR:
            found.texts.add(name)
    return found


def _rows(found: _Listing, config: SourceConfig) -> Iterator[Row | Problem]:
    for name in found.links:
        where = join(found.root, name)
        yield Problem(where, "link", f"{where}: a link or no regular file: not followed")
    if config.needs in ("images", "pictures"):
        for name in found.pictures:
            fields = {"file_name": name, "group": name.rpartition("/")[0]}
            if config.needs == "pictures" and _sidecar(name) in found.texts:
                row = _with_text(name, found)
                yield replace(row, fields={**row.fields, **fields}) if isinstance(row, Row) else row
            else:
                yield Row(join(found.root, name), fields)
    elif any(_sidecar(name) in found.texts for name in found.pictures):
        for name in found.pictures:
            yield _with_text(name, found)
    else:
        yield from _classes(found, config)


def _sidecar(name: str) -> str:
    return name.rpartition(".")[0] + SIDECAR


def _with_text(name: str, found: _Listing) -> Row | Problem:
    where = join(found.root, name)
    if _sidecar(name) not in found.texts:
        return Problem(where, "missing member", f"{where}: there is no {_sidecar(name)} beside it")
    roots = () if is_remote(found.root) else allowed_roots(found.root)
    try:
        text = StoredFile(found.root, _sidecar(name), roots)().decode("utf-8-sig")
    except ImageError as error:
        return Problem(where, error.reason, f"{where}: its text: {error}")
    except UnicodeDecodeError as error:
        return Problem(where, "broken text", f"{where}: its text is not UTF-8: {error.reason}")
    return Row(where, {"file_name": name, "captions": [line.strip() for line in text.splitlines() if line.strip()]})


def _classes(found: _Listing, config: SourceConfig) -> Iterator[Row | Problem]:
    if found.pictures and all("/" not in name for name in found.pictures):
        raise DataError(
            f"{found.root}: pictures without captions. Add metadata.csv or metadata.jsonl (file_name, caption), a .txt "
            "beside each picture, or a sub-folder for each class"
        )
    for name in found.pictures:
        where = join(found.root, name)
        if "/" not in name:
            yield Problem(where, "no caption", f"{where}: lies in no class folder")
            continue
        label = name.split("/")[-2]
        spoken = printable(label.replace("_", " ").strip())
        yield Row(where, {"file_name": name, "caption": config.template.replace("{}", spoken), "group": label})
