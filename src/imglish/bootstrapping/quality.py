"""How good a filter is, where the truth about each pair is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imglish.data.errors import DataError, Problem
from imglish.data.sources.rows import read_rows


@dataclass(frozen=True)
class Quality:
    """Of keeping every pair with a score of at least a threshold, a clean pair being what is looked for. thresholds
    rise; precision: share of clean ones among the kept (NaN where none is kept); recall: of the clean ones that are
    kept; kept: share of all; float64 ``(T,)``. auc: chance that a clean pair has the higher score, ties half."""

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    kept: np.ndarray
    auc: float


def quality(scores: np.ndarray, clean: np.ndarray, thresholds: Sequence[float] | np.ndarray) -> Quality:
    """scores: ``(N,)``, NaN is below everything; clean: bool ``(N,)``, of both kinds at least one."""
    scores = np.nan_to_num(np.asarray(scores, np.float64), nan=-np.inf)
    limits, clean = np.sort(np.asarray(thresholds, np.float64)), np.asarray(clean, bool)
    good, bad = np.sort(scores[clean]), np.sort(scores[~clean])
    if not len(good) or not len(bad):
        raise DataError("precision and recall need clean and noisy pairs")
    above, below = len(good) - np.searchsorted(good, limits), len(bad) - np.searchsorted(bad, limits)
    total = above + below
    precision = np.divide(above, total, out=np.full(len(limits), np.nan), where=total > 0)
    wins = np.searchsorted(bad, good, "left").sum() + np.searchsorted(bad, good, "right").sum()
    return Quality(limits, precision, above / len(good), total / len(scores), float(wins / (2 * len(good) * len(bad))))


def read_truth(path: str, field: str = "noise") -> dict[tuple[str, str], str]:
    """(picture, caption) -> kind of noise, empty for a clean one, of rows whose ``field`` has an entry for each of
    ``captions`` (`imglish data scenes --wrong ...` writes such). Raises :class:`DataError`."""
    found: dict[tuple[str, str], str] = {}
    for row in read_rows(path):
        if isinstance(row, Problem):
            continue
        captions, kinds, image = (row.fields.get(name) for name in ("captions", field, "image"))
        if isinstance(captions, list) and isinstance(kinds, list) and len(captions) == len(kinds):
            found.update(((str(image), str(text)), str(kind)) for text, kind in zip(captions, kinds))
    if not found:
        raise DataError(f"{path}: no row has captions with a list {field!r} beside them")
    return found


def truth_of(table: Any, truth: Mapping[tuple[str, str], str]) -> tuple[np.ndarray, np.ndarray]:
    """Of rows with ``key`` and ``text``: which are clean, and of which the truth is known; bool ``(N,)`` each."""
    pairs = zip(table["key"].to_pylist(), table["text"].to_pylist())
    kinds = [truth.get(pair) for pair in pairs]
    return np.array([kind == "" for kind in kinds], bool), np.array([kind is not None for kind in kinds], bool)
