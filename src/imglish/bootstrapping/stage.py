"""Stages of work over shards, by any number of plain processes.

A stage turns each shard of a source into one parquet file in its folder, written under another name and renamed when it
is whole. What is there is done, what is missing is to do: that is all there is to resuming. ``stage.json`` says what
the folder holds. Nothing of the source is written to.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from imglish import atomic
from imglish.bootstrapping.leases import Leases
from imglish.data.errors import DataError
from imglish.data.images import ImageError
from imglish.data.sources import Source, SourceConfig, kind_of, open_source
from imglish.data.sources.arrow import pyarrow
from imglish.data.sources.config import from_mapping
from imglish.data.sources.files import is_folder, is_remote, join, names_in
from imglish.data.sources.tars import find_shards

STAGE = "stage.json"
WORK = ".work"
VERSION = 1
LEASE = 120.0  # seconds
WAIT = 0.5  # seconds between two looks at what others do


@dataclass(frozen=True)
class Shard:
    """Records ``start`` to ``stop`` (None: the end) of the data at ``path``."""

    name: str
    path: str
    start: int = 0
    stop: int | None = None


def divide(config: SourceConfig, per_shard: int) -> tuple[Shard, ...]:
    """The shards of a source: its tar or parquet files, else runs of ``per_shard`` records."""
    if per_shard < 1:
        raise DataError(f"{per_shard} records a shard: at least 1")
    kind = config.kind or kind_of(config.path)
    files: list[str] = []
    if kind == "tars":
        files = [shard.path for shard in find_shards(config.path)]
    elif kind == "parquet" and is_folder(config.path) and config.split is None:
        files = [join(config.path, name) for name in names_in(config.path) if name.endswith(".parquet")]
    if files:
        stems = [path.rsplit("/", 1)[-1].rsplit(".", 1)[0] for path in files]
        if len(set(stems)) < len(stems):
            stems = [f"{number:05d}" for number in range(len(files))]
        return tuple(Shard(stem, path) for stem, path in zip(stems, files, strict=True))
    count = len(open_source(config))
    starts = range(0, count, per_shard)
    return tuple(Shard(f"{n:05d}", config.path, start, min(start + per_shard, count)) for n, start in enumerate(starts))


@dataclass(frozen=True)
class Done:
    """What a worker did. shards: that it wrote; failed: name -> why; rows: that it wrote; seconds: of work."""

    shards: int
    failed: dict[str, str]
    rows: int
    seconds: float


@dataclass(frozen=True)
class Stage:
    """A folder of one parquet file a shard. kind: of its rows; settings: all that its content depends on beside the
    source, plain data; source: how it is read."""

    out: Path
    kind: str
    settings: dict[str, Any]
    source: SourceConfig
    shards: tuple[Shard, ...]
    _opened: dict[str, Source] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def begin(
        out: Path,
        kind: str,
        settings: dict[str, Any],
        source: SourceConfig,
        per_shard: int,
        shards: Sequence[Shard] | None = None,
    ) -> Stage:
        """A new stage in ``out``, or the one that is there, which has to be of the same source and settings.

        shards: those of an earlier stage of the same source, in place of a new division.
        """
        pyarrow()
        source = absolute(source)
        if (out / STAGE).exists():
            found = Stage.open(out)
            wanted: dict[str, Any] = {"kind": kind, "source": _plain(source), **settings}
            there = {"kind": found.kind, "source": _plain(found.source), **found.settings}
            wanted = json.loads(json.dumps(wanted))
            if differ := sorted(name for name in wanted | there if wanted.get(name) != there.get(name)):
                raise DataError(f"{out} was begun with other settings ({', '.join(differ)}); choose another folder")
            return found
        if out.exists() and (not out.is_dir() or any(name.suffix == ".parquet" for name in out.iterdir())):
            raise DataError(f"{out} is there and was not written by this command; choose another folder")
        stage = Stage(out, kind, settings, source, tuple(shards) if shards else divide(source, per_shard))
        data = {"version": VERSION, "kind": kind, "settings": settings, "source": _plain(source)}
        data["shards"] = [asdict(shard) for shard in stage.shards]
        (out / WORK).mkdir(parents=True, exist_ok=True)
        own = out / WORK / f"stage.{os.getpid()}.part"  # workers that start at one moment write the same
        atomic.write_file(own, lambda file: file.write(json.dumps(data, indent=1).encode()))
        os.replace(own, out / STAGE)
        return stage

    @staticmethod
    def open(out: Path) -> Stage:
        """The stage in a folder. Raises :class:`DataError`."""
        path = out / STAGE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise DataError(f"{path} is of version {data['version']}, not {VERSION}")
            source = from_mapping(data["source"], str(path))
            shards = tuple(Shard(**shard) for shard in data["shards"])
            return Stage(out, data["kind"], data["settings"], source, shards)
        except FileNotFoundError as error:
            raise DataError(f"{out} is no folder of captions or scores: it has no {STAGE}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is damaged: {error!r}") from error

    def file(self, shard: Shard) -> Path:
        return self.out / f"{shard.name}.parquet"

    def missing(self) -> list[Shard]:
        """The shards that nobody has finished."""
        return [shard for shard in self.shards if not self.file(shard).exists()]

    def records(self, shard: Shard) -> Source:
        """Its records. Raises :class:`DataError` where they are gone or have become more or fewer."""
        if shard.path not in self._opened:
            self._opened.clear()
            self._opened[shard.path] = open_source(replace(self.source, path=shard.path))
        whole = self._opened[shard.path]
        if shard.stop is None:
            return whole
        expected = max(other.stop or 0 for other in self.shards)
        if len(whole) != expected:
            raise DataError(f"{shard.path} had {expected} records when this was begun, now {len(whole)}")
        return whole[shard.start : shard.stop]

    def run(
        self,
        work: Callable[[Shard, Source], Any],
        *,
        rank: int = 0,
        world: int = 1,
        lease: float = LEASE,
        said: Callable[[str], object] = lambda line: None,
    ) -> Done:
        """Work until every shard is done or has failed; ``work`` gives a shard's table.

        rank, world: this process begins with the shards ``rank, rank + world, ...`` and goes on with what others have
        not begun or were killed over. A shard whose data cannot be read is left out and named; what fails in writing
        (a full disk) ends the work with that error, and nothing half-written stays.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        order = [*self.shards[rank::world], *(s for n, s in enumerate(self.shards) if n % world != rank)]
        failed: dict[str, str] = {}
        shards = rows = 0
        spent = 0.0
        with Leases(self.out / WORK, lease) as leases:
            while waiting := [shard for shard in order if shard.name not in failed and not self.file(shard).exists()]:
                idle = True
                for shard in waiting:
                    if self.file(shard).exists() or not leases.take(shard.name):
                        continue
                    idle, start = False, time.monotonic()
                    try:
                        if self.file(shard).exists():
                            continue
                        table = self._work(work, shard)
                        if isinstance(table, str):
                            failed[shard.name] = table
                            said(f"{shard.name}: {table}")
                            continue
                        self._publish(leases.part(shard.name), shard, table)
                        shards, rows, spent = shards + 1, rows + len(table), spent + time.monotonic() - start
                        said(f"{shard.name}: {len(table)} rows")
                    finally:
                        leases.release()
                if idle:
                    time.sleep(WAIT)
        return Done(shards, failed, rows, spent)

    def _work(self, work: Callable[[Shard, Source], Any], shard: Shard) -> Any:
        """The table of a shard, or why it cannot be made."""
        try:
            return work(shard, self.records(shard))
        except (DataError, ImageError, FileNotFoundError) as error:
            return f"{type(error).__name__}: {error}" if not str(error) else str(error)

    def _publish(self, part: Path, shard: Shard, table: Any) -> None:
        arrow = pyarrow()
        atomic.write_file(part, lambda file: arrow.parquet.write_table(table, file))
        os.replace(part, self.file(shard))

    def tables(self, columns: Sequence[str] | None = None, of: Sequence[Shard] | None = None) -> Any:
        """All finished rows as one table, with a column ``shard``: the number of the row's shard."""
        arrow = pyarrow()
        tables = []
        for number, shard in enumerate(self.shards):
            if (of is not None and shard not in of) or not self.file(shard).exists():
                continue
            try:
                table = arrow.parquet.read_table(self.file(shard), columns=columns, partitioning=None)
            except (arrow.ArrowException, OSError) as error:
                raise DataError(
                    f"{self.file(shard)} is damaged ({error}); remove it and run the command again"
                ) from error
            tables.append(table.append_column("shard", arrow.repeat(arrow.scalar(number, arrow.int32()), len(table))))
        if not tables:
            raise DataError(f"{self.out}: no shard is finished")
        return arrow.concat_tables(tables)


def absolute(source: SourceConfig) -> SourceConfig:
    """With paths that mean the same from any folder."""
    changes = {
        name: os.path.abspath(value)
        for name in ("path", "images", "index")
        if (value := getattr(source, name)) and not is_remote(value) and ":" not in value.split("/", 1)[0]
    }
    return replace(source, **changes)


def _plain(source: SourceConfig) -> dict[str, Any]:
    """What differs from the defaults, as :func:`from_mapping` takes it."""
    default = SourceConfig(path=source.path)
    names = [f.name for f in fields(SourceConfig)]
    changed = {name: getattr(source, name) for name in names if getattr(source, name) != getattr(default, name)}
    return {"path": source.path} | {n: list(v) if isinstance(v, tuple) else v for n, v in changed.items()}
