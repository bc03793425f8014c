"""Drawn scenes as a source: records without files, any number of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml

from imglish.data.errors import DataError, Errors
from imglish.data.records import Record
from imglish.data.scene_noise import CaptionNoise
from imglish.data.scenes import SceneConfig, SceneSource
from imglish.data.sources.base import Source
from imglish.data.sources.config import SourceConfig

SCHEME = "scenes:"


class TrainingScenes(Source):
    """The training records of drawn scenes, each made when it is asked for: any number of them takes no memory."""

    def __init__(self, config: SceneConfig, errors: Errors | None = None) -> None:
        self.scenes = SceneSource(config)
        self.errors = errors if errors is not None else Errors()

    def __len__(self) -> int:
        return self.scenes.config.scenes

    def record(self, number: int) -> Record:
        return self.scenes.training_record(number)

    def caption_counts(self) -> np.ndarray:
        config = self.scenes.config
        return np.full(len(self), config.captions * len(config.languages), dtype=np.int64)

    def digest(self) -> str:
        return hashlib.blake2b(repr(self.scenes.config).encode(), digest_size=16).hexdigest()


class ListedRecords(Source):
    """Records that are there already."""

    def __init__(self, records: Sequence[Record], errors: Errors) -> None:
        self.records, self.errors = records, errors

    def __len__(self) -> int:
        return len(self.records)

    def record(self, number: int) -> Record:
        return self.records[number]

    def caption_counts(self) -> np.ndarray:
        return np.array([len(record.captions) for record in self.records], dtype=np.int64)


def open_scenes(config: SourceConfig, errors: Errors) -> Source:
    """``scenes:`` with settings of :class:`SceneConfig` in YAML: ``scenes:{scenes: 50000, size: 96, people: [1, 3]}``.

    The splits are ``train`` (the default), ``seen`` and ``heldout``; ``language`` is ``en`` or ``zh``.
    """
    scenes = scene_config(config.path)
    if config.language is not None:
        scenes = _made(config.path, {"languages": (config.language,)}, scenes)
    if config.split in (None, "train"):
        return TrainingScenes(scenes, errors)
    if config.split not in ("seen", "heldout"):
        raise DataError(f'{config.path}: there is no split "{config.split}" (there are: train, seen, heldout)')
    try:
        split: Any = config.split
        return ListedRecords(SceneSource(scenes).evaluation(split).records, errors)
    except ValueError as error:
        raise DataError(f"{config.path}: {error}") from error


def scene_config(path: str) -> SceneConfig:
    """The settings behind ``scenes:``. Raises :class:`DataError`."""
    try:
        settings = yaml.safe_load(path.removeprefix(SCHEME)) or {}
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML behind {SCHEME}: {error}") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path}: expected settings, such as {SCHEME}{{scenes: 50000, size: 96}}")
    return _made(path, settings, SceneConfig())


def _made(path: str, settings: dict[Any, Any], base: SceneConfig) -> SceneConfig:
    known = {field.name for field in dataclasses.fields(SceneConfig)}
    if unknown := set(settings) - known:
        raise DataError(f"{path}: no such settings: {', '.join(map(str, unknown))}; known: {', '.join(sorted(known))}")
    values = {name: _tuples(value) for name, value in settings.items()}
    try:
        if isinstance(values.get("noise"), dict):
            values["noise"] = CaptionNoise(**values["noise"])
        return dataclasses.replace(base, **values)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
