"""Who wears what: quadruples of two pictures and two captions that differ by one swapped binding.

Scored after Winoground (Thrush et al. 2022): by the towers' dot product and, where the model has one, by its fusion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from imglish.data.pictures import Picture as PictureForm
from imglish.evaluation.encoding import DEFAULT_MACHINE, Encodes, Machine
from imglish.evaluation.metrics import binding_scores
from imglish.evaluation.pairs import score_pairs
from imglish.evaluation.rerank import ScoreRule

Picture = TypeVar("Picture")


@dataclass(frozen=True)
class Quadruple(Generic[Picture]):
    """Two pictures and the caption of each: ``captions[c]`` is true of ``pictures[c]`` and false of the other."""

    pictures: tuple[Picture, Picture]
    captions: tuple[str, str]


@dataclass(frozen=True)
class BindingResult:
    """Percent of right quadruples, under ``text``, ``image`` and ``group``; towers and fusion are None for a model
    without them.

    tower_scores, fusion_scores: ``(Q, 2, 2)``, picture by caption.
    """

    towers: dict[str, float] | None
    fusion: dict[str, float] | None
    tower_scores: Tensor | None
    fusion_scores: Tensor | None


def evaluate_binding(
    model: nn.Module,
    tokenizer: Encodes,
    quadruples: Sequence[Quadruple[Picture]],
    load: Callable[[Picture], PictureForm],
    machine: Machine = DEFAULT_MACHINE,
    rule: ScoreRule = "itm",
) -> BindingResult:
    """Score all four pairs of every quadruple; under ``torchrun`` the ranks share the work.

    load: a picture as ``(3, H, W)`` uint8 or normalised, patches or regions.
    """
    if not quadruples:
        raise ValueError("there are no quadruples to evaluate on")
    count = len(quadruples)
    pictures = [picture for quadruple in quadruples for picture in quadruple.pictures]
    captions = [caption for quadruple in quadruples for caption in quadruple.captions]
    image = torch.arange(2 * count).view(count, 2, 1).expand(-1, -1, 2)  # picture of (q, picture, caption)
    caption = torch.arange(2 * count).view(count, 1, 2).expand(-1, 2, -1)
    scored = score_pairs(model, tokenizer, pictures, captions, image, caption, load, machine, rule)
    return BindingResult(
        towers=binding_scores(scored.towers) if scored.towers is not None else None,
        fusion=binding_scores(scored.fusion) if scored.fusion is not None else None,
        tower_scores=scored.towers,
        fusion_scores=scored.fusion,
    )
