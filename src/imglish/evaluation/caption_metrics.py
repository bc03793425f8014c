"""BLEU, ROUGE-L and CIDEr-D of captions as coco-caption computes them, from strings of tokens apart by spaces.

Captions and references become tokenized strings by :func:`imglish.evaluation.ptb.tokenized`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

N = 4
BETA = 1.2  # of ROUGE-L: recall counts more than precision
SIGMA = 6.0  # of CIDEr-D: how much a difference in length costs
TINY, SMALL = 1e-15, 1e-9  # coco-caption's smoothing of BLEU
NAMES = (*(f"bleu{n}" for n in range(1, N + 1)), "rouge_l", "cider")

Ngram = tuple[str, ...]


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
    corpus, per_item = bleu(candidates, references)
    rouge = [rouge_l(candidate, refs) for candidate, refs in zip(candidates, references)]
    cider = cider_d(candidates, references)
    values = [corpus[n] for n in range(N)] + [math.fsum(rouge) / len(rouge), math.fsum(cider) / len(cider)]
    items = [dict(zip(NAMES, [*b, r, c])) for b, r, c in zip(per_item, rouge, cider)]
    return CaptionScores(dict(zip(NAMES, values)), tuple(items))


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[float], list[list[float]]]:
    """BLEU-1..4 of the corpus and of each item (Papineni et al. 2002), against the reference of the closest length."""
    total, length, reference_length = _zeros(), 0, 0
    items = []
    for candidate, refs in zip(candidates, references):
        words = candidate.split()
        sides = [ref.split() for ref in refs]
        closest = min((len(side) for side in sides), key=lambda size: (abs(size - len(words)), size))
        most: Counter[Ngram] = Counter()
        for side in sides:
            most |= _ngrams(side)
        matched = _zeros()
        for ngram, count in _ngrams(words).items():
            matched[len(ngram) - 1][0] += min(count, most[ngram])
        for n in range(N):
            matched[n][1] = max(0, len(words) - n)
            total[n][0] += matched[n][0]
            total[n][1] += matched[n][1]
        length += len(words)
        reference_length += closest
        items.append(_bleu(matched, len(words), closest))
    return _bleu(total, length, reference_length), items


def _zeros() -> list[list[int]]:
    """(right, all) n-grams for each n."""
    return [[0, 0] for _ in range(N)]


def _bleu(counts: list[list[int]], length: int, reference_length: int) -> list[float]:
    ratio = (length + TINY) / (reference_length + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, found = 1.0, []
    for n, (right, every) in enumerate(counts):
        product *= (right + TINY) / (every + SMALL)
        found.append(product ** (1 / (n + 1)) * brevity)
    return found


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence (Lin 2004); best precision and best recall over the references may
    come from different ones, as in coco-caption."""
    words = candidate.split(" ")
    common = [(_common(words, side := ref.split(" ")), len(side)) for ref in references]
    precision = max(both / len(words) for both, _ in common)
    recall = max(both / size for both, size in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for i, other in enumerate(second):
            diagonal, row[i + 1] = row[i + 1], diagonal + 1 if word == other else max(row[i], row[i + 1])
    return row[-1]


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each item (Vedantam et al. 2015, section 6): clipped TF-IDF n-grams, a penalty for other lengths."""
    cooked = [[_ngrams(ref.split()) for ref in refs] for refs in references]
    holds = Counter(ngram for refs in cooked for ngram in set().union(*refs))
    everything = math.log(len(references))

    def vector(counts: Counter[Ngram]) -> _Vector:
        weights = {ngram: n * (everything - math.log(max(1, holds[ngram]))) for ngram, n in counts.items()}
        squares = [math.fsum(w * w for ngram, w in weights.items() if len(ngram) == n + 1) for n in range(N)]
        bigrams = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return _Vector(weights, [math.sqrt(square) for square in squares], bigrams)

    scores = []
    for candidate, refs in zip(candidates, cooked):
        ours = vector(_ngrams(candidate.split()))
        likeness = [_likeness(ours, vector(ref)) for ref in refs]
        scores.append(10 * math.fsum(likeness) / len(refs))
    return scores


@dataclass(frozen=True)
class _Vector:
    """TF-IDF weights of all n-grams; norms for each n; bigrams: how many, the measure of length."""

    weights: dict[Ngram, float]
    norms: list[float]
    bigrams: int


def _likeness(ours: _Vector, reference: _Vector) -> float:
    """Mean over n of the clipped cosines, times a Gaussian of the difference in length."""
    dots = [0.0] * N
    for ngram, weight in ours.weights.items():
        other = reference.weights.get(ngram, 0.0)
        dots[len(ngram) - 1] += min(weight, other) * other
    norms = [a * b for a, b in zip(ours.norms, reference.norms)]
    cosines = [dot / norm if norm else dot for dot, norm in zip(dots, norms)]
    return math.exp(-((ours.bigrams - reference.bigrams) ** 2) / (2 * SIGMA**2)) * sum(cosines) / N


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    """How often each n-gram, n = 1..4, occurs."""
    return Counter(_windows(words))


def _windows(words: Sequence[str]) -> Iterable[Ngram]:
    for n in range(1, N + 1):
        for start in range(len(words) - n + 1):
            yield tuple(words[start : start + n])
