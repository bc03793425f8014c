"""Exact recall: all vectors as one half-precision matrix in memory.

At a million pictures of 256 numbers it takes 512 MB and, a query, some 50 ms of a core; there is nothing to build and
nothing to lose, and any filter works.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imglish.search.store import Hit

EXACT_ROWS = 2_000_000  # of an index up to which every store compares with all
FEW_ROWS = 200_000  # that a filter leaves of a larger one: then all of them are compared
_ROWS = 2048  # that are made float32 at a time: they stay in the processor's cache
_CHOSEN = 0.25  # of the rows: with fewer, a filter's rows are gathered


@dataclass
class Matrix:
    """vectors: float16 ``(N, E)``; keys: of the rows; rows: their numbers in the store, uint64 ``(N,)``."""

    vectors: Tensor
    keys: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Ascending places of those of the numbers ``rows`` that are there."""
        found: np.ndarray = np.flatnonzero(np.isin(self.rows, rows))
        return found

    def search(self, queries: np.ndarray, k: int, chosen: np.ndarray | None = None) -> list[list[Hit]]:
        """The ``k`` rows with the largest dot product for each of ``queries`` ``(Q, E)``, best first, ties by key.

        chosen: ascending places of the rows that take part (default: all).
        """
        count = len(self) if chosen is None else len(chosen)
        if count == 0 or k < 1:
            return [[] for _ in queries]
        query = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(self.vectors.device)
        if chosen is not None and count < _CHOSEN * len(self):
            scores = self._scores(self.vectors[torch.from_numpy(chosen).to(self.vectors.device)], query)
        else:
            scores = self._scores(self.vectors, query)
            scores = scores if chosen is None else scores[:, torch.from_numpy(chosen).to(scores.device)]
        best, place = scores.topk(min(k, count), dim=1)
        return [
            self._hits(score, number, scores[i], chosen)
            for i, (score, number) in enumerate(zip(best.cpu().numpy(), place.cpu().numpy()))
        ]

    def _hits(self, score: np.ndarray, place: np.ndarray, scores: Tensor, chosen: np.ndarray | None) -> list[Hit]:
        k = len(score)
        tied = np.flatnonzero((scores >= float(score[-1])).cpu().numpy()) if k < len(scores) else place
        if len(tied) > k:  # which of those that tie for the last place are in the list must not be left to chance
            place, score = tied, scores[torch.from_numpy(tied).to(scores.device)].cpu().numpy()
        keys = self.keys[place if chosen is None else chosen[place]]
        order = np.lexsort((keys, -score))[:k]
        return [Hit(str(keys[i]), float(score[i])) for i in order]

    @staticmethod
    def _scores(vectors: Tensor, query: Tensor) -> Tensor:
        """float32 ``(Q, N)``."""
        if vectors.device.type != "cpu":
            return (query.half() @ vectors.T).float()
        found = torch.empty(len(query), len(vectors))
        block = torch.empty(min(_ROWS, len(vectors)), vectors.shape[1])
        for low in range(0, len(vectors), _ROWS):
            part = vectors[low : low + _ROWS]
            wide = block[: len(part)].copy_(part)
            torch.mm(query, wide.T, out=found[:, low : low + len(part)])
        return found
