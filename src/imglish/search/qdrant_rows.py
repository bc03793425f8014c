"""Between rows and Qdrant's points: an id, a payload of plain JSON, a vector."""

from __future__ import annotations

import re
import uuid
from base64 import b64decode, b64encode
from typing import Any

import numpy as np

from imglish.search.store import COLUMNS, Row

_NAMES = uuid.UUID("5b7b7f1e-6f6d-4c52-9d0a-3b1a0f2c7e64")
_BYTES = ("thumbnail", "tokens")
_LISTS = ("captions", "tags")
_DIGITS = 14  # of a date with its time


def point_id(key: str) -> str:
    """The id of the point of a key; Qdrant takes numbers and UUIDs alone."""
    return str(uuid.uuid5(_NAMES, key))


def when(date: str) -> int:
    """A date, or a bound of :func:`imglish.search.filters.date_bounds`, as a number that compares as the text does."""
    digits = re.sub(r"\D", "", date)[:_DIGITS]
    return int(digits.ljust(_DIGITS, "9" if date.endswith("~") else "0"))


def payload_of(row: Row) -> dict[str, Any]:
    """``lower`` and ``when`` stand beside the columns for filters: captions in lower case, the date as a number."""
    found = {name: getattr(row, name) for name in COLUMNS}
    found |= {name: b64encode(found[name]).decode() for name in _BYTES}
    found |= {name: list(found[name]) for name in _LISTS}
    found["lower"] = [caption.lower() for caption in row.captions]
    if row.date:
        found["when"] = when(row.date)
    return found


def row_of(point: Any) -> Row:
    """The row that a point of Qdrant holds."""
    values = dict(point.payload)
    values |= {name: b64decode(values[name]) for name in _BYTES if name in values}
    values |= {name: tuple(values[name]) for name in _LISTS if name in values}
    if point.vector is not None:
        values["vector"] = np.asarray(point.vector, dtype=np.float16)
    return Row(**values)
