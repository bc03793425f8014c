"""Conditions on what is known of a picture, as a small language: never a piece of a database's own.

    date >= 2021-06 and path starts 'holiday/'
    tag = 'dress' and not (width < 400 or caption contains 'sketch')

A text is parsed to a tree; each store translates the tree with the values as values, so nothing that a person writes
reaches a database as code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imglish.search.store import Row

NAMES = {
    "path": "key",
    "key": "key",
    "date": "date",
    "tag": "tags",
    "tags": "tags",
    "caption": "captions",
    "captions": "captions",
    "width": "width",
    "height": "height",
    "duplicate_of": "duplicate_of",
    "source": "source",
}
_EXACT, _ORDER = ("=", "!="), ("=", "!=", "<", "<=", ">", ">=")
OPERATORS = {
    "key": (*_EXACT, "starts", "contains"),
    "source": (*_EXACT, "starts"),
    "duplicate_of": _EXACT,
    "date": _ORDER,
    "tags": _EXACT,
    "captions": ("contains",),
    "width": _ORDER,
    "height": _ORDER,
}
LONGEST = 2000  # characters of a filter
MOST = 100  # conditions and brackets
_TOKEN = re.compile(r"""\s*(?:'((?:[^']|'')*)'|"([^"]*)"|(<=|>=|!=|==|=|<|>|\(|\))|([^\s()<>=!'"]+))""")
_DATE = re.compile(r"\d{4}(-\d\d(-\d\d([T ]\d\d:\d\d(:\d\d)?)?)?)?")


class FilterError(ValueError):
    """A filter that cannot be understood; the message says where and what is known."""


@dataclass(frozen=True)
class Condition:
    """``field op value``; field: a column of :class:`imglish.search.store.Row`; value: an int for width and height."""

    field: str
    op: str
    value: str | int


@dataclass(frozen=True)
class Both:
    """``A and B``."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True)
class Either:
    """``A or B``."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True)
class Not:
    """``not A``."""

    part: Filter


Filter = Condition | Both | Either | Not


def parse(text: str | None) -> Filter | None:
    """The tree of a filter, None for an empty one. Raises :class:`FilterError`."""
    if text is None or not text.strip():
        return None
    if len(text) > LONGEST:
        raise FilterError(f"a filter of {len(text):,} characters: the longest allowed is {LONGEST:,}")
    return _Parser(text).whole()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, bool]] = []  # token, whether it was quoted
        self.at, self.depth = 0, 0
        place = 0
        while place < len(text.rstrip()):
            found = _TOKEN.match(text, place)
            if found is None:
                raise FilterError(f"filter: cannot read {text[place : place + 20].strip()!r}")
            single, double, sign, word = found.groups()
            if single is not None:
                self.tokens.append((single.replace("''", "'"), True))
            elif double is not None:
                self.tokens.append((double, True))
            else:
                self.tokens.append((sign or word, False))
            place = found.end()
        if len(self.tokens) > 4 * MOST:
            raise FilterError(f"filter: more than {MOST} conditions")

    def whole(self) -> Filter:
        found = self.either()
        if self.at < len(self.tokens):
            raise FilterError(f"filter: expected 'and', 'or' or the end, found {self.tokens[self.at][0]!r}")
        return found

    def either(self) -> Filter:
        parts = [self.both()]
        while self.word("or"):
            parts.append(self.both())
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def both(self) -> Filter:
        parts = [self.one()]
        while self.word("and"):
            parts.append(self.one())
        return parts[0] if len(parts) == 1 else Both(tuple(parts))

    def one(self) -> Filter:
        """A condition, a filter in brackets, or the opposite of either."""
        self.depth += 1
        if self.depth > MOST:
            raise FilterError(f"filter: nested more than {MOST} deep")
        try:
            if self.word("not"):
                return Not(self.one())
            if self.word("("):
                inner = self.either()
                if not self.word(")"):
                    raise FilterError("filter: a bracket is not closed")
                return inner
            return self.condition()
        finally:
            self.depth -= 1

    def word(self, wanted: str) -> bool:
        if self.at < len(self.tokens):
            token, quoted = self.tokens[self.at]
            if not quoted and token.lower() == wanted:
                self.at += 1
                return True
        return False

    def take(self, what: str) -> str:
        if self.at >= len(self.tokens):
            raise FilterError(f"filter: ends where {what} is expected")
        self.at += 1
        return self.tokens[self.at - 1][0]

    def condition(self) -> Condition:
        """Field, operator and value, which must fit one another."""
        name = self.take("a field").lower()
        if name not in NAMES:
            raise FilterError(f"filter: there is no field {name!r}; known: {', '.join(NAMES)}")
        field = NAMES[name]
        op = self.take("an operator").lower()
        op = {"==": "=", "startswith": "starts", "is": "="}.get(op, op)
        if op not in OPERATORS[field]:
            raise FilterError(f"filter: {name} {op} is not known; {name} has {' '.join(OPERATORS[field])}")
        value = self.take("a value")
        if field in ("width", "height"):
            if not value.isdecimal() or len(value) > 9:
                raise FilterError(f"filter: {name} is a number of pixels, not {value!r}")
            return Condition(field, op, int(value))
        if field == "date":
            if not _DATE.fullmatch(value):
                raise FilterError(f"filter: {value!r} is no date; write 2021, 2021-06, 2021-06-30 or 2021-06-30T12:00")
            return Condition(field, op, value.replace(" ", "T"))
        return Condition(field, op, value)


def date_bounds(value: str) -> tuple[str, str]:
    """What a date, of any precision, begins with and ends before: texts that compare as the dates do."""
    return value, value + "~"  # after every digit, "-", ":" and "T"


def accepts(where: Filter, row: Row) -> bool:
    """Whether a row has what the filter asks for. An unknown date is neither before nor after anything."""
    if isinstance(where, Both):
        return all(accepts(part, row) for part in where.parts)
    if isinstance(where, Either):
        return any(accepts(part, row) for part in where.parts)
    if isinstance(where, Not):
        return not accepts(where.part, row)
    value = getattr(row, where.field)
    if where.field == "tags":
        return (where.value in value) == (where.op == "=")
    if where.field == "captions":
        return any(str(where.value).lower() in caption.lower() for caption in value)
    if where.field == "date":
        return _date(str(value), where.op, str(where.value))
    return _COMPARE[where.op](value, where.value)


def _date(value: str, op: str, wanted: str) -> bool:
    low, high = date_bounds(wanted)
    if not value:
        return False
    return {
        "=": low <= value < high,
        "!=": not low <= value < high,
        "<": value < low,
        "<=": value < high,
        ">": value >= high,
        ">=": value >= low,
    }[op]


_COMPARE: dict[str, Callable[..., bool]] = {
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "starts": lambda a, b: a.startswith(b),
    "contains": lambda a, b: b in a,
}
