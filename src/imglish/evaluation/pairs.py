"""Scores of chosen pairs of pictures and captions: by the towers and, where the model has one, by its fusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from imglish.data.pictures import Picture as PictureForm
from imglish.evaluation.encoding import DEFAULT_MACHINE, Encodes, Machine, encode_captions, encode_pictures
from imglish.evaluation.rerank import PairList, ScoreRule, match_pairs, pair_scores
from imglish.models.capabilities import Matches, has_towers

Picture = TypeVar("Picture")


@dataclass(frozen=True)
class ScoredPairs:
    """towers, fusion: float32 on the host, of the shape that was asked for; None for a model without them."""

    towers: Tensor | None
    fusion: Tensor | None


def score_pairs(
    model: nn.Module,
    tokenizer: Encodes,
    pictures: Sequence[Picture],
    captions: Sequence[str],
    image: Tensor,
    caption: Tensor,
    load: Callable[[Picture], PictureForm],
    machine: Machine = DEFAULT_MACHINE,
    rule: ScoreRule = "itm",
) -> ScoredPairs:
    """Score ``pictures[image]`` with ``captions[caption]``, two int64 tensors of one shape.

    Each picture and caption passes its tower once and each pair the fusion once; under ``torchrun`` the ranks share the
    work. load: a picture as ``(3, H, W)`` uint8 or normalised, patches or regions.
    """
    fuses = isinstance(model, Matches)
    training = model.training
    model.eval()
    try:
        with machine.store() as store:
            features = encode_pictures(model, pictures, load, machine, store if fuses else None)
            texts = encode_captions(model, captions, tokenizer, machine, keep_rows=fuses)
            device = features.device
            towers = (features[image.to(device)] * texts.features[caption.to(device)]).sum(-1).cpu()
            fusion = None
            if fuses:
                pairs = PairList.named(image.flatten(), caption.flatten(), len(captions))
                logits = match_pairs(model, store, texts, pairs, len(pictures), machine)
                place = pairs.find(image, caption).flatten()
                fusion = pair_scores(logits[place], towers.flatten(), rule).view(image.shape)
    finally:
        model.train(training)
    return ScoredPairs(towers if has_towers(model) else None, fusion)
