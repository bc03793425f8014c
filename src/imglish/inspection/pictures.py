"""What is found out about each picture by reading it once: size, format, digest, perceptual hash, or what is wrong."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from imglish.data.errors import Problem
from imglish.data.images import FORMATS, ImageError, decode_sized
from imglish.data.records import ImageSource, Record

HASHED_AT = 64  # side that pictures are reduced to, at least, before the perceptual hash
CHUNK = 64  # pictures that a process is given at a time
HAS_HASH = find_spec("imagehash") is not None

_records: Sequence[Record] = ()  # of this worker process


@dataclass(frozen=True)
class Look:
    """One picture. digest: of its bytes, 64 bits of SHA-256; hash: 64 bits that are alike for pictures that look alike,
    None without the library; size: of the file in bytes, 0 where the picture is drawn and not stored."""

    width: int
    height: int
    form: str
    size: int
    digest: int
    hash: int | None


@dataclass
class Pictures:
    """Many pictures, column by column; ``numbers`` are those of the records that could be read."""

    numbers: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    sizes: np.ndarray
    forms: list[str]
    digests: np.ndarray
    hashes: np.ndarray
    problems: list[Problem] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.numbers)


def look_at(record: Record) -> Look | Problem:
    """Read one picture; what is wrong with it where that fails."""
    try:
        data = _content(record.image, record.key)
        picture, (width, height) = decode_sized(data, HASHED_AT, name=record.key)
    except ImageError as error:
        return Problem(record.key, error.reason, str(error))
    if not isinstance(data, bytes):
        pixels = np.asarray(picture)
        digest = _digest(repr(pixels.shape).encode() + pixels.tobytes())
        return Look(width, height, "drawn", 0, digest, _perceptual(picture))
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        form = str(opened.format)
    return Look(width, height, form, len(data), _digest(data), _perceptual(picture))


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _content(source: ImageSource | None, name: str) -> bytes | Image.Image | None:
    """The bytes of a picture, or the picture where it has none."""
    try:
        if isinstance(source, Path):
            return source.read_bytes()
        return source() if callable(source) else source
    except FileNotFoundError as error:
        raise ImageError(f"{name}: the picture does not exist", "missing") from error
    except OSError as error:
        raise ImageError(f"{name}: cannot be read: {error}", "not readable") from error


def _perceptual(picture: Image.Image) -> int | None:
    """pHash: the signs of the lowest frequencies (Zauner 2010), 64 bits."""
    if not HAS_HASH:
        return None
    import imagehash

    bits = np.packbits(imagehash.phash(picture).hash.ravel())
    return int.from_bytes(bits.tobytes(), "big")


def look_at_all(
    records: Sequence[Record],
    numbers: np.ndarray,
    workers: int | None = None,
    progress: Callable[[Iterable[Look | Problem]], Iterable[Look | Problem]] = iter,
) -> Pictures:
    """Read the pictures ``numbers`` of the records. workers: processes (None: one a core); progress: wraps looks."""
    workers = min(workers if workers is not None else cores(), max(1, len(numbers) // CHUNK))
    looks = progress(
        _in_processes(records, numbers, workers) if workers > 1 else map(look_at, _chosen(records, numbers))
    )
    found: list[tuple[int, Look]] = []
    problems: list[Problem] = []
    for number, look in zip(numbers.tolist(), looks, strict=True):
        if isinstance(look, Problem):
            problems.append(look)
        else:
            found.append((number, look))
    columns = [look for _, look in found]
    hashes = [look.hash or 0 for look in columns] if HAS_HASH else []
    return Pictures(
        np.array([number for number, _ in found], dtype=np.int64),
        np.array([look.width for look in columns], dtype=np.int64),
        np.array([look.height for look in columns], dtype=np.int64),
        np.array([look.size for look in columns], dtype=np.int64),
        [look.form for look in columns],
        np.array([look.digest for look in columns], dtype=np.uint64),
        np.array(hashes, dtype=np.uint64),
        problems,
    )


def cores() -> int:
    """Of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chosen(records: Sequence[Record], numbers: np.ndarray) -> Iterator[Record]:
    return (records[int(number)] for number in numbers)


def _in_processes(records: Sequence[Record], numbers: np.ndarray, workers: int) -> Iterator[Look | Problem]:
    parts = [part.tolist() for part in np.array_split(numbers, max(1, len(numbers) // CHUNK))]
    with ProcessPoolExecutor(workers, initializer=partial(_begin, records)) as pool:
        for looks in pool.map(_look_at_part, parts):
            yield from looks


def _begin(records: Sequence[Record]) -> None:
    global _records
    _records = records


def _look_at_part(numbers: list[int]) -> list[Look | Problem]:
    return [look_at(_records[number]) for number in numbers]
