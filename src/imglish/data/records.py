"""Image-caption records and how they are read from JSONL and CSV files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

ImageSource = Path | bytes | Callable[[], Image.Image | bytes]
"""Where a picture comes from: a file, the bytes of one, or a function (picklable, for loader workers) that gives a
picture or the bytes of its file."""

PROBED = 20  # pictures looked for when a file is read, so that a wrong folder is noticed before any work


class RecordError(ValueError):
    """A line of a data file that cannot be used; the message begins with ``file:line``."""


@dataclass(frozen=True)
class Record:
    """One picture with its captions; either may be missing (None, no captions) where a job needs only the other.

    key: its name in messages and results; image_id: equal for records that show the same picture.
    swapped: optionally, for each caption, one that is false for this picture (a hard negative known beforehand).
    group: optionally, a label that pictures of one thing share (a product, a place), for picture-to-picture search.
    """

    key: str
    image: ImageSource | None
    captions: tuple[str, ...]
    image_id: int
    swapped: tuple[str, ...] = ()
    group: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.captions, str):
            raise TypeError(f"{self.key}: captions must be a tuple of strings, not one string")
        if self.swapped and len(self.swapped) != len(self.captions):
            raise ValueError(f"{self.key}: {len(self.swapped)} swapped captions for {len(self.captions)} captions")


def read_records(
    path: str | Path,
    images: str | Path | None = None,
    *,
    split: str | None = None,
    image: str = "image",
    captions: str | Sequence[str] = ("captions", "caption"),
    group: str = "group",
) -> list[Record]:
    """Read a ``.jsonl``, ``.csv`` or ``.tsv`` file; lines that name one picture become one record, in file order.

    images: folder that the picture paths are relative to (default: the file's own folder, or ``images`` in it).
    split: keep only lines whose ``split`` field equals it. image: name of the field with the picture's path.
    captions: field or fields that hold captions, each a string or a list of strings; all that are present count;
    a dot reaches into nested JSON (``translations.de``). group: name of the field with the group label, if any.

    Raises :class:`RecordError` with ``file:line`` for broken lines, missing fields and empty captions, and
    ``FileNotFoundError`` when none of the first pictures exists.
    """
    path = Path(path)
    folder = _folder(path, images)
    fields = (captions,) if isinstance(captions, str) else tuple(captions)
    found: dict[str, Record] = {}
    splits: set[str] = set()
    for where, row in _rows(path):
        if split is not None:
            splits.add(str(row.get("split")))
            if row.get("split") != split:
                continue
        name = row.get(image)
        if not isinstance(name, str) or not name.strip():
            raise RecordError(f"{where}: no picture path in the field {image!r} (fields: {', '.join(map(str, row))})")
        texts = _captions(row, fields, where)
        if (known := found.get(name)) is not None:
            found[name] = replace(known, captions=known.captions + texts)
        else:
            label = row.get(group)
            found[name] = Record(
                name, folder / name, texts, image_id=len(found), group="" if label is None else str(label)
            )
    if not found:
        why = f'no line has split "{split}" (there are: {", ".join(sorted(splits))})' if splits else "no lines"
        raise RecordError(f"{path}: {why}")
    records = list(found.values())
    _probe(records, path, folder)
    return records


def _folder(path: Path, images: str | Path | None) -> Path:
    if images is not None:
        folder = Path(images)
        if not folder.is_dir():
            raise FileNotFoundError(f"the image folder {folder} does not exist")
        return folder
    inside = path.parent / "images"
    return inside if inside.is_dir() else path.parent


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Lines with their place ``file:line``; blank lines are left out."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
            try:
                for row in reader:
                    where = f"{path}:{reader.line_num}"
                    if None in row or None in row.values():
                        raise RecordError(f"{where}: the number of cells differs from the header's")
                    yield where, row
            except csv.Error as error:
                raise RecordError(f"{path}:{reader.line_num}: {error}") from error
    elif suffix in (".jsonl", ".ndjson"):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _json_object(line, f"{path}:{number}")
    else:
        raise RecordError(f"{path}: cannot read {suffix or 'a file without a suffix'}; known: .jsonl .csv .tsv")


def _json_object(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # JSON and UTF-8 errors alike
        raise RecordError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise RecordError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _captions(row: Mapping[str, Any], fields: Sequence[str], where: str) -> tuple[str, ...]:
    texts: list[str] = []
    for field in fields:
        value = _reach(row, field)
        if isinstance(value, str):  # one caption, never its characters
            texts += [value] if value.strip() else []
        elif isinstance(value, list):
            for number, text in enumerate(value, 1):
                if not isinstance(text, str) or not text.strip():
                    what = "empty" if isinstance(text, str) else f"{text!r}, not a text"
                    raise RecordError(f"{where}: caption {number} in the field {field!r} is {what}")
                texts.append(text)
        elif value is not None:
            raise RecordError(f"{where}: the field {field!r} holds {value!r}, neither a text nor a list of texts")
    if not texts:
        raise RecordError(
            f"{where}: no caption in {' or '.join(map(repr, fields))} (fields: {', '.join(map(str, row))})"
        )
    return tuple(texts)


def _reach(row: Mapping[str, Any], field: str) -> Any:
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _probe(records: Sequence[Record], path: Path, folder: Path) -> None:
    first = records[:PROBED]
    if not any(isinstance(record.image, Path) and record.image.is_file() for record in first):
        raise FileNotFoundError(
            f"{path}: none of the first {len(first)} pictures is in {folder} (first of them: {first[0].key}); "
            "is the image folder right?"
        )
