"""Statements about several pictures: NLVR2's JSON lines, and those of ``images``, ``sentence``, ``label``."""

from __future__ import annotations

import os
from pathlib import Path

from imglish.data.errors import Errors
from imglish.data.tasks.examples import (
    Entry,
    Example,
    TaskData,
    Unusable,
    entries_of,
    key_of,
    picture,
    read_examples,
    text_field,
)

CLASSES = ("false", "true")  # in the order of the released heads


def read(data: TaskData, errors: Errors) -> list[Example]:
    """Examples with one answer, "true" or "false" (none in a test split without labels).

    NLVR2 names its pictures by the identifier: ``dev-850-0-0`` has ``dev-850-0-img0.png`` and ``-img1.png``, in folders
    by ``directory`` for the training pictures. ``kind`` is empty; ``shows`` is the set of pictures, which in NLVR2 is
    the second field of the identifier.
    """

    def parse(place: str, entry: Entry) -> Example:
        """One entry; :class:`Unusable` says why it is none."""
        key = key_of(entry, place, "identifier", "id")
        listed = entry.get("images")
        if listed is not None and not isinstance(listed, list):
            raise Unusable("wrong layout", f"the field 'images' holds {listed!r}, no list of pictures")
        images = tuple(picture(data.folder, name) for name in listed) if listed else _official(data, key, entry)
        return Example(
            key=key,
            place=place,
            images=images[: data.pictures or None],
            text=text_field(entry, "sentence", "statement", "text"),
            answers=_label(entry),
            shows="-".join(key.split("-")[:2]) if key.count("-") == 3 else "|".join(map(str, listed or [key])),
        )

    return read_examples(data, entries_of(data.path), parse, errors)


def _label(entry: Entry) -> tuple[str, ...]:
    label = entry.get("label")
    if label is None:
        return ()
    word = str(label).strip().lower()
    if word not in CLASSES:
        raise Unusable("unknown label", f"the label {label!r} is neither true nor false")
    return (word,)


def _official(data: TaskData, key: str, entry: Entry) -> tuple[Path, ...]:
    parts = key.split("-")
    if len(parts) != 4:
        raise Unusable("wrong layout", f"no list 'images', and {key!r} is no identifier of NLVR2 (split-set-pair-nr)")
    names = [f"{'-'.join(parts[:3])}-img{number}.png" for number in (0, 1)]
    split, folder = parts[0], entry.get("directory")
    places = [Path("images") / "train" / str(folder)] if folder is not None else []
    places += [Path(split), Path()]
    paths = [[picture(data.folder, str(place / name)) for name in names] for place in places]
    return next((tuple(pair) for pair in paths if os.path.isfile(pair[0])), tuple(paths[-1]))
