"""From a row's fields to a picture's name, captions, wrong captions and group; what is wrong is a problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from imglish.data.errors import Problem, printable
from imglish.data.sources.config import SourceConfig, in_split
from imglish.data.sources.rows import Row

IMAGE = (
    "image",
    "file_name",
    "filename",
    "path",
    "filepath",
    "image_path",
    "image_file",
    "img",
    "file",
    "jpg",
    "images",
)
ENCODED = ("image_base64", "base64", "b64", "image_bytes", "bytes")
CAPTIONS = (("captions", "caption"), ("sentences", "sentence"), ("texts", "text"), ("txt",))
SWAPPED = ("swapped", "negative_captions", "negative_caption")
LANGUAGE = ("language", "lang")
MAX_CAPTION = 20_000  # characters; a longer text is a page, not a caption
MAX_NAME = 4096
SEVERAL = "several pictures"  # of one row


@dataclass(slots=True)
class Found:
    """What a row holds. name: of the picture; encoded: field in which the picture itself stands, as base64."""

    name: str
    captions: tuple[str, ...]
    swapped: tuple[str, ...]
    group: str
    encoded: str | None = None


class Fields:
    """Reads rows as a :class:`SourceConfig` says; ``splits`` are those that were seen."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.splits: set[str] = set()

    def read(self, row: Row) -> tuple[Found | None, list[Problem]]:
        """What the row holds, None if it is not wanted or cannot be used; and what is wrong with it."""
        config, fields = self.config, row.fields
        if config.split is not None:
            split = reach(fields, config.split_field)
            if len(self.splits) < 100:
                self.splits.add(printable(str(split), 40))
            if not in_split(config.split, split):
                return None, []
        if not self._language(fields):
            return None, []
        problems: list[Problem] = []
        name, encoded = "", None
        if config.needs != "texts":
            picture = self._picture(row)
            if isinstance(picture, Problem):
                return None, [picture]
            name, encoded = picture
        captions: tuple[str, ...] = ()
        if config.needs != "images":
            captions, problems = self.captions(fields, row.where)
            if not captions and config.needs != "pictures":
                return None, problems or [self._none(row)]
        swapped = self._swapped(fields, len(captions), row.where, problems) if captions else ()
        label = reach(fields, config.split_field if config.by_split else config.group_field)
        return Found(name, captions, swapped, label if isinstance(label, str) else _number(label), encoded), problems

    def apart(self, row: Row) -> list[Row]:
        """A row with a list of pictures as a row for each of them, any other as it is."""
        field = self._picture_field(row.fields)
        several = reach(row.fields, field) if field is not None and row.holder is None else None
        if not isinstance(several, list) or not several:
            return [row]
        return [replace(row, fields={**row.fields, str(field): name}) for name in several]

    def _picture_field(self, fields: Mapping[str, Any]) -> str | None:
        names = (self.config.image_field,) if self.config.image_field else (*IMAGE, *ENCODED)
        return next((name for name in names if reach(fields, name) not in (None, "")), None)

    def _language(self, fields: Mapping[str, Any]) -> bool:
        said = next((fields[name] for name in LANGUAGE if name in fields), None)
        return self.config.language is None or said is None or said == self.config.language

    def _picture(self, row: Row) -> tuple[str, str | None] | Problem:
        where, fields = row.where, row.fields
        if row.holder is not None:
            return where, row.holder
        field = self._picture_field(fields)
        if field is None:
            known = printable(", ".join(map(str, fields)))
            wanted = repr(self.config.image_field) if self.config.image_field else "one of the usual fields"
            return Problem(where, "no picture", f"{where}: no picture path in {wanted} (fields: {known})")
        name = reach(fields, field)
        if isinstance(name, list):
            text = f"{where}: the field {field!r} holds {len(name)} pictures, no caption is of all of them"
            return Problem(where, SEVERAL, text)
        if not isinstance(name, str):
            return Problem(where, "wrong type", f"{where}: the field {field!r} holds {_short(name)}, no picture path")
        if field in ENCODED or name.startswith("data:image"):
            return where, field
        if not name.strip() or len(name) > MAX_NAME or broken(name):
            return Problem(where, "no picture", f"{where}: no picture path in the field {field!r}: {_short(name)}")
        return name.removeprefix(self.config.strip), None

    def captions(self, fields: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], list[Problem]]:
        """All captions in the fields that hold some, and what is wrong with the others."""
        names: Sequence[str] = self.config.caption_fields
        if not names:
            names = next((some for some in CAPTIONS if any(name in fields for name in some)), ())
        texts: list[str] = []
        problems: list[Problem] = []
        for name in names:
            self._add(reach(fields, name), name, where, texts, problems)
        return tuple(texts), problems

    def _add(self, value: Any, name: str, where: str, texts: list[str], problems: list[Problem]) -> None:
        if isinstance(value, Mapping) and self.config.language is not None:
            value = value.get(self.config.language)
        if value is None or (isinstance(value, str) and not value.strip()):
            return
        several = isinstance(value, (list, tuple))
        for number, entry in enumerate(value if several else [value], 1):
            text = entry.get("raw") if isinstance(entry, Mapping) and "raw" in entry else entry  # Karpathy's sentences
            what = f"caption {number} in the field {name!r}" if several else f"the caption in the field {name!r}"
            problem = check_caption(text, where, what)
            if problem is not None:
                problems.append(problem)
            elif isinstance(text, str):
                texts.append(text)

    def _none(self, row: Row) -> Problem:
        names = self.config.caption_fields or [name for some in CAPTIONS for name in some]
        known = printable(", ".join(map(str, row.fields)))
        text = f"{row.where}: no caption in {' or '.join(map(repr, names))} (fields: {known})"
        return Problem(row.where, "no caption", text)

    def _swapped(self, fields: Mapping[str, Any], count: int, where: str, problems: list[Problem]) -> tuple[str, ...]:
        names = (self.config.swapped_field,) if self.config.swapped_field else SWAPPED
        value = next((reach(fields, name) for name in names if reach(fields, name) is not None), None)
        texts = [value] if isinstance(value, str) else value
        if not texts:
            return ()
        fits = isinstance(texts, list) and len(texts) == count
        if fits and all(check_caption(text, where, "a wrong caption") is None for text in texts):
            return tuple(texts)
        problems.append(Problem(where, "wrong type", f"{where}: not one wrong caption for each caption"))
        return ()


def check_caption(text: Any, where: str, what: str) -> Problem | None:
    """Why ``text`` is no caption; None if it is one."""
    if not isinstance(text, str):
        return Problem(where, "wrong type", f"{where}: {what} holds {_short(text)}, not a text")
    if not text.strip():
        return Problem(where, "empty caption", f"{where}: {what} is empty")
    if len(text) > MAX_CAPTION:
        return Problem(where, "long caption", f"{where}: {what} has {len(text):,} characters")
    if broken(text):
        return Problem(where, "broken text", f"{where}: {what} holds characters that UTF-8 has not")
    return None


def broken(text: str) -> bool:
    """Whether UTF-8 cannot hold the text (half of a surrogate pair, as broken JSON escapes give)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def reach(fields: Mapping[str, Any], name: str) -> Any:
    """A field; a dot reaches into nested ones (``translations.de``)."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _number(label: Any) -> str:
    return str(label) if isinstance(label, int) and not isinstance(label, bool) else ""


def _short(value: Any) -> str:
    return printable(repr(value)[:80], 60)
