"""Columns: millions of texts and numbers without an object for each, in memory or mapped from one file."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAGIC = b"IMGLISH1"
ALIGN = 64
DTYPES = ("|u1", "<i4", "<i8")
CHUNK = 1 << 16  # texts that are copied at a time


@dataclass(frozen=True)
class Texts:
    """N texts: ``data`` uint8 with their UTF-8 bytes one behind the other, ``starts`` int64 ``(N + 1,)``."""

    data: np.ndarray
    starts: np.ndarray

    @staticmethod
    def of(texts: Iterable[str]) -> Texts:
        """Columns of these texts."""
        builder = TextsBuilder()
        for text in texts:
            builder.add(text)
        return builder.build()

    @staticmethod
    def cat(several: Iterable[Texts]) -> Texts:
        """Several columns one behind the other, copied."""
        parts = list(several)
        lengths = [np.diff(part.starts) for part in parts]
        return Texts(
            np.concatenate([part.data[int(part.starts[0]) : int(part.starts[-1])] for part in parts]),
            np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> str:
        data: bytes = self.data[int(self.starts[number]) : int(self.starts[number + 1])].tobytes()
        return data.decode("utf-8", "replace")

    def slice(self, start: int, stop: int) -> Texts:
        """Texts ``start`` to ``stop`` as a view."""
        return Texts(self.data, self.starts[start : stop + 1])

    def take(self, numbers: np.ndarray) -> Texts:
        """A copy of the texts with these numbers, in this order."""
        lengths = np.diff(self.starts)[numbers]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        data = np.empty(int(starts[-1]), dtype=np.uint8)
        for low in range(0, len(numbers), CHUNK):
            some = slice(low, min(low + CHUNK, len(numbers)))
            first, last = int(starts[some.start]), int(starts[some.stop])
            shift = np.repeat(self.starts[numbers[some]] - starts[some], lengths[some])
            data[first:last] = self.data[shift + np.arange(first, last)]
        return Texts(data, starts)


class TextsBuilder:
    """Collects texts. A text that UTF-8 cannot hold (a lone surrogate) raises ``UnicodeEncodeError``."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._starts = array("q", [0])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, text: str) -> None:
        """Append a text."""
        self._data += text.encode("utf-8")
        self._starts.append(len(self._data))

    def build(self) -> Texts:
        """The texts so far; the builder is not used after it."""
        return Texts(numbers(self._data, np.uint8), numbers(self._starts, np.int64))


def numbers(values: Any, dtype: Any) -> np.ndarray:
    """An array over the memory of an ``array`` or ``bytearray``."""
    return np.frombuffer(values, dtype=dtype) if len(values) else np.empty(0, dtype=dtype)


def runs(counts: np.ndarray) -> np.ndarray:
    """Starts of runs of these lengths, and the end: int64 ``(len(counts) + 1,)``."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


class ColumnsError(ValueError):
    """A file that does not hold columns, or not all of them."""


def write_columns(file: BinaryIO, columns: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Write named arrays and JSON ``meta`` so that :func:`map_columns` can map them without reading them."""
    places: dict[str, list[Any]] = {}
    end = 0
    for name, values in columns.items():
        end = -(-end // ALIGN) * ALIGN
        places[name] = [values.dtype.str, len(values), end]
        end += values.nbytes
    header = json.dumps({"meta": meta, "columns": places, "size": end}).encode()
    begin = -(-(len(MAGIC) + 8 + len(header)) // ALIGN) * ALIGN
    file.write((MAGIC + len(header).to_bytes(8, "little") + header).ljust(begin, b"\0"))
    written = 0
    for (_, _, at), values in zip(places.values(), columns.values()):
        file.write(bytes(at - written))
        file.write(np.ascontiguousarray(values).data.cast("B") if len(values) else b"")
        written = at + values.nbytes


def map_columns(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """``meta`` and the arrays, mapped read-only. Raises :class:`ColumnsError` for a file that is not whole."""
    try:
        with path.open("rb") as file:
            head = file.read(len(MAGIC) + 8)
            size = path.stat().st_size
            length = int.from_bytes(head[len(MAGIC) :], "little")
            if not head.startswith(MAGIC) or length > size:
                raise ColumnsError(f"{path} does not hold columns")
            header = json.loads(file.read(length))
        begin = -(-(len(head) + length) // ALIGN) * ALIGN
        if begin + header["size"] > size:
            raise ColumnsError(f"{path} is cut off")
        data = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, dtype=np.uint8)
        found = {}
        for name, (dtype, count, at) in header["columns"].items():
            if dtype not in DTYPES or not 0 <= at <= header["size"] or count < 0:
                raise ColumnsError(f"{path}: column {name} is not described well")
            end = at + count * np.dtype(dtype).itemsize
            if end > header["size"]:
                raise ColumnsError(f"{path}: column {name} is cut off")
            found[name] = np.asarray(data[begin + at : begin + end]).view(dtype)
        return header["meta"], found
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, ColumnsError):
            raise
        raise ColumnsError(f"{path} cannot be read: {error}") from error
