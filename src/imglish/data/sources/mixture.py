"""Several sources as one, with weights. What an epoch shows of each is defined by :mod:`imglish.data.epochs`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import yaml

from imglish.data.errors import DataError, Errors
from imglish.data.records import Record
from imglish.data.sources.base import Part, Source
from imglish.data.sources.columns import runs
from imglish.data.sources.config import SourceConfig, from_mapping
from imglish.data.sources.files import is_remote, join, opened, parent

MAX_TEXT = 2**20  # bytes of a mixture's file
MAX_DEPTH = 20
Opener = Callable[[SourceConfig, Errors], Source]


class Mixture(Source):
    """The records of ``sources`` one behind the other; pictures of different sources are different pictures.

    weights: how often an epoch of training shows each record of a source. Evaluation takes every record once. names: of
    the sources, for messages.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], errors: Errors, names: Sequence[str] = ()
    ) -> None:
        if not sources or len(sources) != len(weights):
            raise DataError(f"a mixture of {len(sources)} sources with {len(weights)} weights")
        self.sources, self.weights, self.errors, self.names = tuple(sources), tuple(weights), errors, tuple(names)
        self._starts = runs(np.array([len(source) for source in sources]))
        # A source may use any numbers for its pictures, so each gets a range of its own.
        self._ids = runs(np.array([_beyond(source) for source in sources]))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record(self, number: int) -> Record:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        record = self.sources[part].record(number - int(self._starts[part]))
        return replace(record, image_id=record.image_id + int(self._ids[part]))

    def caption_counts(self) -> np.ndarray:
        return np.concatenate([source.caption_counts() for source in self.sources])

    def parts(self) -> tuple[Part, ...]:
        limits = zip(self._starts[:-1].tolist(), self._starts[1:].tolist(), self.weights)
        return tuple(Part(start, stop, weight) for start, stop, weight in limits)

    def digest(self) -> str:
        found = hashlib.blake2b(digest_size=16)
        found.update(repr([(s.digest(), w) for s, w in zip(self.sources, self.weights)]).encode())
        return found.hexdigest()


def _beyond(source: Source) -> int:
    """A number above all ``image_id`` of the source: they number its records."""
    return len(source)


def open_mixture(config: SourceConfig, errors: Errors, opener: Opener) -> Mixture:
    """A YAML file: ``sources:``, a list of settings of :class:`SourceConfig`, each with a ``path`` and a ``weight``.

    Paths are relative to the file. ``needs`` of the mixture holds for all of its sources.
    """
    sources, weights, names = [], [], []
    for number, entry in enumerate(_entries(config.path)):
        inner = from_mapping(entry, f"{config.path}: source {number + 1}")
        changes: dict[str, Any] = {
            name: _beside(config.path, value)
            for name in ("path", "images", "index")
            if (value := getattr(inner, name)) is not None
        }
        inner = replace(inner, needs=config.needs, index=changes.pop("index", config.index), **changes)
        if not 0 < inner.weight < float("inf"):
            raise DataError(f"{config.path}: source {number + 1} has weight {inner.weight}: expected a number above 0")
        sources.append(opener(inner, Errors(inner.max_errors, errors.file, errors.what)))
        errors.extend(sources[-1].errors.named)
        weights.append(inner.weight)
        names.append(f"{entry['path']}, {inner.split}" if inner.split else str(entry["path"]))
    return Mixture(sources, weights, errors, names)


def _entries(path: str) -> list[dict[str, Any]]:
    try:
        with opened(path) as file:
            text = file.read(MAX_TEXT).decode("utf-8-sig")
        if _depth(text) > MAX_DEPTH:  # the parser takes time with the square of it
            raise DataError(f"{path}: not YAML of a mixture: nested {_depth(text)} times")
        data = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not YAML: {error}") from error
    entries = data.get("sources") if isinstance(data, dict) and set(data) == {"sources"} else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: a mixture is a YAML file with one key, sources: a list of (path, weight, ...)")
    return entries


def _depth(text: str) -> int:
    """How deep the brackets are nested, at most."""
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _beside(file: str, path: str) -> str:
    return path if is_remote(path) or path.startswith("/") else join(parent(file), path)
