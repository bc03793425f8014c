"""Everything that is found out about a set of data, split by split."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from imglish.data.errors import Problem
from imglish.data.records import Record
from imglish.inspection import duplicates
from imglish.inspection.captions import Captions, read_captions
from imglish.inspection.pictures import HAS_HASH, Pictures, look_at_all

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Shows how far an iteration is: (items, how many there are, what they are)."""


@dataclass(frozen=True)
class Portion:
    """Records that belong together: a split, or a source of its own. source: where they come from; keys of one source
    are names of its pictures. problems: what could not be read as a record; note: what else is to be said; texts:
    records that hold the captions, where those of the pictures do not; mixture: of which this is a part."""

    name: str
    source: str
    records: Sequence[Record]
    problems: tuple[Problem, ...] = ()
    note: str = ""
    texts: Sequence[Record] | None = None
    mixture: str = ""


@dataclass
class Seen:
    """What was found in one portion. pictures: None for texts alone; broken: pictures that cannot be read, by reason,
    and what was no record; looked: how many pictures were read."""

    portion: Portion
    captions: Captions
    pictures: Pictures | None
    looked: int
    keys: np.ndarray

    @property
    def name(self) -> str:
        """Of the split or source."""
        return self.portion.name

    def record(self, place: int) -> Record:
        """The record of the picture at ``place`` of ``pictures``."""
        assert self.pictures is not None
        return self.portion.records[int(self.pictures.numbers[place])]

    @property
    def problems(self) -> list[Problem]:
        """What was no record, and pictures that cannot be read."""
        return [*self.portion.problems, *(self.pictures.problems if self.pictures is not None else [])]


@dataclass(frozen=True)
class Overlap:
    """What ``two`` shares with ``one``: records of the same name, pictures of the same bytes (places in both), pictures
    that look alike (places in both; None where hashes were not computed), captions of the same words. mixed: both are
    parts of one mixture."""

    one: str
    two: str
    keys: int
    same: list[tuple[int, int]]
    near: list[tuple[int, int]] | None
    captions: int
    mixed: bool = False

    @property
    def leaks(self) -> bool:
        """Whether pictures of one split stand in the other for certain."""
        return not self.mixed and bool(self.keys or self.same)


@dataclass
class Survey:
    """same, near: groups of (portion, place in its pictures), largest first."""

    seen: list[Seen]
    same: list[list[tuple[int, int]]] = field(default_factory=list)
    near: list[list[tuple[int, int]]] | None = None
    overlaps: list[Overlap] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        """Problems by reason."""
        return Counter(problem.reason for seen in self.seen for problem in seen.problems)

    @property
    def records(self) -> int:
        """Of all portions."""
        return sum(len(seen.portion.records) for seen in self.seen)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain data."""
        return {
            "splits": {
                seen.name: {
                    "records": len(seen.portion.records),
                    "pictures_read": seen.looked,
                    "captions": len(seen.captions),
                    "mean_words": float(seen.captions.lengths.mean()) if len(seen.captions) else None,
                    "languages": dict(seen.captions.languages.most_common()),
                    "broken": dict(Counter(problem.reason for problem in seen.problems)),
                }
                for seen in self.seen
            },
            "exact_copies": sum(len(group) - 1 for group in self.same),
            "near_duplicates": None if self.near is None else sum(len(group) - 1 for group in self.near),
            "shared": [
                {
                    "in": overlap.one,
                    "of": overlap.two,
                    "names": overlap.keys,
                    "bytes": len(overlap.same),
                    "look_alike": None if overlap.near is None else len(overlap.near),
                    "captions": overlap.captions,
                    "parts_of_a_mixture": overlap.mixed,
                }
                for overlap in self.overlaps
            ],
        }


def _quiet(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    return items


def survey(
    portions: Sequence[Portion], most: int | None = None, workers: int | None = None, progress: Progress = _quiet
) -> Survey:
    """Read all captions, and of each portion all pictures or ``most`` of them, evenly spread. Compare within and
    between portions. workers: processes that read pictures (None: one a core)."""
    found = Survey([_see(portion, most, workers, progress) for portion in portions])
    columns = [seen.pictures for seen in found.seen if seen.pictures is not None]
    places = [(number, place) for number, seen in enumerate(found.seen) for place in range(_count(seen))]
    if columns:
        digests = np.concatenate([pictures.digests for pictures in columns])
        found.same = [[places[i] for i in group] for group in duplicates.groups(digests)]
        if HAS_HASH:
            _, first = np.unique(digests, return_index=True)
            first.sort()  # of pictures with the same bytes the first stands for all
            hashes = np.concatenate([pictures.hashes for pictures in columns])[first]
            found.near = [[places[first[i]] for i in group] for group in duplicates.near_groups(hashes)]
    found.overlaps = [_overlap(one, two) for one, two in itertools.combinations(found.seen, 2)]
    return found


def _count(seen: Seen) -> int:
    return len(seen.pictures) if seen.pictures is not None else 0


def _see(portion: Portion, most: int | None, workers: int | None, progress: Progress) -> Seen:
    records, total = portion.records, len(portion.records)
    keys: list[int] = []

    def noted(items: Iterable[Record]) -> Iterable[Record]:
        for record in items:
            keys.append(hash(record.key))
            yield record

    if portion.texts is None:
        captions = read_captions(noted(progress(records, total, f"{portion.name}: captions")))
    else:
        captions = read_captions(progress(portion.texts, len(portion.texts), f"{portion.name}: texts"))
        keys = [hash(record.key) for record in records]
    pictures, looked = None, 0
    if total and records[0].image is not None:
        looked = total if most is None else min(most, total)
        numbers = np.unique(np.linspace(0, total - 1, looked).round().astype(np.int64))
        what = f"{portion.name}: pictures"
        pictures = look_at_all(records, numbers, workers, lambda looks: progress(looks, len(numbers), what))
    return Seen(portion, captions, pictures, looked, np.array(keys, dtype=np.int64))


def _overlap(one: Seen, two: Seen) -> Overlap:
    same: list[tuple[int, int]] = []
    near: list[tuple[int, int]] | None = None
    if one.pictures is not None and two.pictures is not None:
        same = _same(one.pictures.digests, two.pictures.digests)
        if HAS_HASH:
            equal = {b for _, b in same}
            pairs = duplicates.near_shared(one.pictures.hashes, two.pictures.hashes)
            near = [(a, b) for a, b in pairs if b not in equal]
    keys = len(duplicates.shared(one.keys, two.keys)) if one.portion.source == two.portion.source else 0
    captions = len(duplicates.shared(one.captions.texts, two.captions.texts))
    mixed = one.portion.mixture == two.portion.mixture != ""
    return Overlap(one.name, two.name, keys, same, near, captions, mixed)


def _same(one: np.ndarray, two: np.ndarray) -> list[tuple[int, int]]:
    place: dict[int, int] = {}
    for number, digest in enumerate(one.tolist()):
        place.setdefault(digest, number)
    return [(place[digest], number) for number, digest in enumerate(two.tolist()) if digest in place]
