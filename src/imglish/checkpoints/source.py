"""What lies on the disk, and what a kind of checkpoint is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from imglish.checkpoints.rules import Converted
from imglish.models.heads import HeadConfig

Layout = Literal["file", "transformers", "open_clip"]


@dataclass(frozen=True)
class Source:
    """What lies on the disk. settings: the JSON beside the weights, None for a file alone; classes: names of a task's
    answers in the order of the head, where they are known; beside: what else the record of a training holds."""

    path: Path
    layout: Layout
    weights: Mapping[str, Tensor]
    settings: Mapping[str, Any] | None = None
    classes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def has(self, pattern: str) -> bool:
        """Whether any name of the weights begins like ``pattern``."""
        return any(re.match(pattern, name) for name in self.weights)


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint.

    marks: patterns, for each of which the weights have a name, and never: one that they have no name for; config: ours,
    from sizes or settings; convert: weights, names and shapes of our model (or of what a task model has within), its
    configuration -> ours; head: of a task model; closing: its texts end with [SEP]; special: tokens that the family
    adds to its tokenizer; score_rule: how its authors rank pairs; model_type: in the settings of transformers, where
    other models have the same names; end: number of the token that ends a text, by the settings; clean:
    what is done to a text before it is cut into tokens, by the settings.
    """

    title: str
    layout: Layout
    marks: tuple[str, ...]
    config: Callable[[Source], Any]
    convert: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Any], Converted]
    score_rule: str
    closing: bool = True
    special: tuple[str, ...] = ()
    never: str | None = None
    head: Callable[[Source], HeadConfig] | None = None
    model_type: str | None = None
    end: Callable[[Source], int | None] | None = None
    clean: Callable[[Source], str | None] | None = None

    def lacks(self, source: Source) -> list[str]:
        """What keeps the source from being of this kind, in words."""
        lacking = [f"no name like {_shown(mark)}" for mark in self.marks if not source.has(mark)]
        said = (source.settings or {}).get("model_type", self.model_type)
        if self.model_type is not None and said != self.model_type:
            lacking.append(f"model_type {said!r}, not {self.model_type!r}")
        return lacking + ([f"a name like {_shown(self.never)}"] if self.never and source.has(self.never) else [])


def _shown(pattern: str) -> str:
    return pattern.replace("\\", "").removesuffix("$")
