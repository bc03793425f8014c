"""What there is: configurations with their capabilities and sizes, and the public checkpoints that can be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from imglish.checkpoints.drawing import undrawn
from imglish.models import registry
from imglish.models.capabilities import Captions, EncodesImages, EncodesTexts, FillsMasks, Matches

CAPABILITIES: dict[str, tuple[type, ...]] = {
    "towers": (EncodesImages, EncodesTexts),
    "match": (Matches,),
    "caption": (Captions,),
    "fill masks": (FillsMasks,),
}
"""What a model can do, in a word, and the protocols that it then has."""


@dataclass(frozen=True)
class Architecture:
    """A named configuration: parameters: how many; image: side in pixels; can: names of :data:`CAPABILITIES`."""

    name: str
    family: str
    parameters: int
    image: int
    can: tuple[str, ...]


@dataclass(frozen=True)
class PublicCheckpoint:
    """A line of ``known.yaml``. kind: of :data:`imglish.checkpoints.foreign.FORMATS`; score: as its authors report."""

    where: str
    family: str
    kind: str
    image: int
    licence: str
    score: str
    for_: str


def architectures() -> Iterator[Architecture]:
    """All named configurations; nothing is allocated for them."""
    for name in registry.names():
        config: Any = registry.named(name)
        with undrawn():
            model = config.build()
        can = tuple(word for word, protocols in CAPABILITIES.items() if all(isinstance(model, p) for p in protocols))
        size = getattr(config.image, "size", 0)
        yield Architecture(name, config.family, sum(p.numel() for p in model.parameters()), size, can)


def public_checkpoints() -> list[PublicCheckpoint]:
    """The table of public checkpoints, ``known.yaml``."""
    rows = yaml.safe_load(files(__package__).joinpath("known.yaml").read_text(encoding="utf-8"))
    return [
        PublicCheckpoint(**{("for_" if key == "for" else key): value for key, value in row.items()}) for row in rows
    ]
