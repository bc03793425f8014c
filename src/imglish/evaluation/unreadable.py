"""Pictures that cannot be read while an evaluation runs: left out with their captions, counted and named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from PIL import Image

from imglish.data.errors import DataError, Errors, Problem
from imglish.data.images import ImageError
from imglish.data.pictures import Picture
from imglish.data.records import Record
from imglish.objectives.gather import world_size


class UnreadablePictures(Exception):  # noqa: N818  a signal between two functions, never seen outside
    """Raised on all ranks alike; ``lost``: why, by ``image_id``."""

    def __init__(self, lost: Mapping[int, Problem]) -> None:
        super().__init__(f"{len(lost)} pictures cannot be read")
        self.lost = dict(lost)


class Tolerant:
    """A loader that goes on with a grey picture, so that all ranks reach the point where they can speak of it."""

    def __init__(self, load: Callable[[Record], Picture]) -> None:
        self.load = load
        self.lost: dict[int, Problem] = {}

    def __call__(self, record: Record) -> Picture:
        try:
            return self.load(record)
        except ImageError as error:
            self.lost[record.image_id] = Problem(record.key, error.reason, str(error))
            return self.load(replace(record, image=_grey))

    def check(self) -> None:
        """Raise :class:`UnreadablePictures` where any rank has met some since the last time."""
        lost, self.lost = self.lost, {}
        if world_size() > 1:
            everyone: list[Any] = [None] * world_size()
            dist.all_gather_object(everyone, lost)
            lost = {number: problem for part in everyone for number, problem in part.items()}
        if lost:
            raise UnreadablePictures(lost)


def _grey() -> Image.Image:
    return Image.new("RGB", (64, 64), (128, 128, 128))


def without(records: Sequence[Record], lost: Mapping[int, Problem], errors: Errors) -> list[Record]:
    """The records whose pictures are not ``lost``. Raises :class:`ImageError` when too many are, or all."""
    errors.extend(lost.values())
    pictures = len({record.image_id for record in records})
    try:
        errors.check(pictures, pictures)
    except DataError as error:
        raise ImageError(str(error)) from error
    kept = [record for record in records if record.image_id not in lost]
    if not kept:
        raise ImageError(f"no picture can be read ({errors.summary()})")
    return kept
