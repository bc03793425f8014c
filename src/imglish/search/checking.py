"""How good and how quick the recall of an index is, measured with texts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from imglish.api import Model
from imglish.search.store import Store

QUERIES = 200


@dataclass(frozen=True)
class Check:
    """recall: mean share of the ``k`` truly nearest pictures that the store's own way finds; own: share of the captions
    whose picture is among the first ``k``, None for texts of no picture; p50, p95: seconds of a search without
    encoding the text; first: seconds of the first one, which loads what it needs."""

    queries: int
    k: int
    recall: float
    own: float | None
    p50: float
    p95: float
    first: float

    def text(self) -> str:
        own = f"\nthe caption's own picture is among the first {self.k}: {self.own:.1%}" if self.own is not None else ""
        return (
            f"recall@{self.k} against comparing everything: {self.recall:.4f} ({self.queries} texts)\n"
            f"search: p50 {self.p50 * 1e3:.1f} ms, p95 {self.p95 * 1e3:.1f} ms; the first {self.first * 1e3:.0f} ms"
            f"{own}"
        )


def check_recall(
    store: Store, model: Model, texts: Sequence[str] = (), queries: int = QUERIES, k: int = 10, seed: int = 0
) -> Check:
    """Compare the store's search with the true order, found by reading all vectors.

    texts: the queries; left out, captions of the index, drawn with ``seed``; none at all is a ``ValueError``.
    """
    owners: list[str] | None = None
    if not texts:
        texts, owners = _captions(store, queries, seed)
    vectors = model.encode_texts(list(texts)).numpy().astype(np.float32)
    k = min(k, store.count())
    truth = _truth(store, vectors, k)
    seconds, found = [], []
    for vector in vectors:
        began = time.perf_counter()
        [hits] = store.search(vector[None], k)
        seconds.append(time.perf_counter() - began)
        found.append({hit.key for hit in hits})
    recall = float(np.mean([len(a & b) / k for a, b in zip(found, truth)]))
    own = float(np.mean([key in a for key, a in zip(owners, found)])) if owners is not None else None
    rest = seconds[1:] or seconds
    p50, p95 = np.percentile(rest, [50, 95])
    return Check(len(texts), k, recall, own, float(p50), float(p95), seconds[0])


def _captions(store: Store, most: int, seed: int) -> tuple[list[str], list[str]]:
    """Captions drawn from the index, one of a picture, with the keys of their pictures."""
    rows = [(row.key, row.captions[0]) for block in store.scan(("captions",)) for row in block if row.captions]
    if not rows:
        raise ValueError(
            "the index holds no captions to search with: give a file of texts, one a line (--queries FILE)"
        )
    rows.sort()
    chosen = np.random.default_rng(seed).permutation(len(rows))[:most]
    return [rows[i][1] for i in chosen], [rows[i][0] for i in chosen]


def _truth(store: Store, vectors: np.ndarray, k: int) -> list[set[str]]:
    """Keys of the ``k`` nearest rows of each query, by comparing it with every row."""
    queries = torch.from_numpy(vectors)
    best = torch.full((len(vectors), 0), 0.0)
    names = np.zeros((len(vectors), 0), dtype=object)
    for block in store.scan((), vectors=True):
        scores = queries @ torch.from_numpy(np.stack([row.vector for row in block])).float().T
        keys = np.broadcast_to(np.array([row.key for row in block], dtype=object), scores.shape)
        together, names = torch.cat([best, scores], dim=1), np.concatenate([names, keys], axis=1)
        best, place = together.topk(min(k, together.shape[1]), dim=1)
        names = np.take_along_axis(names, place.numpy(), axis=1)
    return [set(row) for row in names]
