"""Positions of a trained model for pictures of another size and texts of another length, by the rule of each family.

Grids are resampled bicubically: with antialias where open_clip does (CLIP, CoCa), without where the ALBEF, BLIP, VLMo
and BEiT-3 code does; ViLT stretches its grid bilinearly with aligned corners; tables of relative positions are read on
a geometric progression (BEiT, VLMo). Positions of texts are resampled linearly where open_clip does; elsewhere the
first rows stay what they are, and rows that nobody has learned begin anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.nn.embed import resize_grid, resize_line
from imglish.nn.relative import resize_relative

Fit = Callable[[Tensor, Tensor, Any, Any], Tensor]
"""The learned table, the first values of the wanted one, and both models' configurations -> the learned table in the
shape of the wanted one."""


def _grid(antialias: bool) -> Fit:
    def fit(learned: Tensor, wanted: Tensor, _: Any, __: Any) -> Tensor:
        prefix = int(math.isqrt(len(wanted)) ** 2 != len(wanted))  # a class token in front
        side = math.isqrt(len(wanted) - prefix)
        return resize_grid(learned, (side, side), prefix, antialias)

    return fit


def _stretched(learned: Tensor, wanted: Tensor, _: Any, __: Any) -> Tensor:
    before, after = math.isqrt(len(learned) - 1), math.isqrt(len(wanted) - 1)
    picture = learned[1:].T.reshape(1, -1, before, before)
    picture = F.interpolate(picture, (after, after), mode="bilinear", align_corners=True)
    return torch.cat([learned[:1], picture[0].flatten(1).T])


def _relative(learned: Tensor, _: Tensor, before: Any, after: Any) -> Tensor:
    return resize_relative(learned, before.grid, after.grid)


def _line(learned: Tensor, wanted: Tensor, _: Any, __: Any) -> Tensor:
    return resize_line(learned, len(wanted))


def _rows(learned: Tensor, wanted: Tensor, _: Any, __: Any) -> Tensor:
    kept = min(len(learned), len(wanted))
    return torch.cat([learned[:kept], wanted[kept:]])


_OPEN_CLIP = {
    "vision.positions": _grid(antialias=True),
    "vision.pool.positions": _grid(antialias=True),
    "text.positions": _line,
    "text.embedding.positions.weight": _rows,
}
_BERT = {"vision.positions": _grid(antialias=False), "embedding.positions.weight": _rows}
RULES: dict[str, dict[str, Fit]] = {
    "clip": _OPEN_CLIP,
    "coca": _OPEN_CLIP,
    "albef": _BERT,
    "blip": _BERT,
    "vilt": {"pictures.positions": _stretched, "embedding.positions.weight": _rows},
    "vlmo": {"relative.table": _relative, "positions": _grid(antialias=False), "embedding.positions.weight": _rows},
    "beit": {"relative.table": _relative, "relative.*.table": _relative},
    "beit3": {"body.image_positions": _grid(antialias=False), "body.text_positions": _rows},
}
"""Family -> name of a table of positions (``*``: a number) -> its rule."""


def fitted(name: str, source: nn.Module, target: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """How the weights ``name`` of ``source`` reach the shape that they have in ``target``, a model of the same family;
    None where they fit as they are, or where a shape that differs is a mistake. Task models hold them deeper."""
    theirs, ours = source.get_parameter(name), target.get_parameter(name)
    family: Any = target.family
    rule = next((rule for place, rule in RULES.get(family, {}).items() if fnmatchcase(f".{name}", f"*.{place}")), None)
    if rule is None or theirs.shape == ours.shape or theirs.shape[1:] != ours.shape[1:]:
        return None
    return lambda learned: rule(learned, ours.detach(), source.config, target.config)


def with_sizes(config: Any, image_size: int | None = None, max_length: int | None = None) -> Any:
    """``config`` for pictures of ``image_size`` pixels and texts of ``max_length`` tokens (None: as they are).

    Raises ``ValueError`` where the model cannot have that.
    """
    if image_size is not None:
        image = config.image
        if not hasattr(image, "size"):
            raise ValueError(f"this {config.family} reads the regions of a detector, which have no size")
        changes: dict[str, Any] = {"size": image_size}
        if hasattr(image, "longest"):
            changes["longest"] = image_size * image.longest // image.size
        config = with_image(config, replace(image, **changes))
    if max_length is not None:
        if not hasattr(config, "max_length"):
            raise ValueError(f"a {config.family} reads no texts")
        config = replace(config, max_length=max_length)
    return config


def with_image(config: Any, image: Any) -> Any:
    """``config`` with another picture input, which lies in the vision tower where there is one."""
    vision = getattr(config, "vision", None)
    return replace(config, vision=replace(vision, image=image)) if vision is not None else replace(config, image=image)
