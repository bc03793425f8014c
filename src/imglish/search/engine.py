"""The search: recall by the towers, reranking by the fusion tower, what is known of each picture."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from imglish.api import Model, Picture, load
from imglish.data.batch import TextBatch
from imglish.evaluation.rerank import pair_scores
from imglish.models.capabilities import EncodedTexts, EncodesImages, EncodesTexts, Matches, require
from imglish.nn.segments import Segments
from imglish.search import manifest as manifests
from imglish.search.calibration import probabilities
from imglish.search.feeding import Feed, feed
from imglish.search.filters import parse
from imglish.search.manifest import Manifest, ManifestError
from imglish.search.originals import read_original
from imglish.search.results import Results, SearchHit
from imglish.search.store import Hit, Row, Store, StoreInfo, open_store

AGAINST = 0.5  # how much of the negative words' features is taken off the query's
MOST_RERANKED = 1000
REMEMBERED = 256  # texts, and rankings, of the last searches
T = TypeVar("T")


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
        self._texts: _Recent[EncodedTexts] = _Recent(REMEMBERED)
        self._rankings: _Recent[_Ranking] = _Recent(REMEMBERED)

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
        """Pictures for a text, for a picture, or for both together, best first.

        not_text: what they should not show; k, offset: which page; rerank: how many of the towers' first the fusion
        tower orders by the text (0: none), they stand before all others; where: see :mod:`imglish.search.filters`;
        min_match: leave out pictures whose match probability is below; those that were not reranked are left out too,
        and without any left ``no_good_match`` is set; exact: no approximation in the recall of large indexes.

        Raises ``FilterError``, ``ImageError`` (the query's picture), ``StoreError``, ``ValueError``.
        """
        wish = self._checked(text, image, not_text, k, rerank, min_match, offset)
        condition = parse(where)
        rerank = min(rerank, MOST_RERANKED) if wish.text and self.reranks else 0
        notes = [] if rerank or min_match is None else ["min_match needs reranking: it was not applied"]
        began = time.perf_counter()
        vector = self._vector(wish)
        encoded = time.perf_counter()
        needed = rerank if min_match is not None and rerank else max(offset + k + 1, rerank)
        [hits] = self.store.search(vector[None].numpy(), needed, condition, exact)
        recalled = time.perf_counter()
        name = (wish.name, rerank, where, self.store.version)
        ranking = self._rankings.get(name, lambda: self._rank(wish, hits[:rerank])) if rerank else _Ranking((), {})
        if ranking.notes:
            notes += ranking.notes
        reranked = time.perf_counter()
        lines = self._lines(hits, ranking, min_match if rerank else None)
        page = self._described(lines[offset : offset + k])
        return Results(
            hits=tuple(page),
            total=self.store.count(condition),
            more=len(lines) > offset + k,
            reranked=len(ranking.order),
            calibrated=bool(ranking.order) and self.manifest.calibration is not None,
            no_good_match=min_match is not None and rerank > 0 and not lines,
            notes=tuple(notes),
            seconds={
                "encode": encoded - began,
                "recall": recalled - encoded,
                "rerank": reranked - recalled,
                "describe": time.perf_counter() - reranked,
            },
        )

    def similar(self, key: str, k: int = 20, where: str | None = None, offset: int = 0) -> Results:
        """Pictures that look like the one called ``key``, itself left out. Raises ``KeyError``."""
        [row] = self._rows([key], (), vectors=True)
        condition = parse(where)
        [hits] = self.store.search(row.vector.astype("float32")[None], offset + k + 2, condition)
        lines = self._lines([hit for hit in hits if hit.key != key], _Ranking((), {}), None)
        page = tuple(self._described(lines[offset : offset + k]))
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

    @staticmethod
    def _checked(
        text: str | None,
        image: Picture | None,
        not_text: str | None,
        k: int,
        rerank: int,
        min_match: float | None,
        offset: int,
    ) -> _Wish:
        text = (text or "").strip() or None
        if text is None and image is None:
            raise ValueError("nothing to search for: give a text, a picture, or both")
        if k < 1 or offset < 0 or rerank < 0:
            raise ValueError(f"k is {k}, offset {offset}, rerank {rerank}: expected k from 1, the others from 0")
        if min_match is not None and not 0 <= min_match <= 1:
            raise ValueError(f"min_match is {min_match}: it is a probability, 0..1")
        return _Wish(text, image, (not_text or "").strip() or None)

    def _vector(self, wish: _Wish) -> Tensor:
        """The query of the towers ``(E,)`` float32 on the host."""
        parts = []
        if wish.text is not None:
            parts.append(self._text(wish.text).features[0].float().cpu())
        if wish.image is not None:
            with self._lock:
                parts.append(self.model.encode_images([wish.image])[0])
        vector = parts[0] if len(parts) == 1 else F.normalize(torch.stack(parts).sum(0), dim=0)
        if wish.not_text is not None:
            vector = vector - AGAINST * self._text(wish.not_text).features[0].float().cpu()
        return vector

    def _text(self, text: str) -> EncodedTexts:
        def encode() -> EncodedTexts:
            batch = TextBatch.of(self.model.tokenizer.encode([text])).to(self.model.device)
            network: Any = self.model.network
            with self._lock, torch.no_grad():
                found: EncodedTexts = network.encode_texts(batch)
            return found

        return self._texts.get(text, encode)

    def _rank(self, wish: _Wish, hits: Sequence[Hit]) -> _Ranking:
        """The order in which the fusion tower puts ``hits``: each picture's keys and values are projected once, for the
        words and the negative words together."""
        assert wish.text is not None
        if not hits:
            return _Ranking((), {})
        keys, kept = [hit.key for hit in hits], bool(self.manifest.tokens)
        tokens, readable, problems = feed(self.store, keys, self.model, self.feed_from, self._lock, kept)
        notes = [f"{len(problems)} of the first {len(hits)} pictures cannot be read: {problems[0]}"] if problems else []
        if not readable:
            return _Ranking((), {}, notes)
        texts = [self._text(one) for one in (wish.text, wish.not_text) if one is not None]
        cosine = torch.tensor([hits[i].score for i in readable])
        network: Any = self.model.network
        count, n = len(readable), len(texts)
        with self._lock, torch.no_grad():
            memory = network.project_images(tokens)
            pictures = [i for i in range(count) for _ in range(n)]
            logits = network.match(memory, _joined(texts), pictures, list(range(n)) * count)
        logits = logits.float().cpu().view(count, n, 2)
        chances = probabilities(logits[..., 1] - logits[..., 0], self.manifest.calibration)
        rule: Any = self.model.score_rule
        score = pair_scores(logits[:, 0], cosine, rule)
        if n == 2:  # the words, and not the others
            score = chances[:, 0].log() + torch.log1p(-chances[:, 1])
        best = score.argsort(descending=True, stable=True).tolist()
        seen = {
            hits[readable[i]].key: (float(chances[i, 0]), float(chances[i, 1]) if n == 2 else None)
            for i in range(count)
        }
        return _Ranking(tuple(hits[readable[i]].key for i in best), seen, notes)

    @staticmethod
    def _lines(hits: Sequence[Hit], ranking: _Ranking, min_match: float | None) -> list[SearchHit]:
        """All pictures in their final order; ``rank`` counts what is left after ``min_match``."""
        before = {hit.key: place for place, hit in enumerate(hits, 1)}
        cosine = {hit.key: hit.score for hit in hits}
        order = [key for key in ranking.order if key in before]
        order += [hit.key for hit in hits if hit.key not in ranking.seen]
        if min_match is not None:
            order = [key for key in order if ranking.chance(key) >= min_match]
        return [
            SearchHit(key, rank, before[key], cosine[key], *ranking.seen.get(key, (None, None)))
            for rank, key in enumerate(order, 1)
        ]

    def _described(self, lines: Sequence[SearchHit]) -> list[SearchHit]:
        rows = self.store.get([line.key for line in lines])
        found = []
        for line in lines:
            row = rows.get(line.key)
            if row is None:  # deleted by another process since it was found
                continue
            values = {name: getattr(row, name) for name in _SHOWN}
            found.append(SearchHit(**{**_fields(line), **values}))
        return found

    def _rows(self, keys: list[str], columns: Sequence[str], vectors: bool = False) -> list[Row]:
        rows = self.store.get(keys, ("key", *columns), vectors)
        missing = [key for key in keys if key not in rows]
        if missing:
            raise KeyError(missing[0])
        return [rows[key] for key in keys]


_SHOWN = ("captions", "date", "tags", "width", "height", "duplicate_of")
_KNOWN = (*_SHOWN, "digest", "source", "place", "phash")


def _fields(hit: SearchHit) -> dict[str, Any]:
    return {name: getattr(hit, name) for name in SearchHit.__dataclass_fields__}


def _joined(texts: Sequence[EncodedTexts]) -> EncodedTexts:
    rows = [text.rows for text in texts if text.rows is not None]
    lengths = tuple(length for text in texts for length in text.segments.lengths)
    return EncodedTexts(torch.cat([text.features for text in texts]), Segments(lengths), torch.cat(rows))


def _name(picture: Picture) -> Hashable:
    """A picture for the memory of rankings: a file by its path, else by its content."""
    if isinstance(picture, (str, Path, bytes)):
        return picture
    if isinstance(picture, Image.Image):
        return blake2b(picture.tobytes()).digest()
    return id(picture)


@dataclass(frozen=True)
class _Wish:
    text: str | None
    image: Picture | None
    not_text: str | None

    @property
    def name(self) -> Hashable:
        """What rankings are remembered by."""
        return (self.text, _name(self.image) if self.image is not None else None, self.not_text)


@dataclass(frozen=True)
class _Ranking:
    """order: keys, best first; seen: of each its match probability and that of the negative words."""

    order: tuple[str, ...]
    seen: dict[str, tuple[float, float | None]]
    notes: Sequence[str] = ()

    def chance(self, key: str) -> float:
        """What ``min_match`` cuts on: the words and not the others; below all for a picture not looked at."""
        found, excluded = self.seen.get(key, (-1.0, None))
        return found * (1 - excluded) if excluded is not None else found


class _Recent(Generic[T]):
    """The last ``most`` values by name."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._held: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, name: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
        value = make()
        with self._lock:
            self._held[name] = value
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        return value
