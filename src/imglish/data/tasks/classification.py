"""Classes of pictures: folders that are named by them (ImageNet), or JSON lines with a picture and its label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from imglish.data.errors import DataError, Errors, Problem, printable
from imglish.data.sources.files import walk
from imglish.data.sources.folder import PICTURES
from imglish.data.tasks.examples import (
    Entry,
    Example,
    TaskData,
    Unusable,
    entries_of,
    field,
    key_of,
    picture,
    read_examples,
)


def read(data: TaskData, errors: Errors) -> list[Example]:
    """Examples with one answer, the class, and an empty text.

    A folder: the class of a picture is the name of the folder that it lies in; ``split`` is a folder within it. A file:
    fields ``image`` and ``label`` (a text or a number).
    """
    if data.path.is_dir():
        root = data.path if data.split is None else data.path / data.split
        if not root.is_dir():
            inside = ", ".join(sorted(printable(entry.name) for entry in data.path.iterdir() if entry.is_dir())[:8])
            raise DataError(f"{data.path} has no folder {data.split!r}; its folders: {inside}")
        data = replace(data, images=root)
        entries = _listed(root, errors)
    else:
        entries = entries_of(data.path)

    def parse(place: str, entry: Entry) -> Example:
        """One entry; :class:`Unusable` says why it is none."""
        name = field(entry, "image", "file_name", "filename")
        label = field(entry, "label", "class")
        if label == "":
            raise Unusable(
                "no class", f"{name} lies in no class folder" if data.path.is_dir() else "the label is empty"
            )
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise Unusable("wrong layout", f"the label {label!r} is neither a name nor a number")
        return Example(
            key=key_of(entry, place, "id"),
            place=place,
            images=(picture(data.folder, name),),
            text="",
            answers=(str(label),),
            kind=str(label),
            shows=str(name),
        )

    return read_examples(data, entries, parse, errors)


def _listed(root: Path, errors: Errors) -> Iterator[tuple[str, Any]]:
    """Pictures below ``root`` as entries; links are counted."""
    found = 0
    for name, regular in walk(str(root)):
        if not regular:
            errors.add(Problem(name, "link", f"{root / name}: a link or no regular file: not followed"))
        elif name.lower().endswith(PICTURES):
            found += 1
            yield name, {"image": name, "label": name.split("/")[-2] if "/" in name else "", "id": name}
    if not found:
        raise DataError(f"{root}: no pictures below it; expected a folder for each class, or a file of JSON lines")
