"""Making an index of a source, and bringing it up to date: only what is new or changed is read.

Rows are committed every few hundred pictures. What is committed stays, whatever happens to the process, and the next
run goes on behind it; at every moment the index holds each picture once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from imglish.api import Model
from imglish.data.errors import DataError, Errors, Problem
from imglish.data.pictures import stack
from imglish.data.records import Record
from imglish.models.capabilities import EncodesImages, EncodesTexts, Matches, image_encoder, require
from imglish.objectives.gather import rank, world_size
from imglish.search import manifest as manifests
from imglish.search.duplicates import mark_duplicates
from imglish.search.manifest import Manifest
from imglish.search.originals import stamp_of
from imglish.search.reading import Reading, read_picture
from imglish.search.store import COLUMNS, Row, Store
from imglish.search.tokens import FORMS, pack


@dataclass(frozen=True)
class IndexConfig:
    """How an index is made.

    thumbnail: longest side of the pictures kept for reranking and for pages, 0 for none; tokens: keep image tokens,
    "bfloat16" or "int8", "" for not (of a new index: an old one keeps its own forms); batch: pictures that pass the
    tower at a time; commit: pictures a commit; precision: "float32" or "bfloat16"; decoders: threads that read; prefix:
    put before the keys; keep_missing: rows of the source whose pictures are gone stay; duplicates: mark them; wait:
    seconds to wait for another writer.
    """

    thumbnail: int = 512
    tokens: str = ""
    batch: int = 32
    commit: int = 512
    precision: str = "float32"
    decoders: int = 4
    prefix: str = ""
    keep_missing: bool = False
    duplicates: bool = True
    wait: float = 0.0
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("commit", 1), ("decoders", 1), ("thumbnail", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it has to be at least {least}")
        if self.tokens not in ("", *FORMS):
            raise ValueError(f"tokens is {self.tokens!r}: choose {' or '.join(FORMS)}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision is {self.precision!r}: choose float32 or bfloat16")


@dataclass
class Summary:
    """What a run has done. copied: new or moved pictures whose content the index held already; seconds: "read" is the
    threads' processor time, "encode" and "write" are wall clock."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    deleted: int = 0
    copied: int = 0
    broken: int = 0
    duplicates: int = 0
    rows: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "encode", "write", "all"), 0.0))

    def text(self) -> str:
        done = self.added + self.changed
        rate = f", {done / self.seconds['all']:.0f} a second" if done and self.seconds["all"] else ""
        parts = [f"{self.added} new, {self.changed} changed, {self.unchanged} unchanged, {self.deleted} deleted{rate}"]
        if self.copied:
            parts.append(f"{self.copied} of them had content that the index knew: not encoded again")
        if self.broken:
            parts.append(f"{self.broken} pictures cannot be read and are left out")
        if self.duplicates:
            parts.append(f"{self.duplicates} are duplicates of another picture")
        return "\n".join([*parts, f"the index holds {self.rows} pictures"])


def prepare(store: Store, model: Model, name: str, config: IndexConfig) -> Manifest:
    """The manifest of ``store``, written where it has none; raises ``ManifestError`` where it was made with another
    model, ``MissingCapabilityError`` for a model without towers."""
    require(model.network, EncodesImages, "an index")
    require(model.network, EncodesTexts, "an index")
    if config.tokens:
        require(model.network, Matches, "keeping image tokens")
    opened = manifests.describe(model, name, config.thumbnail, config.tokens)
    kept = manifests.read(store)
    if kept is None:
        if rank() == 0:
            manifests.write(store, opened)
        return opened
    manifests.check(kept, opened, store.url)
    return kept


def index_records(
    store: Store,
    model: Model,
    records: Sequence[Record],
    source: str,
    manifest: Manifest,
    config: IndexConfig = IndexConfig(),
    errors: Errors | None = None,
) -> Summary:
    """Bring the rows of ``source`` up to date with ``records``; under ``torchrun`` the ranks share the work.

    errors: takes what cannot be read (default: a log, half of the pictures at most). Raises ``DataError`` for too many
    unreadable pictures and for keys that belong to another source, ``StoreError`` where the store refuses; everything
    committed before stays.
    """
    errors = Errors(share=0.5) if errors is None else errors
    with store.writing(config.wait) if rank() == 0 else nullcontext():
        _together()
        job = _Job(store, model, records, source, manifest, config, errors)
        began = time.perf_counter()
        job.run()
        _together()
        summary = _reported(job)
        if rank() == 0:
            summary.deleted = job.clean()
            if config.duplicates and (summary.added or summary.changed or summary.deleted):
                summary.duplicates = mark_duplicates(store)
            store.optimize()
        _together()
        summary.rows = store.count()
        summary.seconds["all"] = time.perf_counter() - began
    return summary


class _Job:
    """One rank's part of a run."""

    def __init__(
        self,
        store: Store,
        model: Model,
        records: Sequence[Record],
        source: str,
        manifest: Manifest,
        config: IndexConfig,
        errors: Errors,
    ) -> None:
        self.store, self.model, self.records, self.source = store, model, records, source
        self.manifest, self.config, self.errors = manifest, config, errors
        self.summary = Summary()
        self.transform = model.config.image.transform()
        self.known: dict[str, tuple[str, str]] = {}  # key: stamp, digest
        self.strangers: set[str] = set()  # keys of other sources
        self.digests: dict[str, str] = {}  # digest: key of a row that has it
        for block in store.scan(("stamp", "digest", "source")):
            for row in block:
                self.digests[row.digest] = row.key
                if row.source == source:
                    self.known[row.key] = (row.stamp, row.digest)
                else:
                    self.strangers.add(row.key)
        self.seen: set[str] = set()
        self.lost: set[str] = set()  # keys whose pictures cannot be read any more
        self.waiting: list[Row] = []

    def run(self) -> None:
        todo = self._plan()
        blocks = [todo[low : low + self.config.batch] for low in range(0, len(todo), self.config.batch)]
        quiet = not self.config.progress or rank() > 0
        with tqdm(total=len(todo), desc="pictures", unit="picture", disable=quiet, smoothing=0.1) as bar:
            done, skipped = 0, self.summary.unchanged
            for readings in self._read(blocks):
                self._take(readings)
                done += len(readings)
                self.errors.check(skipped + done, skipped + len(todo))
                bar.update(len(readings))
        self._commit()

    def clean(self) -> int:
        """Take out rows whose pictures are gone, or changed to something that cannot be read; how many."""
        gone = set() if self.config.keep_missing else set(self.known) - self.seen
        self.store.delete(sorted(gone | self.lost))
        return len(gone | self.lost)

    def _plan(self) -> list[tuple[int, str, str]]:
        """Number, key and stamp of the records of this rank that are new or may have changed."""
        todo = []
        for number in range(len(self.records)):
            record = self.records[number]
            key = self.config.prefix + record.key
            if key in self.strangers:
                raise DataError(
                    f"{self.source}: the index holds a picture {key!r} of another source; give the pictures of this "
                    "one names of their own: --prefix NAME/"
                )
            if key in self.seen:
                self.errors.add(
                    Problem(key, "duplicate key", f"{key}: this name was there before, the first one counts")
                )
                continue
            self.seen.add(key)
            if number % world_size() != rank():
                continue
            stamp = stamp_of(record.image)
            if stamp and key in self.known and self.known[key][0] == stamp:
                self.summary.unchanged += 1
            else:
                todo.append((number, key, stamp))
        return todo

    def _read(self, blocks: list[list[tuple[int, str, str]]]) -> Iterator[list[Reading | Problem]]:
        """The pictures of each block; the next two blocks are read while one is being used."""

        def read(number: int, key: str, stamp: str) -> Reading | Problem:
            return read_picture(
                self.records[number], key, self.source, stamp, self.transform, self.manifest.thumbnail, self.digests
            )

        with ThreadPoolExecutor(self.config.decoders) as pool:
            ahead: list[list[Future[Reading | Problem]]] = []
            for block in blocks:
                ahead.append([pool.submit(read, *item) for item in block])
                if len(ahead) > 2:
                    yield [one.result() for one in ahead.pop(0)]
            for waiting in ahead:
                yield [one.result() for one in waiting]

    def _take(self, readings: list[Reading | Problem]) -> None:
        fresh: list[Reading] = []
        known: list[Reading] = []
        for reading in readings:
            if isinstance(reading, Problem):
                self.errors.add(reading)
                self.summary.broken += 1
                if reading.key in self.known:
                    self.lost.add(reading.key)
                continue
            self.summary.seconds["read"] += reading.seconds
            key, digest = reading.row.key, reading.row.digest
            if key not in self.known:
                self.summary.added += 1
            elif self.known[key][1] == digest:
                self.summary.unchanged += 1
            else:
                self.summary.changed += 1
            (fresh if reading.pixels is not None else known).append(reading)
        self.waiting += self._encoded(fresh) + self._copied(known)
        if len(self.waiting) >= self.config.commit:
            self._commit()

    def _encoded(self, readings: list[Reading]) -> list[Row]:
        """Rows with their vectors and tokens."""
        if not readings:
            return []
        began = time.perf_counter()
        device, encode = self.model.device, image_encoder(self.model.network, "an index")
        images = stack([reading.pixels for reading in readings if reading.pixels is not None])
        half = self.config.precision == "bfloat16"
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            encoded = encode(images.to(device))
        vectors = encoded.features.float().cpu().half().numpy()
        tokens = [b""] * len(readings)
        if self.manifest.tokens and encoded.tokens is not None:
            tokens = pack(encoded.tokens, self.manifest.tokens)
        self.summary.seconds["encode"] += time.perf_counter() - began
        return [replace(r.row, vector=v, tokens=t) for r, v, t in zip(readings, vectors, tokens)]

    def _copied(self, readings: list[Reading]) -> list[Row]:
        """Rows of content that the index holds, under their own names."""
        if not readings:
            return []
        held = self.store.get({self.digests[r.row.digest] for r in readings}, COLUMNS, vectors=True)
        rows = []
        for reading in readings:
            old, new = held[self.digests[reading.row.digest]], reading.row
            row = replace(old, key=new.key, stamp=new.stamp, place=new.place, source=new.source)
            rows.append(replace(row, captions=new.captions, tags=new.tags, duplicate_of=""))
            self.summary.copied += new.key not in self.known or self.known[new.key][1] != new.digest
        return rows

    def _commit(self) -> None:
        began = time.perf_counter()
        self.store.upsert(self.waiting)
        self.waiting = []
        self.summary.seconds["write"] += time.perf_counter() - began


def _together() -> None:
    """Wait for the other ranks."""
    if world_size() > 1:
        dist.barrier()


def _reported(job: _Job) -> Summary:
    """The sums over the ranks; rank 0 learns what the others could not read, and which rows are lost for it."""
    if world_size() == 1:
        return job.summary
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, (job.summary, job.errors.named, job.lost))
    if rank() == 0:
        for _, problems, lost in everyone:
            job.errors.extend(problems)
            job.lost |= lost
    names = ("added", "changed", "unchanged", "copied", "broken")
    total = {name: sum(getattr(summary, name) for summary, _, _ in everyone) for name in names}
    return replace(job.summary, **total)
