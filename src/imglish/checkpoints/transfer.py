"""Weights from one stage of training to the next: a checked map of names from one of our models to another.

The names of both sides are accounted for: what the next stage does not need is dropped, what is new in it keeps its
first values, and both are named; anything else that does not fit is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from imglish.checkpoints import beit, vlmo
from imglish.checkpoints.rules import ConversionError, Converted, Drop, Fresh, Rule, Table, Transform
from imglish.nn.embed import resize_grid
from imglish.nn.relative import resize_relative

OWN_OF_A_STAGE = {
    "vlmo": (
        "blocks.*.ffn.fused.*",
        "pooler.*",
        "itm_head.*",
        "mlm_head.*",
        "mlm_words.*",
        "image_proj*",
        "text_proj*",
        "logit_scale*",
    ),
    "beit3": ("mlm_head.*", "mim_head.*", "image_proj.*", "text_proj.*", "logit_scale", "itm_head.*"),
}
"""Families whose stages differ in their parts: names that only one of two stages may have."""


def transfer(source: nn.Module, target: nn.Module) -> Converted:
    """The state dict with which ``target`` begins, from the trained ``source``; both are models of ours.

    Raises :class:`ConversionError` for families between which no map is known, and for what finds no place.
    """
    before, after = (str(model.family) for model in (source, target))
    if (make := _BETWEEN.get((before, after))) is not None:
        return make(source, target)
    if before != after:
        known = ", ".join(f"{a} to {b}" for a, b in sorted(_BETWEEN))
        raise ConversionError(f"a {after} cannot begin with a {before}; known: {known}, and stages of one family")
    return _same_family(source, target, OWN_OF_A_STAGE.get(after, ()))


def _same_family(source: nn.Module, target: nn.Module, own: tuple[str, ...]) -> Converted:
    """Name by name; positions are fitted to another size of pictures or length of texts."""
    theirs, ours = source.state_dict(), target.state_dict()
    rules: list[Rule | Drop | Fresh] = [
        Rule(name, name, _fitted(name, source, target)) for name in theirs if name in ours
    ]
    rules += [Drop(n, "not part of the next stage") for n in theirs if n not in ours and _is_own(n, own)]
    rules += [Fresh(n, "new in this stage") for n in ours if n not in theirs and _is_own(n, own)]
    return Table(*rules).convert(theirs, ours)


def _is_own(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _fitted(name: str, source: nn.Module, target: nn.Module) -> Transform | None:
    """How the positions called ``name`` reach the size that the target has; None for all other weights."""
    before: Any = source.config
    after: Any = target.config
    if name == "relative.table":
        return Transform(lambda x: resize_relative(x, before.grid, after.grid), _not_back)
    if name in ("positions", "body.image_positions"):
        return Transform(lambda x: resize_grid(x, (after.grid, after.grid)), _not_back)
    if name == "vision.positions":
        vision = after.vision
        side, prefix = vision.image.size // vision.patch, int(vision.class_token)
        return Transform(lambda x: resize_grid(x, (side, side), prefix, antialias=side < math.isqrt(len(x))), _not_back)
    if name in ("embedding.positions.weight", "body.text_positions"):
        return Transform(lambda x: x[: after.max_length], _not_back)
    return None


def _not_back(value: Any) -> Any:
    raise NotImplementedError("stages go one way")


def _beit_to_vlmo(source: nn.Module, target: nn.Module) -> Converted:
    """Attention and V experts (VLMo, section 3.3), by way of the official names."""
    config: Any = target.config
    return vlmo.from_beit(beit.table().revert(source.state_dict()), target.state_dict(), config)


_BETWEEN: dict[tuple[str, str], Callable[[nn.Module, nn.Module], Converted]] = {("beit", "vlmo"): _beit_to_vlmo}
