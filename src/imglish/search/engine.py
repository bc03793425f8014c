"""The search: recall by the towers, reranking by the fusion tower, what is known of each picture."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from imglish.api import Model, Picture, load
from imglish.data.images import ImageError, ImageTransform
from imglish.evaluation.explain import Explanation, explain
from imglish.models.capabilities import EncodedTexts, EncodesImages, EncodesTexts, Matches, require
from imglish.search import manifest as manifests
from imglish.search.feeding import Feed, feed, pixels
from imglish.search.filters import Filter, parse
from imglish.search.manifest import Manifest, ManifestError
from imglish.search.originals import read_original
from imglish.search.query import Query
from imglish.search.ranking import Ranking, Recent, parted, rank_pictures
from imglish.search.results import Results, SearchHit
from imglish.search.store import Hit, Row, Store, StoreInfo, open_store

AGAINST = 0.5  # how much of the negative words' features is taken off the query's
MOST_RERANKED = 1000
REMEMBERED = 256  # texts, and rankings, of the last searches


def open(
    path: str | Path, model: str | Path | Model | None = None, device: str | None = None, feed_from: Feed = "auto"
) -> Index:
    """The index at ``path``, a folder or a URL (:func:`imglish.search.store.open_store`).

    model: the model that it was made with, or where that lies now (default: where it lay when the index was made);
    device: default, a GPU where there is one; feed_from: what pictures are reranked from, see :class:`Index`.
    Raises ``StoreError``, ``CheckpointError``, and ``ManifestError`` for another model than the index was made with.
    """
    store = open_store(str(path))
    kept = manifests.read(store)
    if kept is None:
        raise ManifestError(f"{path} has no manifest: it is no finished index. Make it with imglish index")
    name = kept.model if model is None or isinstance(model, Model) else str(model)
    loaded = model if isinstance(model, Model) else load(name, device)
    manifests.check(kept, manifests.describe(loaded, name), str(path))
    return Index(store, kept, loaded, feed_from)


class Index:
    """Pictures that can be searched. It may be used from several threads; the model computes for one at a time.

    feed_from: what the fusion tower reads: "tokens" and "thumbnails" as kept in the index, "originals", or "auto": the
    first of these that is there. A picture whose data cannot be read stays where the towers put it.
    """

    def __init__(self, store: Store, manifest: Manifest, model: Model, feed_from: Feed = "auto") -> None:
        require(model.network, EncodesImages, "search")
        require(model.network, EncodesTexts, "search")
        self.store, self.manifest, self.model, self.feed_from = store, manifest, model, feed_from
        self._lock = threading.Lock()
        self._texts: Recent[EncodedTexts] = Recent(REMEMBERED)
        self._rankings: Recent[Ranking] = Recent(REMEMBERED)

    @property
    def reranks(self) -> bool:
        """Whether the model has a fusion tower that its checkpoint ranks by."""
        return isinstance(self.model.network, Matches) and self.model.score_rule != "itc"

    def search(
        self,
        text: str | None = None,
        image: Picture | None = None,
        not_text: str | None = None,
        k: int = 20,
        rerank: int = 40,
        where: str | None = None,
        min_match: float | None = None,
        offset: int = 0,
        exact: bool = False,
    ) -> Results:
        """Pictures for a text, for a picture, or for both together, best first; what to ask: :class:`Query`.

        With a ``min_match`` that no picture reaches, ``no_good_match`` is set. Raises ``FilterError``, ``ImageError``
        (the query's picture), ``StoreError``, ``ValueError``.
        """
        return self.search_many([Query(text, image, not_text, k, rerank, where, min_match, offset, exact)])[0]

    def search_many(self, queries: Sequence[Query]) -> list[Results]:
        """The answer to each of ``queries``, the same as alone (to rounding).

        They share one pass of each tower; those with the same filter share one pass over the vectors; reranking is done
        for one after the other, its pictures in one call. Raises as :meth:`search`, for all of them.
        """
        clock = _Clock()
        texts = self._read([text for query in queries for text in query.texts])
        vectors = self._vectors(queries, texts)
        clock.stop("encode")
        version = self.store.version
        found, totals = self._recalled(queries, vectors)
        clock.stop("recall")
        rankings = [self._ranking(query, hits, texts, version) for query, hits in zip(queries, found)]
        clock.stop("rerank")
        lines = [
            _places(hits, ranking, query.min_match if self._many(query) else None)
            for query, hits, ranking in zip(queries, found, rankings)
        ]
        pages = self._described([line[query.offset : query.offset + query.k] for query, line in zip(queries, lines)])
        clock.stop("describe")
        answers = []
        for query, ranking, line, page, total in zip(queries, rankings, lines, pages, totals):
            asked = query.min_match is not None
            ignored = ("min_match needs reranking: it was not applied",) if asked and not self._many(query) else ()
            answers.append(
                Results(
                    hits=page,
                    total=total,
                    more=len(line) > query.offset + query.k,
                    reranked=len(ranking.order),
                    calibrated=bool(ranking.order) and self.manifest.calibration is not None,
                    no_good_match=asked and not ignored and not line,
                    notes=(*ignored, *self._unknown(query), *ranking.notes),
                    seconds=clock.seconds,
                )
            )
        return answers

    def explain(self, key: str, text: str) -> tuple[Explanation, tuple[float, ...]]:
        """Where in the picture ``key`` the model finds each word of ``text`` (:mod:`imglish.evaluation.explain`), and
        which part of the picture it saw: left, upper, right, lower as shares of its sides.

        Raises ``KeyError``, ``ImageError``, and ``MissingCapabilityError`` for a model of which nothing can be shown.
        """
        [row] = self._rows([key], ("width", "height"))
        [picture] = pixels(self.store, [key], self.model, "auto" if self.feed_from == "tokens" else self.feed_from)
        if isinstance(picture, ImageError):
            raise picture
        transform, box = self.model.config.image.transform(), (0.0, 0.0, 1.0, 1.0)
        if isinstance(transform, ImageTransform) and row.width and row.height:
            left, upper, right, lower = transform.box(row.width, row.height, None)
            box = (left / row.width, upper / row.height, right / row.width, lower / row.height)
        with self._lock:
            return explain(self.model.network, self.model.tokenizer, picture, text), box

    def similar(self, key: str, k: int = 20, where: str | None = None, offset: int = 0) -> Results:
        """Pictures that look like the one called ``key``, itself left out. Raises ``KeyError``."""
        [row] = self._rows([key], (), vectors=True)
        condition = parse(where)
        [hits] = self.store.search(row.vector.astype("float32")[None], offset + k + 2, condition)
        lines = _places([hit for hit in hits if hit.key != key], Ranking())
        [page] = self._described([lines[offset : offset + k]])
        return Results(page, self.store.count(condition), more=len(lines) > offset + k)

    def get(self, key: str) -> Row:
        """What is known of a picture, without vector, thumbnail and tokens. Raises ``KeyError``."""
        return self._rows([key], _KNOWN)[0]

    def thumbnail(self, key: str) -> bytes:
        """The JPEG kept in the index, b"" where none is. Raises ``KeyError``."""
        return self._rows([key], ("thumbnail",))[0].thumbnail

    def original(self, key: str) -> bytes:
        """The bytes of the picture's file, where it lay when it was indexed. Raises ``KeyError``, ``ImageError``."""
        return read_original(self._rows([key], ("place",))[0].place, key)

    def info(self) -> StoreInfo:
        return self.store.info()

    def close(self) -> None:
        self.store.close()

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _many(self, query: Query) -> int:
        """How many pictures the fusion tower looks at."""
        return min(query.rerank, MOST_RERANKED) if query.text is not None and self.reranks else 0

    def _read(self, texts: Sequence[str]) -> dict[str, EncodedTexts]:
        """What the text tower makes of each; those of the last searches are remembered."""
        held = {text: self._texts.get(text) for text in texts}
        if missing := [text for text, known in held.items() if known is None]:
            with self._lock:
                encoded = self.model.read_texts(missing)
            for text, one in zip(missing, parted(encoded), strict=True):
                held[text] = one
                self._texts.put(text, one)
        return {text: one for text, one in held.items() if one is not None}

    def _unknown(self, query: Query) -> list[str]:
        """A note for each text with words that the model's vocabulary does not have, as those of another language."""
        tokenizer, notes = self.model.tokenizer, []
        unknown = tokenizer.token("unk")
        if unknown is None or unknown == tokenizer.token("eos"):  # made of bytes: it has everything
            return []
        for text in query.texts:
            if many := tokenizer.encode([text])[0].count(tokenizer.id_of(unknown)):
                notes.append(f"the model's vocabulary does not have {many} parts of the text: {text}")
        return notes

    def _vectors(self, queries: Sequence[Query], texts: Mapping[str, EncodedTexts]) -> np.ndarray:
        """The queries of the towers ``(Q, E)`` float32."""
        pictures = [query.image for query in queries if query.image is not None]
        with self._lock:
            features = iter(self.model.encode_images(pictures) if pictures else ())
        vectors = []
        for query in queries:
            parts = [texts[query.text].features[0].float().cpu()] if query.text is not None else []
            if query.image is not None:
                parts.append(next(features))
            vector = parts[0] if len(parts) == 1 else F.normalize(torch.stack(parts).sum(0), dim=0)
            if query.not_text is not None:
                vector = vector - AGAINST * texts[query.not_text].features[0].float().cpu()
            vectors.append(vector.numpy())
        return np.stack(vectors) if vectors else np.zeros((0, self.store.dimension), np.float32)

    def _recalled(self, queries: Sequence[Query], vectors: np.ndarray) -> tuple[list[list[Hit]], list[int]]:
        """What the towers find for each query, and how many pictures its filter lets through."""
        needed = [self._many(query) for query in queries]
        for i, query in enumerate(queries):
            if not needed[i] or query.min_match is None:  # otherwise nothing but what was looked at is shown
                needed[i] = max(query.offset + query.k + 1, needed[i])
        together: dict[tuple[Filter | None, bool], list[int]] = {}
        for i, query in enumerate(queries):
            together.setdefault((query.condition, query.exact), []).append(i)
        found: list[list[Hit]] = [[] for _ in queries]
        totals = [0] * len(queries)
        for (condition, exact), members in together.items():
            most = max(needed[i] for i in members)
            total = self.store.count(condition)
            for i, hits in zip(members, self.store.search(vectors[members], most, condition, exact), strict=True):
                found[i], totals[i] = hits[: needed[i]], total
        return found, totals

    def _ranking(self, query: Query, hits: Sequence[Hit], texts: Mapping[str, EncodedTexts], version: int) -> Ranking:
        """The fusion tower's order of the first of ``hits``; remembered, so that a next page asks nothing again."""
        hits = hits[: self._many(query)]
        if not hits:
            return Ranking()
        name = (query.name, len(hits), query.condition, query.exact, version)
        ranking = self._rankings.get(name)
        if ranking is None:
            ranking = self._looked_at([hit.key for hit in hits], [texts[text] for text in query.texts])
            self._rankings.put(name, ranking)
        return ranking

    def _looked_at(self, keys: Sequence[str], texts: Sequence[EncodedTexts]) -> Ranking:
        kept = bool(self.manifest.tokens)
        tokens, readable, problems = feed(self.store, keys, self.model, self.feed_from, self._lock, kept)
        unread = f"{len(problems)} of the first {len(keys)} pictures cannot be read: "
        notes = tuple(unread + problem for problem in problems[:1])
        if tokens is None:
            return Ranking(notes=notes)
        with self._lock, torch.no_grad():
            ranking = rank_pictures(
                self.model.network, tokens, [keys[i] for i in readable], texts, self.manifest.calibration
            )
        return replace(ranking, notes=notes)

    def _described(self, pages: Sequence[Sequence[SearchHit]]) -> list[tuple[SearchHit, ...]]:
        """With what a list shows of each picture; without those deleted by another process since they were found."""
        rows = self.store.get(list(dict.fromkeys(line.key for page in pages for line in page)))
        return [
            tuple(
                replace(line, **{name: getattr(rows[line.key], name) for name in _SHOWN})
                for line in page
                if line.key in rows
            )
            for page in pages
        ]

    def _rows(self, keys: list[str], columns: Sequence[str], vectors: bool = False) -> list[Row]:
        rows = self.store.get(keys, ("key", *columns), vectors)
        missing = [key for key in keys if key not in rows]
        if missing:
            raise KeyError(missing[0])
        return [rows[key] for key in keys]


_SHOWN = ("captions", "date", "tags", "width", "height", "duplicate_of")
_KNOWN = (*_SHOWN, "digest", "source", "place", "phash")


def _places(hits: Sequence[Hit], ranking: Ranking, min_match: float | None = None) -> list[SearchHit]:
    """All pictures in their final order; ``rank`` counts what is left after ``min_match``."""
    before = {hit.key: place for place, hit in enumerate(hits, 1)}
    cosine = {hit.key: hit.score for hit in hits}
    order = [key for key in ranking.order if key in before]
    order += [hit.key for hit in hits if hit.key not in ranking.seen]
    if min_match is not None:
        order = [key for key in order if ranking.match(key) >= min_match]
    return [
        SearchHit(key, rank, before[key], cosine[key], *ranking.seen.get(key, (None, None)))
        for rank, key in enumerate(order, 1)
    ]


class _Clock:
    """Seconds of one part after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self._last = now - self._last, now
