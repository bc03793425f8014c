"""Pictures as regions: boxes with the features that an object detector gave them (UNITER, ViLBERT, Oscar), from a file.

A region file is one safetensors file of all pictures: ``features (R, F)`` and ``boxes (R, 4)`` (left, upper, right,
lower in parts of the picture, 0..1), row behind row, ``offsets (I + 1,)`` int64 the rows of picture i, and in its
metadata ``keys``, a JSON list of the names by which records call the pictures. :func:`write_regions` makes one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imglish.data.images import ImageError
from imglish.data.records import Record
from imglish.nn.segments import Segments


@dataclass(frozen=True)
class Regions:
    """One picture: features ``(n, F)`` floating, boxes ``(n, 4)`` float32 in 0..1."""

    features: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class RegionBatch:
    """B pictures, region behind region: features ``(R, F)``, boxes ``(R, 4)``."""

    features: Tensor
    boxes: Tensor
    segments: Segments

    @staticmethod
    def of(pictures: Sequence[Regions]) -> RegionBatch:
        return RegionBatch(
            torch.cat([p.features for p in pictures]),
            torch.cat([p.boxes for p in pictures]),
            Segments.of(len(p.boxes) for p in pictures),
        )

    def __len__(self) -> int:
        return self.segments.count

    def __getitem__(self, some: slice) -> RegionBatch:
        """Consecutive pictures, as a view."""
        first, last, _ = some.indices(len(self))
        rows = slice(int(self.segments.bounds[first]), int(self.segments.bounds[max(first, last)]))
        return RegionBatch(self.features[rows], self.boxes[rows], Segments(self.segments.lengths[some]))

    def map(self, move: Callable[[Tensor], Tensor]) -> RegionBatch:
        return RegionBatch(move(self.features), move(self.boxes), self.segments)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RegionBatch:
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))


class RegionFileError(ValueError):
    """A region file that cannot be used; the message begins with its path."""


class RegionFile:
    """The regions of many pictures by key; rows are read when they are asked for. Picklable, for loader workers."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._open()
            keys = json.loads((self._file.metadata() or {})["keys"])
            shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in ("features", "boxes", "offsets")}
        except FileNotFoundError as error:
            raise RegionFileError(f"{path}: does not exist") from error
        except (SafetensorError, KeyError, ValueError) as error:
            raise RegionFileError(f"{path}: not a region file (see docs/models.md): {error}") from error
        bounds = self._file.get_tensor("offsets").tolist()
        total = shapes["features"][0]
        if len(shapes["features"]) != 2 or shapes["boxes"] != (total, 4) or len(bounds) != len(keys) + 1:
            raise RegionFileError(f"{path}: {len(keys)} keys do not fit tensors of shapes {shapes}")
        if bounds[0] != 0 or bounds[-1] != total or bounds != sorted(bounds):
            raise RegionFileError(f"{path}: offsets must rise from 0 to {total}")
        self.width: int = shapes["features"][1]
        self._rows = {key: (bounds[i], bounds[i + 1]) for i, key in enumerate(keys)}

    def _open(self) -> None:
        self._file: Any = safe_open(self.path, framework="pt")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: str) -> Regions:
        """The regions of a picture; raises :class:`ImageError` where the file has none for it."""
        first, last = self._rows.get(key, (0, 0))
        if first == last:
            raise ImageError(f"{key}: no regions in {self.path}")
        features, boxes = (self._file.get_slice(name)[first:last] for name in ("features", "boxes"))
        return Regions(features, boxes.float())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def region_loader(file: RegionFile) -> Callable[[Record], Regions]:
    """A function that gives a record's regions, for evaluation."""
    return lambda record: file[record.key]


def write_regions(path: str | Path, pictures: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """A region file of (key, features ``(n, F)``, boxes ``(n, 4)`` in 0..1) of each picture; features keep their dtype.

    Raises ``ValueError`` for boxes outside 0..1 or of other number than the features.
    """
    keys, features, boxes = [], [], []
    for key, values, places in pictures:
        if places.shape != (len(values), 4) or places.min(initial=0) < 0 or places.max(initial=0) > 1:
            raise ValueError(f"{key}: boxes of shape {places.shape} in 0..1 are needed for {len(values)} features")
        keys.append(key)
        features.append(torch.from_numpy(values))
        boxes.append(torch.from_numpy(places).float())
    counts = torch.tensor([0, *(len(b) for b in boxes)], dtype=torch.int64)
    tensors = {"features": torch.cat(features), "boxes": torch.cat(boxes), "offsets": counts.cumsum(0)}
    save_file(tensors, path, metadata={"keys": json.dumps(keys)})
