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
from imglish.evaluation.encoding import DEFAULT_MACHINE, Encodes, Machine, encode_captions, encode_pictures
from imglish.evaluation.metrics import binding_scores
from imglish.evaluation.rerank import PairList, ScoreRule, match_pairs, pair_scores
from imglish.models.capabilities import Matches, has_towers

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
    fuses = isinstance(model, Matches)
    training = model.training
    model.eval()
    try:
        with machine.store() as store:
            features = encode_pictures(model, pictures, load, machine, store if fuses else None)
            texts = encode_captions(model, captions, tokenizer, machine, keep_rows=fuses)
            image = torch.arange(2 * count).view(count, 2, 1).expand(-1, -1, 2)  # picture of (q, picture, caption)
            caption = torch.arange(2 * count).view(count, 1, 2).expand(-1, 2, -1)
            towers = torch.einsum("qie,qce->qic", features.view(count, 2, -1), texts.features.view(count, 2, -1)).cpu()
            fusion = None
            if fuses:
                pairs = PairList.named(image.flatten(), caption.flatten(), 2 * count)
                logits = match_pairs(model, store, texts, pairs, 2 * count, machine)
                place = pairs.find(image, caption).flatten()
                fusion = pair_scores(logits[place], towers.flatten(), rule).view(count, 2, 2)
    finally:
        model.train(training)
    aligned = has_towers(model)
    return BindingResult(
        towers=binding_scores(towers) if aligned else None,
        fusion=binding_scores(fusion) if fusion is not None else None,
        tower_scores=towers if aligned else None,
        fusion_scores=fusion,
    )
