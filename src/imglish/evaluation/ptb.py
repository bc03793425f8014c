"""Captions to tokens by the conventions of the Penn Treebank, lower case and without punctuation, as coco-caption does.

The reference is a Java program (Stanford's PTBTokenizer 3.4.1 with a list of punctuation dropped afterwards). This is
its behaviour on captions: clitics apart (``isn't`` -> ``is n't``), hyphenated words whole, brackets as ``-lrb-``.
It knows fewer abbreviations, and rare things (web addresses, smileys, forms like ``o'clock'll``) come out otherwise.
"""

from __future__ import annotations

import re

_ABBREVIATIONS = "mr|mrs|ms|dr|st|jr|sr|vs|prof|gen|rep|sen|lt|col|sgt|rev|capt|inc|ltd|corp|co|bros|ave|blvd|etc"
_TOKEN = re.compile(
    rf"""
    (?:[a-z]\.){{2,}}                              # u.s., p.m.
  | (?:{_ABBREVIATIONS})\.(?!\w)                   # mr. smith
  | \d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?(?![^\W\d_]) # 3.5, 1,000, 6:30, 1/2, 6th, 1960s
  | (?:[^\W_]|\d)+(?:[-&_@./][^\W_]+|(?<=\d)[.,:]\d+|['’](?!s\b|re\b|ve\b|ll\b|d\b|m\b)[^\W_]+)*   # words
  | ['’](?:(?:s|re|ve|ll|d|m|em|n|cause)\b|t(?=\ (?:is|was)\b))  # clitics
  | \.{{2,}} | -{{2,}} | ``|'' | \S
    """,
    re.VERBOSE,
)
_NEGATED = re.compile(r"^([a-z]+)(n['’]t)$")
_SPLIT = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "lemme": "lem me",
}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = frozenset(
    ["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"', "“", "”", "‘", "’", "…"]
)


def tokenized(text: str) -> str:
    """Tokens of ``text`` apart by single spaces; an empty text gives an empty string."""
    text = re.sub(r"['’]t(is|was)\b", r"'t \1", text.lower())
    found: list[str] = []
    for token in _TOKEN.findall(text):
        if token in _DROPPED or set(token) <= set(".-"):
            continue
        if (negated := _NEGATED.match(token)) is not None:
            found += [negated[1], "n't"]
        else:
            found.append(_SPLIT.get(token) or _BRACKETS.get(token) or token.replace("’", "'"))
    return " ".join(found)
