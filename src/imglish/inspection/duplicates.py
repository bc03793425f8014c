"""Pictures that are there several times: the same bytes, or alike by their perceptual hash."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NEAR = 4  # bits of 64 by which hashes of pictures that look alike may differ
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # first bit, bits: of NEAR + 1 bands one is equal
_BLOCK = 1024  # hashes of one band that are compared at a time
_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


def groups(labels: np.ndarray) -> list[np.ndarray]:
    """Places of equal labels, for every label that is there more than once, largest group first."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    parts = np.split(order, np.cumsum(counts)[:-1])
    return sorted((part for part in parts if len(part) > 1), key=lambda part: (-len(part), int(part[0])))


def near_groups(hashes: np.ndarray, distance: int = NEAR) -> list[np.ndarray]:
    """Places of hashes (uint64) that differ from the first of their group by at most ``distance`` bits, largest group
    first. Each place is in one group at most, and groups do not grow by chains of small differences."""
    values, firsts, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    places = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1]) if len(values) else []
    neighbours: dict[int, list[int]] = {}
    for one, two in near_pairs(values, distance):
        neighbours.setdefault(one, []).append(two)
        neighbours.setdefault(two, []).append(one)
    found: list[np.ndarray] = []
    taken = np.zeros(len(values), dtype=bool)
    for first in np.argsort(firsts, kind="stable").tolist():
        if taken[first]:
            continue
        group = [first, *(other for other in neighbours.get(first, ()) if not taken[other])]
        taken[group] = True
        members = np.concatenate([places[value] for value in group])
        if len(members) > 1:
            found.append(np.concatenate([[firsts[first]], np.setdiff1d(members, firsts[first])]))
    return sorted(found, key=lambda group: (-len(group), int(group[0])))


def near_pairs(hashes: np.ndarray, distance: int = NEAR) -> list[tuple[int, int]]:
    """All pairs of places whose hashes differ by at most ``distance`` bits (up to :data:`NEAR`), ascending. The hashes
    should be different ones: of n equal ones all pairs are listed.

    Two such hashes have at least one of the bands in common, so only those with an equal band are compared.
    """
    if not 0 <= distance <= NEAR:
        raise ValueError(f"a distance of {distance}: the bands find those up to {NEAR}")
    pairs: set[tuple[int, int]] = set()
    for first, bits in _BANDS:
        band = (hashes >> np.uint64(first)) & np.uint64((1 << bits) - 1)
        for places in groups(band):
            pairs.update(_close(hashes, places, distance))
    return sorted(pairs)


def _close(hashes: np.ndarray, places: np.ndarray, distance: int) -> Sequence[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start in range(0, len(places), _BLOCK):
        rows = places[start : start + _BLOCK]
        apart = bits_apart(hashes[rows][:, None], hashes[places][None, :])
        one, two = np.nonzero(apart <= distance)
        kept = rows[one] < places[two]
        found += zip(rows[one[kept]].tolist(), places[two[kept]].tolist())
    return found


def bits_apart(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """In how many bits two arrays of uint64 differ, uint8."""
    differ = np.bitwise_xor(one, two)[..., None].view(np.uint8)
    count: np.ndarray = _ONES[differ].sum(-1, dtype=np.uint8)
    return count


def shared(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Places in ``two`` of labels that ``one`` holds too."""
    return np.flatnonzero(np.isin(two, one))


def near_shared(one: np.ndarray, two: np.ndarray, distance: int = NEAR) -> list[tuple[int, int]]:
    """For each hash of ``two`` that is near some hash of ``one``: place in ``one``, place in ``two``."""
    values, inverse = np.unique(np.concatenate([one, two]), return_inverse=True)
    place = np.full(len(values), -1)
    place[inverse[: len(one)][::-1]] = np.arange(len(one))[::-1]  # the first place in ``one`` of every value
    near = place.copy()
    for a, b in near_pairs(values, distance):
        near[b] = place[a] if near[b] < 0 else near[b]
        near[a] = place[b] if near[a] < 0 else near[a]
    found = near[inverse[len(one) :]]
    return [(int(found[b]), int(b)) for b in np.flatnonzero(found >= 0)]
