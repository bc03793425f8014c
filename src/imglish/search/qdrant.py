"""An index in Qdrant, a server or a cluster of them: ``qdrant+http://HOST:PORT/NAME`` (or ``qdrant+https``).

For collections that outgrow a machine, or that many machines search. The key of the server, where it asks for one, is
taken from the environment variable ``QDRANT_API_KEY``. NAME is a collection; beside it, NAME-notes holds the manifest,
the number of the version and the right to write. Qdrant's graph loses pictures that texts ask for, so a search compares
with all rows up to :data:`imglish.search.exact.EXACT_ROWS` of them, and reads far more of the graph than usual beyond.

Unlike a folder, a server commits row by row: after a kill some rows of a change are there, each whole, and a scan may
see rows that were written while it ran.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from imglish.search.exact import EXACT_ROWS, FEW_ROWS
from imglish.search.filters import Both, Condition, Either, Filter, date_bounds
from imglish.search.qdrant_lease import Lease
from imglish.search.qdrant_rows import payload_of, point_id, row_of, when
from imglish.search.store import CARD, Hit, Row, StoreError, StoreInfo, missing_extra

PREFIX = "qdrant+"
KEY = "QDRANT_API_KEY"
OLDEST = (1, 20)  # server, whose filters know prefixes and substrings
EF = 512  # candidates that a search of the graph keeps, at least
SPARE = 16  # rows asked for beyond k: which of those that tie are in the list must not be left to chance
BLOCK = 256  # rows read at a time
PART = 16 << 20  # bytes sent at a time: the server refuses more than twice that
SECONDS = 60  # that an answer may take
_INDEXED = {"tags": "keyword", "duplicate_of": "keyword", "width": "integer", "height": "integer", "when": "integer"}


class QdrantStore:
    """See :class:`imglish.search.store.Store`; client: a ``QdrantClient``; exact_rows, few_rows: the limits of exact
    search."""

    def __init__(
        self, url: str, client: Any, name: str, exact_rows: int = EXACT_ROWS, few_rows: int = FEW_ROWS
    ) -> None:
        self.url, self.exact_rows, self.few_rows = url, exact_rows, few_rows
        self._client, self._name, self._notes = client, name, f"{name}-notes"
        self._lease = Lease(client, self._notes, url)
        with _refusals(url):
            self.dimension = int(client.get_collection(name).config.params.vectors.size)

    @staticmethod
    def open(url: str, dimension: int | None = None, client: Any = None) -> QdrantStore:
        """client: default, one for the server in ``url``."""
        address, _, name = url.removeprefix(PREFIX).rpartition("/")
        if not name or address.count("/") < 2:
            raise StoreError(f"{url}: expected {PREFIX}http://HOST:PORT/NAME")
        with _refusals(url):
            client = client or _connected(address)
            found = client.info().version
            if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
                raise StoreError(f"{url} is Qdrant {found}: at least {'.'.join(map(str, OLDEST))} is needed")
            if not client.collection_exists(name):
                if dimension is None:
                    raise StoreError(
                        f"there is no index at {url}: make one with imglish index SOURCE --model M --to {url}"
                    )
                _make(client, name, dimension)
            elif not client.collection_exists(f"{name}-notes"):
                raise StoreError(f"{url} exists and is no index: choose another name")
        store = QdrantStore(url, client, name)
        if dimension is not None and store.dimension != dimension:
            raise StoreError(f"{url} holds vectors of {store.dimension} numbers, the model gives {dimension}")
        return store

    @property
    def version(self) -> int:
        return int(self._note("version").get("number", 0))

    # ---- writing --------------------------------------------------------------------------------------------------

    def upsert(self, rows: Sequence[Row]) -> None:
        """As :meth:`imglish.search.store.Store.upsert`, in requests that the server takes."""
        from qdrant_client import models

        if len({row.key for row in rows}) < len(rows):
            raise ValueError("the rows of one change must have different keys")
        part: list[Any] = []
        size = 0
        for row in rows:
            vector = np.asarray(row.vector, dtype=np.float32)
            if vector.shape != (self.dimension,) or not np.isfinite(vector).all():
                raise ValueError(f"a vector of shape {vector.shape}: expected a finite one of {self.dimension} numbers")
            part.append(models.PointStruct(id=point_id(row.key), vector=vector.tolist(), payload=payload_of(row)))
            size += 2 * (len(row.thumbnail) + len(row.tokens)) + 16 * self.dimension
            if size > PART:
                self._change(self._client.upsert, part)
                part, size = [], 0
        if part:
            self._change(self._client.upsert, part)

    def delete(self, keys: Collection[str]) -> None:
        if keys:
            self._change(self._client.delete, [point_id(key) for key in keys])

    def mark_duplicates(self, first: dict[str, str]) -> None:
        from qdrant_client import models

        marked: dict[str, list[Any]] = {}
        for key, value in first.items():
            marked.setdefault(value, []).append(point_id(key))
        changes = [models.SetPayload(payload={"duplicate_of": value}, points=ids) for value, ids in marked.items()]
        if changes:
            operations = [models.SetPayloadOperation(set_payload=change) for change in changes]
            self._change(self._client.batch_update_points, operations)

    def optimize(self) -> None:
        """Nothing to be done: the server keeps its data in order by itself."""

    @contextmanager
    def writing(self, wait: float = 0.0) -> Iterator[None]:
        with _refusals(self.url), self._lease.held(wait):
            yield

    def _change(self, change: Any, what: Sequence[Any]) -> None:
        with _refusals(self.url):
            self._lease.check()
            change(self._name, what, wait=True)
            self._set_note("version", {"number": time.time_ns()})

    # ---- reading --------------------------------------------------------------------------------------------------

    def search(self, vectors: np.ndarray, k: int, where: Filter | None = None, exact: bool = False) -> list[list[Hit]]:
        vectors = np.asarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise ValueError(f"queries of shape {vectors.shape}: expected (Q, {self.dimension})")
        if k < 1 or not len(vectors):
            return [[] for _ in vectors]
        exact = exact or self.count() <= self.exact_rows or (where is not None and self.count(where) <= self.few_rows)
        with _refusals(self.url):
            return self._nearest(vectors, k, k + SPARE, _filter(where), exact)

    def _nearest(self, vectors: np.ndarray, k: int, limit: int, condition: Any, exact: bool) -> list[list[Hit]]:
        """limit: how many rows are asked for; where the k-th ties with the last of them, the search asks for more."""
        from qdrant_client import models

        how = models.SearchParams(exact=exact, hnsw_ef=max(EF, 2 * limit))
        asked = [
            models.QueryRequest(query=vector.tolist(), filter=condition, params=how, limit=limit, with_payload=["key"])
            for vector in vectors
        ]
        found = []
        for vector, answer in zip(vectors, self._client.query_batch_points(self._name, asked), strict=True):
            hits = [Hit(str(point.payload["key"]), float(point.score)) for point in answer.points]
            hits.sort(key=lambda hit: (-hit.score, hit.key))
            if len(hits) == limit and hits[k - 1].score == hits[-1].score:
                [hits] = self._nearest(vector[None], k, 4 * limit, condition, exact)
            found.append(hits[:k])
        return found

    def get(self, keys: Collection[str], columns: Sequence[str] = CARD, vectors: bool = False) -> dict[str, Row]:
        wanted, every = [*dict.fromkeys(("key", *columns))], list(keys)
        found: dict[str, Row] = {}
        for low in range(0, len(every), BLOCK):
            ids = [point_id(key) for key in every[low : low + BLOCK]]
            with _refusals(self.url):
                points = self._client.retrieve(self._name, ids, with_payload=wanted, with_vectors=vectors)
            found |= {row.key: row for row in map(row_of, points)}
        return {key: found[key] for key in every if key in found}

    def scan(self, columns: Sequence[str], vectors: bool = False, where: Filter | None = None) -> Iterator[list[Row]]:
        wanted, condition = [*dict.fromkeys(("key", *columns))], _filter(where)
        offset: Any = None
        while True:
            with _refusals(self.url):
                points, offset = self._client.scroll(
                    self._name, condition, BLOCK, offset=offset, with_payload=wanted, with_vectors=vectors
                )
            if points:
                yield [row_of(point) for point in points]
            if offset is None:
                return

    def count(self, where: Filter | None = None) -> int:
        with _refusals(self.url):
            return int(self._client.count(self._name, _filter(where), exact=True).count)

    def info(self) -> StoreInfo:
        rows = self.count()
        with _refusals(self.url):
            engine = f"Qdrant {self._client.info().version}"
        recall = "exact, on the server" if rows <= self.exact_rows else f"graph (HNSW), ef {EF} or 2 k; exact for few"
        return StoreInfo(self.url, engine, self.version, rows, self.dimension, None, recall)

    def note(self, name: str) -> str | None:
        text = self._note(f"note {name}").get("text")
        return str(text) if text is not None else None

    def set_note(self, name: str, text: str) -> None:
        with _refusals(self.url):
            self._set_note(f"note {name}", {"text": text})

    def close(self) -> None:
        self._client.close()

    def _note(self, name: str) -> dict[str, Any]:
        with _refusals(self.url):
            found = self._client.retrieve(self._notes, [point_id(name)], with_payload=True)
        return dict(found[0].payload or {}) if found else {}

    def _set_note(self, name: str, payload: dict[str, Any]) -> None:
        from qdrant_client import models

        self._client.upsert(self._notes, [models.PointStruct(id=point_id(name), vector={}, payload=payload)], wait=True)


def _connected(address: str) -> Any:
    try:
        from qdrant_client import QdrantClient
    except ImportError as error:
        raise missing_extra("qdrant", "qdrant-client") from error
    return QdrantClient(url=address, api_key=os.environ.get(KEY), timeout=SECONDS, check_compatibility=False)


def _make(client: Any, name: str, dimension: int) -> None:
    """The two collections, the notes first; another process may do the same."""
    from qdrant_client import models

    half = models.VectorParams(size=dimension, distance=models.Distance.DOT, datatype=models.Datatype.FLOAT16)
    for collection, vectors in ((f"{name}-notes", {}), (name, half)):
        try:
            client.create_collection(collection, vectors_config=vectors, on_disk_payload=True)
        except Exception:
            if not client.collection_exists(collection):
                raise
    if "Local" not in type(client._client).__name__:  # the client's local form has no indexes and warns of them
        for field, kind in _INDEXED.items():
            client.create_payload_index(name, field, field_schema=kind)


# ---- filters --------------------------------------------------------------------------------------------------------


def _filter(where: Filter | None) -> Any:
    from qdrant_client import models

    return None if where is None else models.Filter(must=[_tree(where)])


def _tree(where: Filter) -> Any:
    from qdrant_client import models

    if isinstance(where, Both):
        return models.Filter(must=[_tree(part) for part in where.parts])
    if isinstance(where, Either):
        return models.Filter(should=[_tree(part) for part in where.parts])
    if isinstance(where, Condition):
        return _condition(where)
    return models.Filter(must_not=[_tree(where.part)])


def _condition(where: Condition) -> Any:
    """Values go as values; fields and operators come from the filter's own lists."""
    from qdrant_client import models

    name, op, value = where.field, where.op, where.value

    def has(field: str, **condition: Any) -> Any:
        return models.FieldCondition(key=field, **condition)

    if name == "date":
        low, high = (when(bound) for bound in date_bounds(str(value)))
        edges = {"<": {"lt": low}, "<=": {"lte": high}, ">": {"gt": high}, ">=": {"gte": low}}
        inside = has("when", range=models.Range(gte=low, lte=high))
        if op == "!=":  # of those whose date is known
            return models.Filter(must=[has("when", range=models.Range(gte=0))], must_not=[inside])
        return inside if op == "=" else has("when", range=models.Range(**edges[op]))
    if name in ("width", "height") and op not in ("=", "!="):
        edge = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}[op]
        return has(name, range=models.Range(**{edge: float(value)}))
    if name == "captions":
        return has("lower", match=models.MatchSubstring(substring=str(value).lower()))
    if op == "starts":
        return has(name, match=models.MatchPrefix(prefix=str(value)))
    if op == "contains":
        return has(name, match=models.MatchSubstring(substring=str(value)))
    same = has(name, match=models.MatchValue(value=value))
    return models.Filter(must_not=[same]) if op == "!=" else same


@contextmanager
def _refusals(url: str) -> Iterator[None]:
    """What the server and the way to it refuse, as :class:`StoreError` with the index's name."""
    try:
        yield
    except (StoreError, ImportError):
        raise
    except Exception as error:
        module = type(error).__module__.partition(".")[0]
        if not isinstance(error, (OSError, ValueError)) and module not in ("qdrant_client", "httpx", "httpcore"):
            raise
        said = " ".join(str(error).split())[:400] or type(error).__name__
        raise StoreError(f"{url}: the server cannot be reached, or refuses: {said}") from error
