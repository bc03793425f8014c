"""An index as a LanceDB table: a folder, or a URL of object storage; nothing to start.

Every change is a new version of the table, committed at once, so that readers see the old one or the new one. Vectors
are searched exactly in memory (:mod:`imglish.search.exact`) up to :data:`~imglish.search.exact.EXACT_ROWS` rows; beyond
these an index of Lance proposes candidates whose full vectors are compared, and a filter that leaves few rows is
searched exactly.
"""

from __future__ import annotations

import shutil
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imglish import atomic
from imglish.search.exact import EXACT_ROWS, FEW_ROWS, Matrix
from imglish.search.filters import Both, Condition, Either, Filter, date_bounds
from imglish.search.locks import writer_lock
from imglish.search.store import CARD, COLUMNS, Hit, Row, StoreError, StoreInfo, missing_extra

TABLE = "pictures"
NOTES = "notes"
PROBES = 0.5  # of the partitions, which approximate search reads
REFINE = 20  # times k candidates, whose full vectors are compared, and at least
LEAST_REFINED = 1000  # of them
OLD = timedelta(hours=1)  # that versions which nobody reads are kept
INDEXED_KEYS = 50_000  # rows from which on pictures are found by their keys through an index
BLOCK = 4096  # rows read at a time
SLOW = 1.0  # seconds; a matrix that takes longer to load is not loaded for every version
_ABOUT = 500  # keys in one condition
_LOCK = "writer.lock"


class LanceStore:
    """See :class:`imglish.search.store.Store`; exact_rows, few_rows: the limits of exact search."""

    def __init__(
        self, url: str, table: Any, database: Any, exact_rows: int = EXACT_ROWS, few_rows: int = FEW_ROWS
    ) -> None:
        self.url, self.exact_rows, self.few_rows = url, exact_rows, few_rows
        self._table, self._database = table, database
        self.dimension = int(table.schema.field("vector").type.list_size)
        self._lock = threading.RLock()
        self._matrix: tuple[int, Matrix] | None = None
        self._loaded = (0.0, 0.0)  # when the matrix was loaded, seconds that this took
        self._chosen: dict[tuple[int, Filter], np.ndarray] = {}
        self._counts: dict[tuple[int, Filter | None], int] = {}

    @staticmethod
    def open(
        url: str, dimension: int | None = None, exact_rows: int = EXACT_ROWS, few_rows: int = FEW_ROWS
    ) -> LanceStore:
        """The store at ``url``; where nothing is, ``dimension`` makes one, without it that is a :class:`StoreError`."""
        try:
            import lancedb
        except ImportError as error:
            raise missing_extra("search", "lancedb") from error
        local = _local(url)
        if local is not None and not (local / f"{TABLE}.lance").is_dir():
            if dimension is None:
                raise StoreError(f"there is no index at {url}: make one with imglish index SOURCE --model M --to {url}")
            if local.exists() and (not local.is_dir() or _foreign(local)):
                raise StoreError(f"{url} exists and is no index: choose another folder")
        with _refusals(url):
            if local is not None:
                local.mkdir(parents=True, exist_ok=True)
            database = lancedb.connect(url, read_consistency_interval=timedelta(0))
            if dimension is None or TABLE in database.list_tables().tables:
                table = database.open_table(TABLE)
            else:
                table = database.create_table(TABLE, schema=_schema(dimension), exist_ok=True)
            store = LanceStore(url, table, database, exact_rows, few_rows)
        if dimension is not None and store.dimension != dimension:
            raise StoreError(f"{url} holds vectors of {store.dimension} numbers, the model gives {dimension}")
        return store

    @property
    def version(self) -> int:
        with _refusals(self.url):
            return int(self._table.version)

    # ---- writing --------------------------------------------------------------------------------------------------

    def upsert(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        if len({row.key for row in rows}) < len(rows):
            raise ValueError("the rows of one change must have different keys")
        with _refusals(self.url):
            change = self._table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all()
            change.execute(_arrow(rows, self.dimension))
            self._loaded = (0.0, 0.0)

    def delete(self, keys: Collection[str]) -> None:
        for part in _parts(keys, _ABOUT):
            with _refusals(self.url):
                self._table.delete(_in(part))
                self._loaded = (0.0, 0.0)

    def mark_duplicates(self, first: dict[str, str]) -> None:
        import pyarrow as pa

        if not first:
            return
        text = pa.string()
        columns = {"key": pa.array(list(first), text), "duplicate_of": pa.array(list(first.values()), text)}
        with _refusals(self.url):
            self._table.merge_insert("key").when_matched_update_all().execute(pa.table(columns))
            self._loaded = (0.0, 0.0)

    def optimize(self) -> None:
        from lancedb.index import BTree, IvfRq

        with _refusals(self.url):
            rows = self._table.count_rows()
            indexes = {index.columns[0] for index in self._table.list_indices()}
            if rows > self.exact_rows and "vector" not in indexes:
                self._table.create_index("vector", config=IvfRq(distance_type="dot"))
            if rows > INDEXED_KEYS and "key" not in indexes:
                self._table.create_index("key", config=BTree())
            self._table.optimize(cleanup_older_than=OLD)

    @contextmanager
    def writing(self, wait: float = 0.0) -> Iterator[None]:
        local = _local(self.url)
        with writer_lock(local / _LOCK, self.url, wait) if local is not None else nullcontext():
            yield

    # ---- reading --------------------------------------------------------------------------------------------------

    def search(self, vectors: np.ndarray, k: int, where: Filter | None = None, exact: bool = False) -> list[list[Hit]]:
        vectors = np.asarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise ValueError(f"queries of shape {vectors.shape}: expected (Q, {self.dimension})")
        if k < 1:
            return [[] for _ in vectors]
        if self.count() <= self.exact_rows:
            matrix = self._current()
            return matrix[1].search(vectors, k, self._places(matrix, where) if where is not None else None)
        few = where is not None and self.count(where) <= self.few_rows
        return [self._search_table(vector, k, where, exact or few) for vector in vectors]

    def _search_table(self, vector: np.ndarray, k: int, where: Filter | None, exact: bool) -> list[Hit]:
        with _refusals(self.url):
            query = self._table.search(vector, vector_column_name="vector").distance_type("dot")
            query = query.select(["key", "_distance"]).limit(k)
            if where is not None:
                query = query.where(to_sql(where), prefilter=True)
            refine = max(REFINE, -(-LEAST_REFINED // k))
            query = query.bypass_vector_index() if exact else query.nprobes(self._probes()).refine_factor(refine)
            found = query.to_arrow()
        scores = 1.0 - found.column("_distance").to_numpy()
        hits = [Hit(str(key), float(score)) for key, score in zip(found.column("key").to_pylist(), scores)]
        return sorted(hits, key=lambda hit: (-hit.score, hit.key))

    def _probes(self) -> int:
        rows = self.count()
        return max(32, int(PROBES * rows / 4096))  # a partition holds 4096 rows where nothing else is said

    def get(self, keys: Collection[str], columns: Sequence[str] = CARD, vectors: bool = False) -> dict[str, Row]:
        wanted = [*dict.fromkeys(("key", *columns)), *(["vector"] if vectors else [])]
        found: dict[str, Row] = {}
        for part in _parts(keys, _ABOUT):
            with _refusals(self.url):
                table = self._table.search().select(wanted).where(_in(part)).to_arrow()
                found |= {row.key: row for row in _rows(table, self.dimension)}
        return {key: found[key] for key in keys if key in found}

    def scan(self, columns: Sequence[str], vectors: bool = False, where: Filter | None = None) -> Iterator[list[Row]]:
        wanted = [*dict.fromkeys(("key", *columns)), *(["vector"] if vectors else [])]
        with _refusals(self.url):
            query = self._table.search().select(wanted)
            if where is not None:
                query = query.where(to_sql(where))
            for batch in query.to_batches(BLOCK):
                yield _rows(batch, self.dimension)

    def count(self, where: Filter | None = None) -> int:
        name = (self.version, where)
        if name not in self._counts:
            with _refusals(self.url):
                found = int(self._table.count_rows(to_sql(where) if where is not None else None))
            self._counts = {key: value for key, value in self._counts.items() if key[0] == name[0]} | {name: found}
        return self._counts[name]

    def info(self) -> StoreInfo:
        from importlib.metadata import version

        rows, local = self.count(), _local(self.url)
        size = sum(file.stat().st_size for file in local.rglob("*") if file.is_file()) if local is not None else None
        recall = "exact, in memory" if rows <= self.exact_rows else self._recall_of_many()
        return StoreInfo(self.url, f"LanceDB {version('lancedb')}", self.version, rows, self.dimension, size, recall)

    def _recall_of_many(self) -> str:
        if any("vector" in index.columns for index in self._table.list_indices()):
            return f"IVF_RQ, {self._probes()} probes, {LEAST_REFINED} or {REFINE} k candidates compared in full"
        return "exact, from disk (imglish index --optimize builds the index for this many rows)"

    def note(self, name: str) -> str | None:
        local = _local(self.url)
        with _refusals(self.url):
            if local is not None:
                path = local / f"{name}.json"
                return path.read_text(encoding="utf-8") if path.is_file() else None
            if NOTES not in self._database.list_tables().tables:
                return None
            rows = self._database.open_table(NOTES).search().where(f"name = {_quoted(name)}").limit(1).to_list()
            return str(rows[0]["text"]) if rows else None

    def set_note(self, name: str, text: str) -> None:
        import pyarrow as pa

        local = _local(self.url)
        with _refusals(self.url):
            if local is not None:
                atomic.write_file(local / f"{name}.json", lambda file: file.write(text.encode()))
                return
            schema = pa.schema([("name", pa.string()), ("text", pa.string())])
            table = self._database.create_table(NOTES, schema=schema, exist_ok=True)
            change = table.merge_insert("name").when_matched_update_all().when_not_matched_insert_all()
            change.execute(pa.table({"name": [name], "text": [text]}, schema=schema))

    def close(self) -> None:
        self._matrix = None
        self._chosen.clear()

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _current(self) -> tuple[int, Matrix]:
        """The matrix of the newest version. Where loading takes long and another process writes again and again, it may
        be older, by at most ten times the seconds of loading."""
        with self._lock:
            version = self.version
            held, now = self._matrix, time.monotonic()
            at, seconds = self._loaded
            if held is not None and (held[0] == version or (seconds > SLOW and now - at < 10 * seconds)):
                return held
            matrix = self._load()
            self._loaded = (time.monotonic(), time.monotonic() - now)
            self._chosen.clear()
            self._matrix = (version, matrix)
            return self._matrix

    def _load(self) -> Matrix:
        keys, rows, vectors = [], [], []
        with _refusals(self.url):
            query = self._table.search().select(["key", "vector"]).with_row_id(True)
            for batch in query.to_batches(1 << 16):
                keys.append(batch.column("key").to_numpy(zero_copy_only=False))
                rows.append(batch.column("_rowid").to_numpy(zero_copy_only=False))
                vectors.append(_vectors(batch.column("vector"), self.dimension))
        if not keys:
            return Matrix(
                torch.zeros(0, self.dimension, dtype=torch.float16), np.zeros(0, object), np.zeros(0, np.uint64)
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        matrix = torch.from_numpy(np.concatenate(vectors)).to(device)
        return Matrix(matrix, np.concatenate(keys), np.concatenate(rows))

    def _places(self, matrix: tuple[int, Matrix], where: Filter) -> np.ndarray:
        """Rows of the matrix that a filter accepts, ascending."""
        name = (matrix[0], where)
        with self._lock:
            if name not in self._chosen:
                with _refusals(self.url):
                    query = self._table.search().where(to_sql(where)).select(["key"]).with_row_id(True)
                    rows = query.to_arrow().column("_rowid").to_numpy()
                self._chosen[name] = matrix[1].places(rows)
            return self._chosen[name]


# ---- between rows and Arrow -----------------------------------------------------------------------------------------


def _schema(dimension: int) -> Any:
    import pyarrow as pa

    kinds = {
        "captions": pa.list_(pa.string()),
        "tags": pa.list_(pa.string()),
        "width": pa.int32(),
        "height": pa.int32(),
        "thumbnail": pa.large_binary(),
        "tokens": pa.large_binary(),
    }
    fields = [(name, kinds.get(name, pa.string())) for name in COLUMNS]
    return pa.schema([*fields, ("vector", pa.list_(pa.float16(), dimension))])


def _arrow(rows: Sequence[Row], dimension: int) -> Any:
    import pyarrow as pa

    schema = _schema(dimension)
    vectors = np.stack([np.asarray(row.vector, dtype=np.float16) for row in rows])
    if vectors.shape[1] != dimension or not np.isfinite(vectors).all():
        raise ValueError(f"vectors of shape {vectors.shape}: expected finite ones of {dimension} numbers")
    columns = {name: pa.array([getattr(row, name) for row in rows], schema.field(name).type) for name in COLUMNS}
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dimension)
    return pa.table(columns, schema=schema)


def _vectors(column: Any, dimension: int) -> np.ndarray:
    found: np.ndarray = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension)
    return found


def _rows(table: Any, dimension: int) -> list[Row]:
    columns = {name: table.column(name).to_pylist() for name in table.schema.names if name in COLUMNS}
    for name in ("captions", "tags"):
        if name in columns:
            columns[name] = [tuple(value or ()) for value in columns[name]]
    if "vector" in table.schema.names:
        column = table.column("vector")
        columns["vector"] = list(_vectors(getattr(column, "combine_chunks", lambda: column)(), dimension))
    return [Row(**dict(zip(columns, values))) for values in zip(*columns.values())]


# ---- filters as SQL -------------------------------------------------------------------------------------------------


def to_sql(where: Filter) -> str:
    """The condition in Lance's SQL; values are quoted, names and operators come from the filter's own lists."""
    if isinstance(where, Both):
        return "(" + " AND ".join(map(to_sql, where.parts)) + ")"
    if isinstance(where, Either):
        return "(" + " OR ".join(map(to_sql, where.parts)) + ")"
    if isinstance(where, Condition):
        return _condition(where)
    return f"(NOT {to_sql(where.part)})"


def _condition(where: Condition) -> str:
    name, op = where.field, where.op
    if isinstance(where.value, int):
        return f"({name} {op} {where.value})"
    value = _quoted(where.value)
    if name == "tags":
        return f"({'NOT ' if op == '!=' else ''}array_contains(tags, {value}))"
    if name == "captions":
        return f"contains(lower(array_to_string(captions, '\n')), {_quoted(where.value.lower())})"
    if name == "date":
        low, high = map(_quoted, date_bounds(where.value))
        bounds = {
            "=": f"date >= {low} AND date < {high}",
            "!=": f"(date < {low} OR date >= {high})",
            "<": f"date < {low}",
            "<=": f"date < {high}",
            ">": f"date >= {high}",
            ">=": f"date >= {low}",
        }
        return f"(date <> '' AND {bounds[op]})"
    if op in ("starts", "contains"):
        return f"{'starts_with' if op == 'starts' else 'contains'}({name}, {value})"
    return f"({name} {op} {value})"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _in(keys: Sequence[str]) -> str:
    return f"key IN ({', '.join(map(_quoted, keys))})"


# ---- the disk -------------------------------------------------------------------------------------------------------


def _parts(keys: Collection[str], size: int) -> Iterator[list[str]]:
    every = list(keys)
    for low in range(0, len(every), size):
        yield every[low : low + size]


def _local(url: str) -> Path | None:
    """The folder of an index that lies on this machine."""
    return Path(url) if "://" not in url else None


def _foreign(folder: Path) -> bool:
    """Whether a folder holds something that is no part of an index."""
    return any(file.name != _LOCK and not file.name.endswith((".lance", ".json")) for file in folder.iterdir())


@contextmanager
def _refusals(url: str) -> Iterator[None]:
    """What Lance and the disk refuse, as :class:`StoreError` with the index's name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"{url}: {_why(error, url)}") from error


def _why(error: Exception, url: str) -> str:
    text = str(error)
    if "No space left" in text or "os error 28" in text:
        local = _local(url)
        free = f" ({shutil.disk_usage(local).free >> 20} MiB are free)" if local is not None and local.exists() else ""
        return f"the disk is full{free}; what was committed before is kept, the same command goes on from there"
    if "Permission denied" in text or "os error 13" in text:
        return "it may not be read or written here: permission denied"
    return "cannot be read or written: " + text.split("\n")[0][:400]
