"""BLEU, ROUGE-L and CIDEr-D of captions as coco-caption computes them, from strings of tokens apart by spaces.

Captions and references become tokenized strings by :func:`imglish.evaluation.ptb.tokenized`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imglish.evaluation.ngrams import Counted, N, NgramCounts, find

BETA = 1.2  # of ROUGE-L: recall counts more than precision
SIGMA = 6.0  # of CIDEr-D: how much a difference in length costs
TINY, SMALL = 1e-15, 1e-9  # coco-caption's smoothing of BLEU
NAMES = (*(f"bleu{n}" for n in range(1, N + 1)), "rouge_l", "cider")


@dataclass(frozen=True)
class CaptionScores:
    """``corpus`` and one table an item, under :data:`NAMES`: BLEU and ROUGE-L as shares, CIDEr-D up to 10.

    Corpus BLEU adds up the counts of all items; the other corpus values are means. CIDEr-D takes its word weights from
    the references of the evaluated set, so scores of subsets differ and one picture alone scores 0.
    """

    corpus: dict[str, float]
    items: tuple[dict[str, float], ...]


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Scores of one candidate for each item against its references (one or more)."""
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} captions, {len(references)} lists of references")
    if not candidates or any(not refs for refs in references):
        raise ValueError("caption metrics need at least one picture, and a reference for each")
    counts = NgramCounts.of(candidates, references)
    corpus, per_item = bleu(counts)
    rouge = [rouge_l(candidate, refs) for candidate, refs in zip(candidates, references)]
    cider = cider_d(counts).tolist()
    values = [*corpus.tolist(), math.fsum(rouge) / len(rouge), math.fsum(cider) / len(cider)]
    items = [dict(zip(NAMES, [*b, r, c])) for b, r, c in zip(per_item.tolist(), rouge, cider)]
    return CaptionScores(dict(zip(NAMES, values)), tuple(items))


def bleu(counts: NgramCounts) -> tuple[np.ndarray, np.ndarray]:
    """BLEU-1..4 of the corpus ``(4,)`` and of each item ``(I, 4)`` (Papineni et al. 2002), against the reference of the
    closest length, of two equally close ones the shorter; float64."""
    length, count = counts.candidate_lengths, len(counts.candidate_lengths)
    right = np.stack([_clipped(counted, count) for counted in counts.of_length], 1)
    every = np.maximum(length[:, None] - np.arange(N), 0)
    away = np.abs(counts.reference_lengths - length[counts.item])
    order = np.lexsort((counts.reference_lengths, away, counts.item))
    _, first = np.unique(counts.item[order], return_index=True)
    closest = counts.reference_lengths[order[first]]
    whole = _bleu(right.sum(0, keepdims=True), every.sum(0, keepdims=True), length.sum()[None], closest.sum()[None])
    return whole[0], _bleu(right, every, length, closest)


def _clipped(counted: Counted, items: int) -> np.ndarray:
    """N-grams of each candidate that are right: each as often as in the reference that has it most often."""
    most = np.zeros(len(counted.held), dtype=np.int64)
    np.maximum.at(most, counted.place, counted.references.count)
    mine = counted.candidates
    place, there = find(counted.keys(mine), counted.held)
    return np.bincount(mine.item[there], np.minimum(mine.count[there], most[place[there]]), items)


def _bleu(right: np.ndarray, every: np.ndarray, length: np.ndarray, reference_length: np.ndarray) -> np.ndarray:
    """``(I, 4)`` of counts ``(I, 4)`` and lengths ``(I,)``."""
    ratio = (length + TINY) / (reference_length + SMALL)
    brevity = np.exp(np.minimum(1 - 1 / ratio, 0))
    product = np.cumprod((right + TINY) / (every + SMALL), 1)
    found: np.ndarray = product ** (1 / np.arange(1, N + 1)) * brevity[:, None]
    return found


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence (Lin 2004); best precision and best recall over the references may
    come from different ones, as in coco-caption."""
    words = candidate.split(" ")
    places: dict[str, int] = {}
    for number, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << number
    common = [(_common(places, len(words), side := ref.split(" ")), len(side)) for ref in references]
    precision = max(both / len(words) for both, _ in common)
    recall = max(both / size for both, size in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(places: dict[str, int], length: int, other: Sequence[str]) -> int:
    """Length of the longest common subsequence of ``other`` and a text of ``length`` words, whose bits ``places`` has
    for each word: a row of the table is one number, whose zeros are the steps (Hyyrö 2004)."""
    full = row = (1 << length) - 1
    for word in other:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & full
    return length - row.bit_count()


def cider_d(counts: NgramCounts) -> np.ndarray:
    """CIDEr-D of each item, float64 ``(I,)`` (Vedantam et al. 2015, section 6): clipped TF-IDF n-grams, a penalty for
    other lengths, the mean over n and over references."""
    likeness = np.zeros(len(counts.item))
    for counted in counts.of_length:
        likeness += _cosines(counted, counts.item)
    bigrams = [np.maximum(lengths - 1, 0) for lengths in (counts.candidate_lengths, counts.reference_lengths)]
    likeness *= np.exp(-((bigrams[0][counts.item] - bigrams[1]) ** 2) / (2 * SIGMA**2)) / N
    items = len(counts.candidate_lengths)
    return 10 * np.bincount(counts.item, likeness, items) / np.bincount(counts.item, minlength=items)


def _cosines(counted: Counted, item: np.ndarray) -> np.ndarray:
    """Clipped cosine ``(R,)`` of each reference with the candidate of its item; 0 where one has no weight."""
    mine, theirs, items, references = counted.candidates, counted.references, int(item[-1]) + 1, len(item)
    holds = np.bincount(counted.held % counted.kinds, minlength=counted.kinds)
    idf = math.log(items) - np.log(np.maximum(holds, 1))
    ours, others = mine.count * idf[mine.ngram], theirs.count * idf[theirs.ngram]
    place, there = find(counted.keys(theirs), counted.keys(mine))
    shared = others[there]
    dots = np.bincount(theirs.text[there], np.minimum(ours[place[there]], shared) * shared, references)
    norms = np.sqrt(np.bincount(mine.item, ours**2, items)[item] * np.bincount(theirs.text, others**2, references))
    return np.divide(dots, norms, out=np.zeros(references), where=norms > 0)
