"""The index of tar shards: made once, mapped by every process, mended shard by shard when files change."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from imglish import atomic
from imglish.data.errors import DataError, Errors, Problem, printable
from imglish.data.records import Record
from imglish.data.sources.base import Source
from imglish.data.sources.columns import ColumnsError, Texts, map_columns, numbers, runs, write_columns
from imglish.data.sources.config import SourceConfig
from imglish.data.sources.files import Stat, is_remote
from imglish.data.sources.table import ColumnSource
from imglish.data.sources.tars import Shard, TarPictures, find_shards, read_shard

log = logging.getLogger(__name__)

VERSION = 1
PARALLEL = 4  # shards from which on several processes make the index
SAVE_EVERY = 60.0  # seconds of indexing after which what is done is kept
TEXTS = ("keys", "captions", "swapped", "groups", "reasons", "places", "messages")
PER_RECORD = ("keys", "groups", "counts", "offsets", "sizes")
PER_CAPTION = ("captions", "swapped")
PER_PROBLEM = ("reasons", "places", "messages")

Part = dict[str, Any]  # columns of one shard: Texts or int64 arrays, by name; and its number of rows


def open_tars(config: SourceConfig, errors: Errors) -> TarSource:
    """Records of tar shards, by their index. What is missing of it, or has changed since, is made first."""
    shards = find_shards(config.path)
    path = _index_path(config)
    if not _fresh(shards, _known_parts(path)):
        with _alone(path):  # another process may have made it meanwhile
            known = _known_parts(path)
            if not _fresh(shards, known):
                _make(path, shards, known, config)
    source = TarSource(path, shards[0].folder, config)
    source.errors = errors
    errors.extend(source.problems())
    errors.check(source.rows, source.rows)
    if not len(source):
        if not errors.named:
            asked = f"split {config.split!r}" + (f", language {config.language!r}" if config.language else "")
            raise DataError(f"{config.path}: none of {source.rows} samples is of {asked}")
        example = printable(errors.named[0].message)
        raise DataError(f"{config.path}: no records ({errors.summary()}); for example {example}")
    return source


def _fresh(shards: list[Shard], known: dict[str, tuple[Stat, Part]]) -> bool:
    return [(shard.name, shard.stat) for shard in shards] == [(name, stat) for name, (stat, _) in known.items()]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; where the file system has no locks, any."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("wb")
    except OSError as error:
        raise DataError(
            f"the index of the tar files cannot be written to {path}: {error}; name a folder with index"
        ) from error
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class TarSource(Source):
    """Records of tar shards. Other processes map the index file anew, nothing is copied to them.

    Raises :class:`imglish.data.sources.columns.ColumnsError` for a file that is no index.
    """

    def __init__(self, path: Path, folder: str, config: SourceConfig) -> None:
        self.path, self.folder, self.config = path, folder, config
        meta, columns = map_columns(path)
        texts = _texts(columns)
        shards = tuple(Shard(folder, name, Stat(size, stamp)) for name, size, stamp in meta["shards"])
        pictures = TarPictures.of(shards, columns["records"], columns["offsets"], columns["sizes"])
        self.errors = Errors(config.max_errors, what="samples")
        self.rows = int(columns["rows"].sum())
        self.columns = ColumnSource(
            texts["keys"],
            None if config.needs == "texts" else pictures,
            texts["captions"],
            runs(columns["counts"]),
            texts["swapped"] if len(texts["swapped"].data) else None,
            texts["groups"] if len(texts["groups"].data) else None,
            self.errors,
        )

    def __len__(self) -> int:
        return len(self.columns)

    def record(self, number: int) -> Record:
        return self.columns.record(number)

    def caption_counts(self) -> np.ndarray:
        return self.columns.caption_counts()

    def digest(self) -> str:
        return self.columns.digest()

    def problems(self) -> Iterator[Problem]:
        """What was wrong with the shards when they were indexed."""
        texts = _texts(map_columns(self.path)[1])
        for number in range(len(texts["reasons"])):
            reason, place, message = (texts[name][number] for name in PER_PROBLEM)
            yield Problem(place, reason, message)

    def __reduce__(self) -> Any:
        return TarSource, (self.path, self.folder, self.config)


def _texts(columns: dict[str, np.ndarray]) -> dict[str, Texts]:
    return {name: Texts(columns[name], columns[f"{name}.starts"]) for name in TEXTS}


def _index_path(config: SourceConfig) -> Path:
    """Where the index lies: ``config.index``, beside the tars, or in the cache folder where nothing can be written."""
    asked: list[object] = [config.split, config.split_field, config.language, config.caption_fields, config.group_field]
    asked += [config.swapped_field, config.needs, config.by_split]
    place = config.path if is_remote(config.path) else os.path.abspath(config.path)
    if config.index is not None:
        asked.append(place)
    name = hashlib.blake2b(json.dumps([VERSION, *asked]).encode(), digest_size=8).hexdigest()
    whole = hashlib.blake2b(json.dumps([VERSION, *asked, place]).encode(), digest_size=8).hexdigest()
    if config.index is not None:
        return Path(config.index) / f"{name}.index"
    cached = cache_folder() / f"{whole}.index"
    if is_remote(config.path):
        return cached
    here = Path(config.path)
    folder = here if here.is_dir() else here.parent
    part = "" if here.is_dir() else hashlib.blake2b(here.name.encode(), digest_size=4).hexdigest() + "-"
    return folder / f".imglish-{part}{name}.index" if os.access(folder, os.W_OK) else cached


def cache_folder() -> Path:
    """Where indexes lie whose own place cannot be written: ``$XDG_CACHE_HOME/imglish``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imglish"


# ---- making ---------------------------------------------------------------------------------------------------------


def _known_parts(path: Path) -> dict[str, tuple[Stat, Part]]:
    """Parts of an earlier index by name of the shard; none where it is damaged or missing."""
    if not path.is_file():
        return {}
    try:
        meta, columns = map_columns(path)
        if meta.get("version") != VERSION:
            return {}
        ends = {name: runs(columns[name]) for name in ("records", "caption_counts", "problems")}
        texts = _texts(columns)
        _consistent(texts, columns, ends, len(meta["shards"]))
        found = {}
        for number, (name, size, stamp) in enumerate(meta["shards"]):
            part: Part = {"rows": int(columns["rows"][number])}
            for names, by in ((PER_RECORD, "records"), (PER_CAPTION, "caption_counts"), (PER_PROBLEM, "problems")):
                low, high = int(ends[by][number]), int(ends[by][number + 1])
                for column in names:
                    part[column] = texts[column].slice(low, high) if column in texts else columns[column][low:high]
            found[name] = (Stat(size, stamp), part)
        return found
    except (ColumnsError, KeyError, TypeError, ValueError, IndexError) as error:
        log.warning("the index %s is damaged and is made anew: %s", path, error)
        return {}


def _consistent(
    texts: dict[str, Texts], columns: dict[str, np.ndarray], ends: dict[str, np.ndarray], shards: int
) -> None:
    """Raise :class:`ColumnsError` for columns that do not fit together: wrong places must not give wrong records."""
    for text in texts.values():
        if text.starts[0] != 0 or text.starts[-1] != len(text.data) or (np.diff(text.starts) < 0).any():
            raise ColumnsError("texts overlap")
    for by, names in (("records", PER_RECORD), ("caption_counts", PER_CAPTION), ("problems", PER_PROBLEM)):
        for name in names:
            have = len(texts[name]) if name in texts else len(columns[name])
            if have != ends[by][-1] or len(columns[by]) != shards or (columns[by] < 0).any():
                raise ColumnsError(f"{name} has {have} entries, {ends[by][-1]} are expected")
    if (columns["counts"] < 0).any() or columns["counts"].sum() != ends["caption_counts"][-1]:
        raise ColumnsError("captions and records do not fit together")
    if len(columns["rows"]) != shards or (columns["sizes"] < 0).any():
        raise ColumnsError("sizes below zero")


def _make(path: Path, shards: list[Shard], known: dict[str, tuple[Stat, Part]], config: SourceConfig) -> None:
    """Index the shards that have no part yet, and write the index."""
    parts = {s.name: known[s.name] for s in shards if s.name in known and known[s.name][0] == s.stat}
    todo = [shard for shard in shards if shard.name not in parts]
    if len(todo) > PARALLEL:
        log.info("indexing %d tar files of %s", len(todo), config.path)
    saved = time.monotonic()
    for number, (shard, part) in enumerate(zip(todo, _read_all(todo, config)), 1):
        parts[shard.name] = (shard.stat, part)
        if time.monotonic() - saved > SAVE_EVERY:
            _write(path, [shard for shard in shards if shard.name in parts], parts)
            log.info("%d of %d tar files are indexed", number, len(todo))
            saved = time.monotonic()
    _write(path, shards, parts)


def _read_all(shards: list[Shard], config: SourceConfig) -> Iterator[Part]:
    """Parts of the shards, in their order; many local ones by several processes."""
    processes = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, len(shards))
    if len(shards) <= PARALLEL or processes < 2 or is_remote(config.path):
        yield from (_part((shard, config)) for shard in shards)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_part, [(shard, config) for shard in shards])


def _part(task: tuple[Shard, SourceConfig]) -> Part:
    """Columns of one shard. One that cannot be read at all has no records and one problem."""
    shard, config = task
    try:
        found = read_shard(shard, config)
    except OSError as error:
        text = f"{shard.path}: cannot be read: {error}"
        empty: Part = {
            name: Texts.of(()) if name in TEXTS else np.empty(0, np.int64) for name in PER_RECORD + PER_CAPTION
        }
        return {**empty, "rows": 1, **_problem_columns([Problem(shard.path, "not readable", text)])}
    return {
        "rows": found.rows,
        "keys": found.names.build(),
        "groups": found.groups.build(),
        "counts": numbers(found.counts, np.int64),
        "offsets": numbers(found.starts, np.int64),
        "sizes": numbers(found.sizes, np.int64),
        "captions": found.captions.build(),
        "swapped": found.swapped.build(),
        **_problem_columns(found.errors.named),
    }


def _problem_columns(problems: Iterable[Problem]) -> dict[str, Texts]:
    rows = [(p.reason, p.key, p.message) for p in problems]
    return {name: Texts.of(_writable(row[i]) for row in rows) for i, name in enumerate(PER_PROBLEM)}


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _write(path: Path, shards: list[Shard], parts: dict[str, tuple[Stat, Part]]) -> None:
    rows = [parts[shard.name][1] for shard in shards]
    columns: dict[str, np.ndarray] = {
        "rows": np.array([part["rows"] for part in rows], dtype=np.int64),
        "records": np.array([len(part["keys"]) for part in rows], dtype=np.int64),
        "caption_counts": np.array([len(part["captions"]) for part in rows], dtype=np.int64),
        "problems": np.array([len(part["reasons"]) for part in rows], dtype=np.int64),
    }
    for name in PER_RECORD + PER_CAPTION + PER_PROBLEM:
        if name in TEXTS:
            whole = Texts.cat(part[name] for part in rows)
            columns[name], columns[f"{name}.starts"] = whole.data, whole.starts
        else:
            columns[name] = np.concatenate([part[name] for part in rows]).astype(np.int64)
    meta = {"version": VERSION, "shards": [[s.name, s.stat.size, s.stat.stamp] for s in shards]}
    try:
        atomic.write_file(path, lambda file: write_columns(file, columns, meta))
    except OSError as error:
        raise DataError(f"the index of the tar files cannot be written to {path}: {error}") from error
