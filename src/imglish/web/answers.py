"""What the server computes for a query: the towers' answer for many at once, the reranked one for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from imglish.search import Index, Results, SearchHit
from imglish.search.filters import parse
from imglish.search.store import Hit, Row


@dataclass(frozen=True)
class Query:
    """A search as :meth:`imglish.search.Index.search` takes it."""

    text: str | None = None
    image: Image.Image | None = None
    not_text: str | None = None
    k: int = 40
    rerank: int = 40
    where: str | None = None
    min_match: float | None = None
    offset: int = 0


def first(index: Index, queries: Sequence[Query]) -> list[Results | Exception]:
    """The towers' answers. Queries of words alone share one pass of the text tower, and those with the same filter one
    pass over the vectors; the answers are those of ``index.search(..., rerank=0)``."""
    answers: list[Results | Exception] = [RuntimeError("not answered")] * len(queries)
    words = [i for i, query in enumerate(queries) if query.text and query.image is None and not query.not_text]
    if len(words) < 2:
        words = []
    for i in sorted(set(range(len(queries))) - {*words}):
        try:
            answers[i] = search(index, queries[i], reranked=False)
        except Exception as error:  # of this client alone
            answers[i] = error
    if words:
        vectors = index.model.encode_texts([str(queries[i].text) for i in words]).numpy()
        for where in dict.fromkeys(queries[i].where for i in words):
            group = [n for n, i in enumerate(words) if queries[i].where == where]
            try:
                found = _together(index, [queries[words[n]] for n in group], vectors[group], where)
            except Exception as error:  # of the clients with this filter
                found = [error] * len(group)
            for n, answer in zip(group, found, strict=True):
                answers[words[n]] = answer
    return answers


def search(index: Index, query: Query, reranked: bool = True) -> Results:
    """One query by itself."""
    return index.search(
        text=query.text,
        image=query.image,
        not_text=query.not_text,
        k=query.k,
        rerank=query.rerank if reranked else 0,
        where=query.where,
        min_match=query.min_match if reranked else None,
        offset=query.offset,
    )


def _together(
    index: Index, queries: Sequence[Query], vectors: np.ndarray, where: str | None
) -> Sequence[Results | Exception]:
    condition = parse(where)
    most = max(query.offset + query.k for query in queries) + 1
    found = index.store.search(np.ascontiguousarray(vectors, dtype=np.float32), most, condition)
    total = index.store.count(condition)
    pages = [hits[query.offset : query.offset + query.k] for query, hits in zip(queries, found, strict=True)]
    rows = index.store.get(list(dict.fromkeys(hit.key for page in pages for hit in page)))
    return [
        Results(
            tuple(
                _shown(rows[hit.key], hit, place) for place, hit in enumerate(page, query.offset + 1) if hit.key in rows
            ),
            total,
            more=len(hits) > query.offset + query.k,
        )
        for query, hits, page in zip(queries, found, pages, strict=True)
    ]


def _shown(row: Row, hit: Hit, place: int) -> SearchHit:
    return SearchHit(
        hit.key,
        place,
        place,
        hit.score,
        captions=row.captions,
        date=row.date,
        tags=row.tags,
        width=row.width,
        height=row.height,
        duplicate_of=row.duplicate_of,
    )
