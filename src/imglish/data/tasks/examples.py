"""Examples of a task, and what all its files have in common: lines, names of pictures, what can be wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from imglish.data.errors import DataError, Errors, Problem, printable
from imglish.data.sources.files import escapes


@dataclass(frozen=True)
class Example:
    """A text about one or several pictures, and what people say to it.

    key: its name in results, once in a file; place: file and line; answers: one a person, or the class alone; none in
    a test split; kind: a group that scores are also given for (answer type); shows: what the pictures show: examples
    of equal ``shows`` are held out together.
    """

    key: str
    place: str
    images: tuple[Path, ...]
    text: str
    answers: tuple[str, ...]
    kind: str = ""
    shows: str = ""


@dataclass(frozen=True)
class TaskData:
    """Where examples lie. path: JSON lines or JSON; images: folder of the pictures (default: ``images`` beside the
    file, or the file's own folder); annotations: VQA v2 has its answers in a second file (default: beside the first, by
    the official name); split: keep those whose field ``split`` says so; pictures: how many to a text, of those that an
    example has (0: all)."""

    path: Path
    images: Path | None = None
    annotations: Path | None = None
    split: str | None = None
    pictures: int = 0

    @property
    def folder(self) -> Path:
        """Where names of pictures begin."""
        if self.images is not None:
            return self.images
        beside = self.path.parent / "images"
        return beside if beside.is_dir() else self.path.parent


class Unusable(ValueError):  # noqa: N818 (a signal to :func:`read_examples`)
    """An entry that cannot be used; ``reason``: a few words that are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


Entry = Mapping[str, Any]
Item = TypeVar("Item")


def read_examples(
    data: TaskData, entries: Iterable[tuple[str, Any]], parse: Callable[[str, Entry], Example], errors: Errors
) -> list[Example]:
    """Examples of ``entries`` (place, entry), each made by ``parse``, which raises :class:`Unusable`.

    What cannot be used (wrong layout, a missing picture, an example that comes twice) is counted in ``errors`` and
    named by its place; too many of them, or no example at all, are a :class:`DataError`.
    """
    found: dict[str, Example] = {}
    seen, other, here = 0, set(), _Present()
    for place, entry in entries:
        try:
            split = entry.get("split") if isinstance(entry, Mapping) else None
            if data.split is not None and split not in (None, data.split):
                other.add(printable(str(split), 40))
                continue
            seen += 1
            if not isinstance(entry, Mapping):
                raise Unusable("wrong layout", f"{_kind(entry)} in place of an object")
            example = parse(place, entry)
            if data.pictures and len(example.images) < data.pictures:
                raise Unusable("too few pictures", f"{len(example.images)} pictures, {data.pictures} are wanted")
            if example.key in found:
                raise Unusable("comes twice", f"{example.key!r} was at {found[example.key].place} before")
            for picture in example.images[: data.pictures or None]:
                here.require(picture)
            found[example.key] = example
        except Unusable as error:
            errors.add(Problem(place, error.reason, f"{place}: {error}"))
    errors.check(seen, seen)
    if not found:
        hint = f"; its splits: {', '.join(sorted(other))}" if other else ""
        of = f" of split {data.split!r}" if data.split is not None else ""
        raise DataError(f"{data.path}: no example{of} that can be used ({errors.summary() or 'no entries'}{hint})")
    return list(found.values())


def items_of(
    files: Iterable[Path],
    parse: Callable[[Path, str, Any], Sequence[Item]],
    pictures: Callable[[Item], Iterable[Path]],
    errors: Errors,
) -> list[Item]:
    """What ``parse`` makes of the entries of ``files`` (file, place, entry) whose ``pictures`` are there.

    It raises ``KeyError``, ``TypeError`` or ``ValueError`` for an entry of another layout. What cannot be used is
    counted in ``errors`` and named by its place; too much of it is a :class:`DataError`.
    """
    found: list[Item] = []
    seen, here = 0, _Present()
    for file in files:
        for place, entry in entries_of(file):
            seen += 1
            try:
                made = parse(file, place, entry)
                for item in made:
                    for path in pictures(item):
                        here.require(path)
                found += made
            except (KeyError, TypeError, ValueError) as error:
                what = f"no field {error}" if isinstance(error, KeyError) else str(error)
                errors.add(Problem(place, getattr(error, "reason", "wrong layout"), f"{place}: {what}"))
    errors.check(seen, seen)
    return found


class _Present:
    """Whether a file is there; every file is looked for once."""

    def __init__(self) -> None:
        self.known: dict[Path, bool] = {}

    def require(self, path: Path) -> None:
        """:class:`Unusable` where it is not."""
        if path not in self.known:
            self.known[path] = os.path.isfile(path)  # unlike Path.is_file, False for a name that is too long
        if not self.known[path]:
            raise Unusable("missing picture", f"there is no {printable(str(path))}")


def entries_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Entries of JSON lines as ``file:line``, or of a JSON list, or an object of objects, as ``file, entry n``.

    Raises :class:`DataError` where the file cannot be read or is not JSON, with the line.
    """
    text = text_of(path)
    if (held := _whole(text, path)) is not None:
        for number, entry in enumerate(held, 1):
            yield f"{path.name}, entry {number}", entry
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path.name}:{number}", parsed(line, f"{path.name}:{number}")


def _whole(text: str, path: Path) -> list[Any] | None:
    """The entries of a file that is one JSON value; None for JSON lines, which a file ``.json`` may hold too."""
    if path.suffix == ".jsonl":
        return None
    if text.lstrip().startswith("["):
        held: list[Any] = parsed(text, path.name)
        return held
    try:
        whole = parsed(text, path.name)
    except DataError:
        if text.lstrip().partition("\n")[0].rstrip().endswith("}"):  # a line that is an object
            return None
        raise
    several = isinstance(whole, dict) and all(isinstance(value, dict) for value in whole.values())
    return list(whole.values()) if several else [whole]


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = place if ":" in place else f"{place}:{error.lineno}"
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{place}: JSON that is nested too deeply") from error


def field(entry: Entry, *names: str) -> Any:
    """The first of the fields that is there; :class:`Unusable` where none is."""
    for name in names:
        if name in entry and entry[name] is not None:
            return entry[name]
    known = printable(", ".join(map(str, entry)))
    raise Unusable("wrong layout", f"no field {' or '.join(map(repr, names))} (fields: {known})")


def text_field(entry: Entry, *names: str) -> str:
    value = field(entry, *names)
    if not isinstance(value, str) or not value.strip():
        what = "an empty text" if isinstance(value, str) else f"{_kind(value)}, no text"
        raise Unusable("wrong layout", f"the field {names[0]!r} holds {what}")
    return value.strip()


def key_of(entry: Entry, place: str, *names: str) -> str:
    """The example's own name where the file gives one, else its place."""
    for name in names:
        if isinstance(entry.get(name), (str, int)):
            return str(entry[name])
    return place


def answers_field(entry: Entry, *names: str) -> tuple[str, ...]:
    """Answers of people: a list of texts, or of objects with an ``answer`` (VQA v2); none where there is no field."""
    name = next((name for name in names if name in entry), None)
    if name is None:
        return ()
    value = entry[name]
    if isinstance(value, str):
        raise Unusable("answers are one string", f"the field {name!r} is one string, not a list of answers: {value!r}")
    if not isinstance(value, list) or not value:
        raise Unusable("no answers", f"the field {name!r} holds {_kind(value)}, no list of answers")
    answers = []
    for each in value:
        answer = each.get("answer") if isinstance(each, Mapping) else each
        if not isinstance(answer, str):
            raise Unusable("wrong layout", f"an answer in {name!r} is {_kind(answer)}, no text")
        answers.append(answer)
    return tuple(answers)


def picture(folder: Path, name: Any) -> Path:
    """The file called ``name`` in the folder of pictures, and in no other; :class:`Unusable` otherwise."""
    if not isinstance(name, str) or not name:
        raise Unusable("wrong layout", f"{_kind(name)} in place of a picture's name")
    if escapes(name):
        raise Unusable("outside", f"the picture {printable(name)!r} lies outside of {folder}")
    return folder / name


def hold_out(examples: Sequence[Example], share: float, held: bool) -> list[Example]:
    """The examples that are held out (``held``), or the others, so that no picture is on both sides.

    A number from the name of what the pictures show decides, so more data move nothing to the other side.
    """
    if not 0 <= share < 1:
        raise ValueError(f"a share of {share} to hold out: expected 0 or more and below 1")

    def is_held(example: Example) -> bool:
        digest = blake2b(example.shows.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * 2**64

    return [example for example in examples if is_held(example) == held]


def _kind(value: Any) -> str:
    return {"NoneType": "nothing", "str": "a text", "list": "a list", "dict": "an object"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )
