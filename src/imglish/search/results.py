"""What a search gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class SearchHit:
    """One picture of a list. rank, rank_before: its place, from 1, after and before reranking; cosine: dot product of
    the towers (with negative words or with words and a picture: of what they were combined to); match: the probability
    that the words and the picture belong together, with negative words P(words) (1 - P(not words)), None where the
    fusion tower has not looked at it; what stands higher never has a smaller one; excluded: P(not words)."""

    key: str
    rank: int
    rank_before: int
    cosine: float
    match: float | None = None
    excluded: float | None = None
    captions: tuple[str, ...] = ()
    date: str = ""
    tags: tuple[str, ...] = ()
    width: int = 0
    height: int = 0
    duplicate_of: str = ""

    @property
    def moved(self) -> int:
        """How many places reranking has moved it up (negative: down)."""
        return self.rank_before - self.rank


@dataclass(frozen=True)
class Results:
    """hits: the page that was asked for; total: how many pictures the filter lets through; more: whether there is a
    next page; reranked: how many pictures the fusion tower has looked at; calibrated: whether ``match`` is calibrated
    on held-out pairs; no_good_match: a ``min_match`` was asked for and no picture reaches it; notes: what the person
    should know; seconds: wall clock of each part, of all queries that were searched
    together."""

    hits: tuple[SearchHit, ...]
    total: int
    more: bool = False
    reranked: int = 0
    calibrated: bool = False
    no_good_match: bool = False
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.hits)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        found = asdict(self)
        for plain, hit in zip(found["hits"], self.hits):
            plain["moved"] = hit.moved
        return found
