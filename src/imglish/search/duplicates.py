"""Pictures that are there more than once: the same bytes, or alike by perceptual hash and by their features."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from imglish.inspection.duplicates import NEAR, groups, near_pairs
from imglish.search.store import Row, Store

ALIKE = 0.9  # least cosine of near duplicates: plain pictures have equal hashes without being alike
MOST = 2_000_000  # rows; beyond these only equal bytes are looked for
_SIDE, _LOW = 32, 8


def perceptual_hash(picture: Image.Image) -> str:
    """pHash (Zauner 2010) of 64 bits as 16 hex digits: the signs of the lowest frequencies about their median."""
    grey = picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    low = _waves() @ np.asarray(grey, dtype=np.float64) @ _waves().T
    bits = np.packbits((low > np.median(low)).ravel())
    return bits.tobytes().hex()


@cache
def _waves() -> np.ndarray:
    """The first rows of the discrete cosine transform of 32 numbers, (8, 32)."""
    wave, place = np.arange(_LOW)[:, None], np.arange(_SIDE)[None, :]
    found: np.ndarray = 2 * np.cos(np.pi * wave * (2 * place + 1) / (2 * _SIDE))
    return found


def mark_duplicates(store: Store, alike: float = ALIKE) -> int:
    """Set ``duplicate_of`` of every row to the key of the first (by key) of its group; how many rows have one.

    A group is pictures of equal bytes, and pictures whose hashes differ from the first's in at most four bits and
    whose features have a cosine of at least ``alike`` with it; groups do not grow by chains. Only rows that change are
    written.
    """
    rows = [row for block in store.scan(("digest", "phash", "duplicate_of")) for row in block]
    rows.sort(key=lambda row: row.key)
    first: dict[int, int] = {}
    for group in groups(np.array([row.digest for row in rows])) if rows else []:
        if rows[int(group[0])].digest:
            first |= dict.fromkeys(map(int, group[1:]), int(group[0]))
    if len(rows) <= MOST:
        _add_near(store, rows, first, alike)
    change = {}
    for place, row in enumerate(rows):
        wanted = rows[first[place]].key if place in first else ""
        if row.duplicate_of != wanted:
            change[row.key] = wanted
    if change:
        store.mark_duplicates(change)
    return len(first)


def _add_near(store: Store, rows: list[Row], first: dict[int, int], alike: float) -> None:
    """Add near duplicates to ``first``, which maps places in ``rows`` to that of the first of their group."""
    single = [place for place, row in enumerate(rows) if place not in first and row.phash]
    hashes = np.array([int(rows[place].phash, 16) for place in single], dtype=np.uint64)
    values, where, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    pairs = [(single[int(where[i])], place) for place, i in zip(single, inverse) if single[int(where[i])] != place]
    heads = [single[int(place)] for place in where]
    pairs += [(heads[a], heads[b]) for a, b in near_pairs(values, NEAR)]
    if not pairs:
        return
    keys = list({rows[place].key for pair in pairs for place in pair})
    vectors = {key: row.vector.astype(np.float32) for key, row in store.get(keys, ("key",), vectors=True).items()}
    for one, two in sorted((min(pair), max(pair)) for pair in pairs):
        a, b = rows[one].key, rows[two].key
        if one in first or two in first or a not in vectors or b not in vectors:
            continue
        if float(vectors[a] @ vectors[b]) >= alike:
            first[two] = one
