"""Visual entailment: SNLI-VE's JSON lines, a Flickr30k picture as the premise, a sentence as the hypothesis."""

from __future__ import annotations

from imglish.data.errors import Errors
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
    text_field,
)

CLASSES = ("contradiction", "neutral", "entailment")  # in the order of ALBEF's released head


def read(data: TaskData, errors: Errors) -> list[Example]:
    """Examples with one answer, the class; ``sentence1`` (the caption that SNLI was made with) is not read."""

    def parse(place: str, entry: Entry) -> Example:
        """One entry; :class:`Unusable` says why it is none."""
        name = field(entry, "Flickr30K_ID", "Flikr30kID", "image")
        if isinstance(name, int) or (isinstance(name, str) and name.isdigit()):
            name = f"{name}.jpg"
        label = field(entry, "gold_label", "label")
        if label not in CLASSES:
            raise Unusable("unknown label", f"the label {label!r} is none of {', '.join(CLASSES)}")
        return Example(
            key=key_of(entry, place, "pairID", "id"),
            place=place,
            images=(picture(data.folder, name),),
            text=text_field(entry, "sentence2", "hypothesis", "sentence", "text"),
            answers=(label,),
            kind=label,
            shows=str(name),
        )

    return read_examples(data, entries_of(data.path), parse, errors)
