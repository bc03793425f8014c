"""Retrieval recalls by counting ranks, and the compositional scores of Winoground.

A query's rank is the number of wrong candidates that score above its best right one, so no list is ever sorted:
a comparison and a sum for each row. Ties are a decision, not an accident of a sort: see :data:`TIES`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Ties = Literal["pessimistic", "optimistic", "stable_reversed"]
"""Who wins a tie with the best right candidate: ``pessimistic``: the wrong ones (a constant scorer gets 0 %);
``optimistic``: the right one (100 %); ``stable_reversed``: the later candidate, as a stable ``argsort()[::-1]`` orders
them, which is what ALBEF's and BLIP's evaluation does up to the instability of their sort."""
TIES: tuple[Ties, ...] = ("pessimistic", "optimistic", "stable_reversed")

ScoreRows = Callable[[int, int], Tensor]
"""Scores ``(high - low, C)`` of the queries ``low .. high - 1`` against all C candidates."""


class ScoreError(ValueError):
    """Scores that cannot be ranked: not a number, or of the wrong shape."""


def ranks(
    scores: Tensor | ScoreRows,
    query_labels: Tensor,
    candidate_labels: Tensor,
    *,
    ties: Ties = "pessimistic",
    not_itself: bool = False,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Rank of every query's best right candidate, and whether a tie touches it.

    ``scores``: ``(Q, C)``, or a function that gives rows of it, so that ``chunk * C`` numbers are all that is held.
    ``query_labels`` ``(Q,)`` and ``candidate_labels`` ``(C,)`` int64: a candidate is right for a query where they are
    equal. ``not_itself``: candidate q is query q and does not count (searching a set with its own members).

    Returns ranks ``(Q,)`` int64, 0 = first, -1 where a query has no right candidate; and bool ``(Q,)``: a wrong
    candidate scores exactly what the best right one does. Raises :class:`ScoreError` on NaN or on a wrong shape.
    """
    if ties not in TIES:
        raise ValueError(f"ties={ties!r}: choose one of {', '.join(TIES)}")
    query_labels, candidate_labels = query_labels.cpu(), candidate_labels.cpu()
    queries, candidates = len(query_labels), len(candidate_labels)
    if isinstance(scores, Tensor) and scores.shape != (queries, candidates):
        raise ScoreError(f"scores have shape {tuple(scores.shape)}, the labels say ({queries}, {candidates})")
    found, tied = [], []
    for low in range(0, queries, chunk):
        high = min(low + chunk, queries)
        rows = scores[low:high] if isinstance(scores, Tensor) else scores(low, high)
        if rows.isnan().any():
            query, candidate = (rows.isnan().nonzero()[0] + torch.tensor([low, 0], device=rows.device)).tolist()
            raise ScoreError(f"the score of query {query} and candidate {candidate} is not a number")
        right = query_labels[low:high, None] == candidate_labels[None, :]
        counted = torch.ones_like(right)
        if not_itself:
            counted[torch.arange(high - low), torch.arange(low, high)] = False
        rank, tie = _rank_rows(rows, (right & counted).to(rows.device), (~right & counted).to(rows.device), ties)
        found.append(rank.cpu())
        tied.append(tie.cpu())
    empty = torch.zeros(0, dtype=torch.int64)
    return torch.cat([empty, *found]), torch.cat([empty.bool(), *tied])


def _rank_rows(rows: Tensor, right: Tensor, wrong: Tensor, ties: Ties) -> tuple[Tensor, Tensor]:
    best = rows.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    above = (wrong & (rows > best)).sum(1)
    equal = wrong & (rows == best)
    tie = equal.any(1)
    if ties == "pessimistic":
        above = above + equal.sum(1)
    elif ties == "stable_reversed":
        place = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        last = place.masked_fill(~(right & (rows == best)), -1).amax(dim=1, keepdim=True)
        above = above + (equal & (place > last)).sum(1)
    none = ~right.any(1)
    return above.masked_fill(none, -1), tie & ~none


def beyond(ks: Sequence[int], candidates: int) -> str:
    """A remark on the k that exceed the number of candidates, so that every query is a hit; empty without any."""
    names = ", ".join(f"R@{k}" for k in ks if k > candidates)
    return f"{names} over {candidates} candidates is R@{candidates}, always 100 %" if names else ""


def recall_table(rank: Tensor, tied: Tensor, ks: Sequence[int], prefix: str) -> dict[str, float]:
    """Percent of queries within each k, their mean, and the tie rate; queries of rank -1 are left out."""
    asked = rank >= 0
    count = int(asked.sum())
    if not count:
        raise ScoreError(f"{prefix}: no query has a right candidate")
    table = {f"{prefix}_r{k}": 100.0 * int((asked & (rank < k)).sum()) / count for k in ks}
    table[f"{prefix}_mean"] = sum(table.values()) / len(ks)
    table[f"{prefix}_ties"] = 100.0 * int(tied.sum()) / count
    return table


def recalls(
    scores: Tensor | ScoreRows,
    owner: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    ties: Ties = "pessimistic",
    *,
    scores_t2i: Tensor | ScoreRows | None = None,
    images: int | None = None,
    chunk: int = 1024,
) -> dict[str, float]:
    """Recalls in percent of image-to-text (a hit if any of the picture's captions is in the first k) and text-to-image.

    ``scores`` ``(I, T)``: pictures against captions; ``owner`` ``(T,)`` int64: the picture of each caption, several
    captions a picture. ``scores_t2i`` ``(T, I)``: other scores for the text queries (a reranked list need not be the
    same both ways); left out, ``scores`` is used. With functions in place of matrices both are needed, and ``images``.

    Keys: ``i2t_r1 .. i2t_mean i2t_ties``, the same for ``t2i``, and ``r_mean``, the mean of both means. A k above the
    number of candidates is clamped to it, with a warning.
    """
    if isinstance(scores, Tensor):
        images = scores.shape[0]
        if scores_t2i is None:
            scores_t2i = scores.T
    if scores_t2i is None or images is None:
        raise ValueError("scores given as a function need scores_t2i and the number of images too")
    owner = owner.to(torch.int64).cpu()
    if len(owner) and not 0 <= int(owner.min()) <= int(owner.max()) < images:
        raise ScoreError(f"owner names picture {int(owner.max())}, there are {images}")
    pictures = torch.arange(images)
    to_text, tied_text = ranks(scores, pictures, owner, ties=ties, chunk=chunk)
    to_image, tied_image = ranks(scores_t2i, owner, pictures, ties=ties, chunk=chunk)
    if (to_text < 0).any():
        raise ScoreError(f"picture {int((to_text < 0).nonzero()[0])} has no caption")
    if remark := beyond(ks, min(images, len(owner))):
        warnings.warn(remark, stacklevel=2)
    return both_ways(to_text, tied_text, to_image, tied_image, ks)


def both_ways(
    to_text: Tensor, tied_text: Tensor, to_image: Tensor, tied_image: Tensor, ks: Sequence[int]
) -> dict[str, float]:
    """The dictionary of :func:`recalls` from the ranks of both directions."""
    table = recall_table(to_text, tied_text, ks, "i2t")
    table |= recall_table(to_image, tied_image, ks, "t2i")
    table["r_mean"] = (table["i2t_mean"] + table["t2i_mean"]) / 2
    return table


def recalls_within(
    features: Tensor, labels: Tensor, prefix: str, ks: Sequence[int] = (1, 5, 10), ties: Ties = "pessimistic"
) -> dict[str, float] | None:
    """Recalls of a set searched with its own members: picture to picture, caption to caption.

    ``features`` ``(N, E)`` L2-normalised; ``labels`` ``(N,)`` int64: members of one label find each other. None where
    no two members share a label; members without a partner are candidates but no queries (``<prefix>_queries``).
    """
    if len(labels) == len(labels.unique()):
        return None
    rank, tied = ranks(lambda a, b: features[a:b] @ features.T, labels, labels, ties=ties, not_itself=True)
    table = recall_table(rank, tied, ks, prefix)
    table[f"{prefix}_queries"] = float((rank >= 0).sum())
    return table


def binding_correct(scores: Tensor) -> dict[str, Tensor]:
    """Which quadruples are right, after Winoground (Thrush et al. 2022, section 3): bool ``(Q,)`` for each score.

    ``scores`` ``(Q, 2, 2)``: two pictures (dim 1) and two captions (dim 2) that differ in who has what; caption c
    belongs to picture c. ``text``: each picture prefers its caption; ``image``: each caption prefers its picture;
    ``group``: both. Strictly: a tie is wrong. Chance is 25, 25 and 16.7 %.
    """
    if scores.shape[1:] != (2, 2):
        raise ScoreError(f"quadruples have shape (Q, 2, 2), not {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ScoreError(f"quadruple {int(scores.isnan().nonzero()[0, 0])} has a score that is not a number")
    text = (scores[:, 0, 0] > scores[:, 0, 1]) & (scores[:, 1, 1] > scores[:, 1, 0])
    image = (scores[:, 0, 0] > scores[:, 1, 0]) & (scores[:, 1, 1] > scores[:, 0, 1])
    return {"text": text, "image": image, "group": text & image}


def binding_scores(scores: Tensor) -> dict[str, float]:
    """Percent of right quadruples: ``text``, ``image`` and ``group`` of :func:`binding_correct`."""
    return {name: 100.0 * float(right.double().mean()) for name, right in binding_correct(scores).items()}


def pairwise_correct(true: Tensor, false: Tensor, ties: Ties = "pessimistic") -> Tensor:
    """Which pairs of captions are right, bool ``(Q,)``: the true one scores above the false one of the same picture.

    SugarCrepe and ARO. ``true``, ``false``: ``(Q,)``. A tie is wrong, as in SugarCrepe's own code and where ARO
    lists the false caption first; ``ties="optimistic"`` counts it right, as CLIP_benchmark does.
    """
    if ties not in ("pessimistic", "optimistic"):
        raise ValueError(f"ties={ties!r}: pairs know pessimistic and optimistic")
    if true.shape != false.shape or true.ndim != 1:
        raise ScoreError(f"{tuple(true.shape)} scores of true captions, {tuple(false.shape)} of false ones")
    if (nan := true.isnan() | false.isnan()).any():
        raise ScoreError(f"pair {int(nan.nonzero()[0])} has a score that is not a number")
    return true >= false if ties == "optimistic" else true > false


def percent_by_group(right: Tensor, groups: Sequence[str], least: int = 1) -> dict[str, float]:
    """Percent of ``right`` ``(Q,)`` in each group of at least ``least`` members, by name; ARO's macro accuracy is their
    mean (over relations; over attributes with ``least=25``)."""
    if len(right) != len(groups):
        raise ScoreError(f"{len(right)} results, {len(groups)} names of groups")
    members: dict[str, list[bool]] = {}
    for hit, name in zip(right.tolist(), groups, strict=True):
        members.setdefault(name, []).append(hit)
    kept = {name: hits for name, hits in sorted(members.items()) if len(hits) >= least}
    return {name: 100.0 * sum(hits) / len(hits) for name, hits in kept.items()}
