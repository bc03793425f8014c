"""Weights from one stage of training to the next: a checked map of names from one of our models to another.

The names of both sides are accounted for: what the next stage does not need is dropped, what is new in it keeps its
first values, and both are named; anything else that does not fit is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from imglish.checkpoints import beit, vlmo
from imglish.checkpoints.resizing import fitted
from imglish.checkpoints.rules import ConversionError, Converted, Drop, Fresh, Rule, Table, Transform

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


def resized(source: nn.Module, target: nn.Module) -> Converted:
    """The state dict of ``source`` for ``target``, the same model for pictures or texts of another size; the report
    names what was fitted. Raises :class:`ConversionError` for any other difference."""
    return _same_family(source, target, ())


def _same_family(source: nn.Module, target: nn.Module, own: tuple[str, ...]) -> Converted:
    """Name by name; positions are fitted to another size of pictures or length of texts."""
    theirs, ours = source.state_dict(), target.state_dict()
    rules: list[Rule | Drop | Fresh] = []
    report = {}
    for name in theirs:
        if name not in ours:
            continue
        fit = None if theirs[name].shape == ours[name].shape else fitted(name, source, target)
        rules.append(Rule(name, name, None if fit is None else Transform(fit, _not_back)))
        if fit is not None:
            report[name] = f"fitted from {tuple(theirs[name].shape)} to {tuple(ours[name].shape)}"
    rules += [Drop(n, "not part of the next stage") for n in theirs if n not in ours and _is_own(n, own)]
    rules += [Fresh(n, "new in this stage") for n in ours if n not in theirs and _is_own(n, own)]
    converted = Table(*rules).convert(theirs, ours)
    return Converted(converted.state, converted.report | report)


def _is_own(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _not_back(value: Any) -> Any:
    raise NotImplementedError("stages go one way")


def _beit_to_vlmo(source: nn.Module, target: nn.Module) -> Converted:
    """Attention and V experts (VLMo, section 3.3), by way of the official names."""
    config: Any = target.config
    return vlmo.from_beit(beit.table().revert(source.state_dict()), target.state_dict(), config)


_BETWEEN: dict[tuple[str, str], Callable[[nn.Module, nn.Module], Converted]] = {("beit", "vlmo"): _beit_to_vlmo}
