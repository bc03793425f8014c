"""Where a picture can be read again: its place as text, to be kept in an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from imglish.data.images import MAX_FILE, ImageError
from imglish.data.records import ImageSource
from imglish.data.sources.files import Stat, StoredFile, allowed_roots, is_remote, status
from imglish.data.sources.pictures import EncodedPicture
from imglish.data.sources.tars import Shard, TarPicture


def place_of(source: ImageSource | None) -> str:
    """JSON that :func:`read_original` understands; "" for a picture that is drawn or lies in a cell of a table."""
    place: dict[str, Any]
    if isinstance(source, StoredFile):
        root = source.root if is_remote(source.root) else str(Path(source.root).resolve())
        place = {"root": root, "name": source.name}
    elif isinstance(source, Path):
        place = {"root": str(source.resolve().parent), "name": source.name}
    elif isinstance(source, TarPicture):
        shard = source.shard
        folder = shard.folder if is_remote(shard.folder) else str(Path(shard.folder).resolve())
        place = {
            "tar": {"folder": folder, "name": shard.name, "size": shard.stat.size, "stamp": shard.stat.stamp},
            "offset": source.offset,
            "size": source.size,
        }
    elif isinstance(source, EncodedPicture):
        path = source.path if is_remote(source.path) else str(Path(source.path).resolve())
        place = {
            "table": path,
            "field": source.field,
            "start": source.start,
            "size": source.size,
            "header": list(source.header),
        }
    else:
        return ""
    return json.dumps(place, ensure_ascii=False)


def stamp_of(source: ImageSource | None) -> str:
    """Short text that is equal only while the content is, found without reading it; "" where that cannot be known."""
    if isinstance(source, TarPicture):
        return f"{source.shard.stat.size} {source.shard.stat.stamp} {source.offset} {source.size}"
    path = str(source) if isinstance(source, Path) else source.path if isinstance(source, StoredFile) else None
    if path is None or "\0" in path:
        return ""
    try:
        found = status(path)
    except (OSError, ValueError):
        return ""
    return f"{found.size} {found.stamp}" if found is not None else ""


def read_original(place: str, key: str) -> bytes:
    """The bytes of the file of the picture ``key``. Raises :class:`ImageError` where it has no place, is not there any
    more, or has changed its tar."""
    data = _source(place, key)()
    if len(data) > MAX_FILE:
        raise ImageError(f"{key}: the file is larger than {MAX_FILE >> 20} MiB", "too large")
    return data


def _source(place: str, key: str) -> StoredFile | TarPicture | EncodedPicture:
    try:
        data = json.loads(place) if place else {}
        if "root" in data:
            root = data["root"]
            return StoredFile(root, data["name"], () if is_remote(root) else allowed_roots(root))
        if "tar" in data:
            tar = data["tar"]
            stat = Stat(tar["size"], tar["stamp"])
            return TarPicture(Shard(tar["folder"], tar["name"], stat), data["offset"], data["size"])
        if "table" in data:
            header = tuple(data["header"])
            return EncodedPicture(data["table"], data["field"], data["start"], data["size"], header)
    except (ValueError, KeyError, TypeError) as error:
        raise ImageError(f"{key}: its place in the index cannot be read: {error}", "missing") from error
    raise ImageError(f"{key}: its original cannot be read again: the data hold it in a cell", "missing")
