"""The n-grams of many texts at once, as arrays: what BLEU and CIDEr-D count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

N = 4


@dataclass(frozen=True)
class Entries:
    """The different n-grams of each text, by text and then by n-gram. All int64 ``(E,)``: text; item: the one that the
    text belongs to; ngram: its number; count: how often it is there."""

    text: np.ndarray
    item: np.ndarray
    ngram: np.ndarray
    count: np.ndarray


@dataclass(frozen=True)
class Counted:
    """The n-grams of one length n. kinds: how many different ones there are, in candidates and references together;
    held: the keys of all references, sorted, each once ``(K,)``; place: where those of the references' entries are."""

    kinds: int
    candidates: Entries
    references: Entries
    held: np.ndarray
    place: np.ndarray

    def keys(self, entries: Entries) -> np.ndarray:
        """One number for an item and an n-gram, int64 ``(E,)``."""
        return entries.item * self.kinds + entries.ngram


@dataclass(frozen=True)
class NgramCounts:
    """Candidates of I items and their R references, counted.

    item: that of each reference ``(R,)``; lengths in words: candidate_lengths ``(I,)``, reference_lengths ``(R,)``;
    of_length: for n = 1..4.
    """

    item: np.ndarray
    candidate_lengths: np.ndarray
    reference_lengths: np.ndarray
    of_length: tuple[Counted, ...]

    @classmethod
    def of(cls, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Self:
        """candidates: a text for each item; references: texts for each item. Words are apart by white space."""
        words = [text.split() for text in candidates]
        words += [text.split() for texts in references for text in texts]
        items = np.concatenate(
            [np.arange(len(candidates)), np.repeat(np.arange(len(references)), list(map(len, references)))]
        )
        lengths = np.array([len(text) for text in words], dtype=np.int64)
        numbers: dict[str, int] = {}
        ids = np.array([numbers.setdefault(word, len(numbers)) for text in words for word in text], dtype=np.int64)
        owner = np.repeat(np.arange(len(words)), lengths)
        found, codes = [], ids  # codes: the number of the n-gram that begins at each place
        for n in range(1, N + 1):
            if n > 1:
                _, codes = np.unique(codes[:-1] * len(numbers) + ids[n - 1 :], return_inverse=True)
            inside = owner[: len(codes)] == owner[n - 1 :]  # it ends in the text that it begins in
            found.append(_counted(owner[: len(codes)][inside], codes[inside], items, len(candidates)))
        first = len(candidates)
        return cls(items[first:], lengths[:first], lengths[first:], tuple(found))


def _counted(owner: np.ndarray, codes: np.ndarray, items: np.ndarray, first: int) -> Counted:
    """Entries of ``codes`` in the texts ``owner``, both ``(W,)``, of which the first ones are candidates."""
    kinds = int(codes.max(initial=0)) + 1
    keys, count = np.unique(owner * kinds + codes, return_counts=True)
    text, ngram = np.divmod(keys, kinds)
    item, mine, others = items[text], text < first, text >= first
    candidates = Entries(text[mine], item[mine], ngram[mine], count[mine])
    references = Entries(text[others] - first, item[others], ngram[others], count[others])
    held, place = np.unique(references.item * kinds + references.ngram, return_inverse=True)
    return Counted(kinds, candidates, references, held, place)


def find(wanted: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of ``wanted`` lies in the sorted ``keys``, and whether it is there; both ``(W,)``."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return place, keys[place] == wanted
