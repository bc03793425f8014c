"""Questions about pictures: VQA v2's two files, and JSON (lines) with ``image``, ``question``, ``answers``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from imglish.data.errors import DataError, Errors, Problem
from imglish.data.tasks.examples import (
    Entry,
    Example,
    TaskData,
    Unusable,
    answers_field,
    entries_of,
    field,
    key_of,
    parsed,
    picture,
    read_examples,
    text_field,
    text_of,
)


def read(data: TaskData, errors: Errors) -> list[Example]:
    """Examples whose ``answers`` are those of all people who were asked (ten in VQA v2), as they wrote them."""
    if data.path.suffix == ".json":
        whole = parsed(text_of(data.path), data.path.name)
        if isinstance(whole, dict):
            return _official(data, whole, errors)

    def parse(place: str, entry: Entry) -> Example:
        """One entry; :class:`Unusable` says why it is none."""
        name = field(entry, "image", "image_path", "file_name")
        return Example(
            key=key_of(entry, place, "question_id", "id"),
            place=place,
            images=(picture(data.folder, name),),
            text=text_field(entry, "question", "text"),
            answers=answers_field(entry, "answers", "answer"),
            kind=str(entry.get("answer_type", "")),
            shows=str(name),
        )

    return read_examples(data, entries_of(data.path), parse, errors)


def _official(data: TaskData, whole: Mapping[str, Any], errors: Errors) -> list[Example]:
    """VQA v2: questions in one file, annotations in another, pictures by number."""
    questions = whole.get("questions")
    if not isinstance(questions, list):
        raise DataError(f"{data.path}: an object without a list 'questions' is no file of VQA v2 questions")
    path = data.annotations or _annotations_beside(data.path)
    answered = None if path is None else _annotations(path, errors)

    def parse(place: str, entry: Entry) -> Example:
        """One entry; :class:`Unusable` says why it is none."""
        question, image = _number(entry, "question_id"), _number(entry, "image_id")
        held: Entry = {}
        if answered is not None:
            if question not in answered:
                raise Unusable("no answers", f"{path} has no answers to question {question}")
            held = answered[question]
        return Example(
            key=str(question),
            place=place,
            images=(_coco(data.folder, str(whole.get("data_subtype", "")), image),),
            text=text_field(entry, "question"),
            answers=answers_field(held, "answers"),
            kind=str(held.get("answer_type", "")),
            shows=str(image),
        )

    return read_examples(data, _numbered(questions, data.path.name), parse, errors)


def _numbered(entries: list[Any], name: str) -> Iterator[tuple[str, Any]]:
    for number, entry in enumerate(entries, 1):
        yield f"{name}, entry {number}", entry


def _annotations_beside(questions: Path) -> Path | None:
    """``v2_OpenEnded_mscoco_train2014_questions.json`` has ``v2_mscoco_train2014_annotations.json`` beside it."""
    name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    path = questions.with_name(name)
    return path if name != questions.name and path.is_file() else None


def _annotations(path: Path, errors: Errors) -> dict[int, Entry]:
    """By question; what is not of one, or of one that has been answered before, is counted in ``errors``."""
    whole = parsed(text_of(path), path.name)
    entries = whole.get("annotations") if isinstance(whole, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: no list 'annotations' of objects, so this is no file of VQA v2 annotations")
    found: dict[int, Entry] = {}
    for place, entry in _numbered(entries, path.name):
        try:
            if (question := _number(entry, "question_id")) in found:
                raise Unusable("comes twice", f"question {question} has answers already")
            found[question] = entry
        except Unusable as error:
            errors.add(Problem(place, error.reason, f"{place}: {error}"))
    return found


def _number(entry: Entry, name: str) -> int:
    value = field(entry, name)
    if not isinstance(value, int):
        raise Unusable("wrong layout", f"the field {name!r} holds {value!r}, no whole number")
    return value


def _coco(folder: Path, subtype: str, number: int) -> Path:
    """Picture ``number`` in the places where COCO's archives put it."""
    old = f"COCO_{subtype}_{number:012d}.jpg"
    places = (folder / old, folder / subtype / old, folder / f"{number:012d}.jpg")
    return next((path for path in places if path.is_file()), places[0])
