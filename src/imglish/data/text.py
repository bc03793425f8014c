"""Caption clean-up by the rules of the published models, and words that forbid mirroring a picture."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from imglish.data.records import Record

CaptionStyle = Literal["albef", "blip", "none"]

_DROPPED = {
    "albef": re.compile(r"[,.'!?\"()*#:;~]"),
    "blip": re.compile(r"[.!\"()*#:;~]"),
}
_SPACES = re.compile(r"\s{2,}")
_SIDES = re.compile(
    r"\b(?:left|right|leftmost|rightmost|lefthand|righthand"
    r"|links|rechts|linken?[rsnm]?|rechte[rsnm]?|gauche|droite?)\b|[左右]",
    re.IGNORECASE,
)


def clean_caption(text: str, max_words: int = 30, style: CaptionStyle = "albef") -> str:
    """A caption as the published model saw it in training.

    ALBEF (``dataset/utils.py``) drops punctuation, opens hyphens and slashes, and turns ``<person>`` into ``person``;
    BLIP (``data/utils.py``) puts spaces for less punctuation and keeps the rest. Both lower-case, join runs of
    spaces and keep ``max_words`` words. ``none`` only strips the ends.
    """
    if style == "none":
        return text.strip()
    text = _plain(text, style, gap=" ")
    if style == "albef":
        text = text.replace("<person>", "person")
    text = _SPACES.sub(" ", text).rstrip("\n").strip(" ")
    return _first_words(text, max_words)


def clean_record(record: Record, max_words: int, style: CaptionStyle) -> Record:
    """The record with its captions, and its wrong captions, as :func:`clean_caption` has them."""
    captions, swapped = (
        tuple(clean_caption(text, max_words, style) for text in texts) for texts in (record.captions, record.swapped)
    )
    return replace(record, captions=captions, swapped=swapped)


def clean_question(text: str, max_words: int = 50, style: CaptionStyle = "albef") -> str:
    """A question as the published model saw it: inner runs of spaces and ``<person>`` stay, BLIP drops punctuation."""
    if style == "none":
        return text.strip()
    return _first_words(_plain(text, style, gap="").rstrip(" "), max_words)


def _plain(text: str, style: Literal["albef", "blip"], gap: str) -> str:
    """Lower case without punctuation; ``gap`` stands where BLIP's was."""
    if style == "blip":
        return _DROPPED["blip"].sub(gap, text.lower())
    return re.sub(r"[-/]", " ", _DROPPED["albef"].sub("", text.lower()))


def _first_words(text: str, max_words: int) -> str:
    words = text.split(" ")
    return " ".join(words[:max_words]) if len(words) > max_words else text


def mentions_side(text: str) -> bool:
    """Whether the text speaks of left or right, so that its picture must not be mirrored.

    English, Chinese, German and French words; a false alarm ("has left") only costs one augmentation.
    """
    return _SIDES.search(text) is not None
