"""Where in a picture a model finds the words of a text: heat maps over its patches.

- A fusion with cross-attention (ALBEF, BLIP): Grad-CAM (Selvaraju et al. 2017) of the matching score on the
  cross-attention of one layer, as ALBEF does for visual grounding (Li et al. 2021, section 5): attention times what is
  positive of its gradient. It says what raised the score.
- One Transformer over the pair (ViLT, VLMo, BEiT-3): attention rollout (Abnar and Zuidema 2020), from the word's row
  to the patches. It says where attention came from, and nothing of whether that raised or lowered the score.
- Towers alone (CLIP): Grad-CAM of the cosine on the class token's row of the last layer of the picture's tower. A tower
  sees the text as one vector, so there is one map for all of it and none for a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from imglish.data.batch import TextBatch
from imglish.data.patches import PatchBatch
from imglish.data.pictures import Picture, Pictures, stack
from imglish.data.regions import RegionBatch
from imglish.evaluation.encoding import Encodes, device_of
from imglish.evaluation.watching import watch_looks, watch_pairs, watch_self
from imglish.models.capabilities import (
    EncodesImages,
    Matches,
    MissingCapabilityError,
    has_towers,
    image_encoder,
    text_encoder,
)
from imglish.nn.attention import CrossAttention

Method = Literal["grad-cam", "rollout", "grad-cam of towers"]
JOB = "an explanation"
NO_CLASS_TOKEN = "{} cannot be explained: in the tower of its pictures no class token looks at patches"


class ReadsWords(Encodes, Protocol):
    """What an explanation asks of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def word_starts(self, ids: Sequence[int]) -> list[bool]: ...


@dataclass(frozen=True)
class Explanation:
    """words: of the text as the tokenizer sees it; maps: float32 ``(W, h, w)``, one a word, not negative, all of one
    scale (W = 0 where the model has none); whole: ``(h, w)``, of the whole text; score: the matching probability, or
    the towers' cosine."""

    method: Method
    words: tuple[str, ...]
    maps: Tensor
    whole: Tensor
    score: float


@dataclass(frozen=True)
class TokenMaps:
    """Of B pairs: tokens: ``(t, h, w)`` each, a map a token of the text (none: ``(0, h, w)``); whole: ``(h, w)`` each;
    score: float32 ``(B,)``."""

    method: Method
    tokens: tuple[Tensor, ...]
    whole: tuple[Tensor, ...]
    score: Tensor


def explain(
    model: nn.Module, tokenizer: ReadsWords, picture: Picture, text: str, layer: int | None = None
) -> Explanation:
    """Heat maps of ``text`` and of its words in ``picture``, as the model's transform makes it; :func:`token_maps`."""
    return explain_pairs(model, tokenizer, [picture], [text], layer)[0]


def explain_pairs(
    model: nn.Module, tokenizer: ReadsWords, pictures: Sequence[Picture], texts: Sequence[str], layer: int | None = None
) -> list[Explanation]:
    """As :func:`explain`, text b about picture b, in one pass."""
    ids = tokenizer.encode(list(texts))
    found = token_maps(model, stack(pictures), TextBatch.of(ids), layer)
    explained = []
    for b, maps in enumerate(found.tokens):
        spans = _words(tokenizer, ids[b]) if len(maps) else []
        each = torch.stack([maps[span].mean(0) for _, span in spans]) if spans else maps[:0]
        words = tuple(word for word, _ in spans)
        explained.append(Explanation(found.method, words, each, found.whole[b], float(found.score[b])))
    return explained


def token_maps(model: nn.Module, pictures: Pictures, texts: TextBatch, layer: int | None = None) -> TokenMaps:
    """A map for each token of text b, [CLS] included, over the patches of picture b.

    layer: which of the cross-attention layers (counted from 0; default the middle one, ALBEF's third of six). In the
    last one only [CLS] looks at the picture on its way to the score, so it has no maps of tokens. Raises
    ``MissingCapabilityError`` for a model of which nothing can be shown, ``ValueError`` for a layer that is not there.
    """
    if isinstance(pictures, RegionBatch):
        raise MissingCapabilityError("explanations are maps over patches; this model reads the regions of a detector")
    training, device = model.training, device_of(model)
    model.eval()
    try:
        pictures, texts = pictures.to(device), texts.to(device)
        fused = any(isinstance(part, CrossAttention) for part in model.modules())
        if isinstance(model, Matches) and fused:
            return _grad_cam(model, pictures, texts, layer)
        if layer is not None:
            raise ValueError(f"{type(model).__name__} has no fusion layers with cross-attention to choose from")
        if isinstance(model, Matches):
            return _rollout(model, pictures, texts)
        return tower_maps(model, pictures, texts)
    finally:
        model.train(training)


def _grad_cam(model: nn.Module, pictures: Pictures, texts: TextBatch, layer: int | None) -> TokenMaps:
    with torch.no_grad():
        encoded = image_encoder(model, JOB)(pictures)
        written = text_encoder(model, JOB)(texts)
    own, matching = range(len(texts)), cast(Matches, model)
    with torch.enable_grad(), watch_looks(model) as looks:
        logits = matching.match(matching.project_images(encoded.tokens), written, own, own)
    chosen = (len(looks) - 1) // 2 if layer is None else layer
    if not 0 <= chosen < len(looks):
        raise ValueError(f"layer {layer}: this model has the fusion layers 0 to {len(looks) - 1}")
    weights = looks[chosen]
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), weights)
    heat = (weights * gradient.clamp(min=0)).detach().float().mean(1)  # (B, tokens, picture tokens)
    last = chosen == len(looks) - 1
    tokens, whole = [], []
    for b, (length, grid) in enumerate(zip(texts.segments.lengths, _grids(pictures, heat.shape[2]), strict=True)):
        maps = _patches(heat[b, : 1 if last else length], grid)
        tokens.append(maps[:0] if last else maps)
        whole.append(maps.mean(0))
    return _found("grad-cam", tokens, whole, logits.detach().float().softmax(1)[:, 1])


def _rollout(model: nn.Module, pictures: Pictures, texts: TextBatch) -> TokenMaps:
    own, matching = range(len(texts)), cast(Matches, model)
    with torch.no_grad():
        encoded = image_encoder(model, JOB)(pictures)
        written = text_encoder(model, JOB)(texts)
        memory = matching.project_images(encoded.tokens)
        with watch_pairs(model) as layers:
            logits = matching.match(memory, written, own, own)
        if not layers.weights:
            raise MissingCapabilityError(f"{type(model).__name__} matches pairs by no attention that can be watched")
        flow = torch.eye(layers.weights[0].shape[1], device=logits.device)
        for weights in layers.weights:
            flow = (weights.float() @ flow + flow) / 2  # the residual carries half (Abnar and Zuidema, section 3)
    tokens, whole = [], []
    lengths = zip(texts.segments.lengths, memory.segments.lengths, strict=True)
    grids = _grids(pictures, memory.segments.longest)
    for b, ((words, seen), grid) in enumerate(zip(lengths, grids, strict=True)):
        picture, text = (0, seen) if layers.picture_first else (words, 0)
        maps = _patches(flow[b, text : text + words, picture : picture + seen], grid)
        tokens.append(maps)
        whole.append(maps[0])
    return _found("rollout", tokens, whole, logits.float().softmax(1)[:, 1])


def tower_maps(model: nn.Module, pictures: Pictures, texts: TextBatch) -> TokenMaps:
    """Maps of whole texts by the towers' cosine, whatever else the model has. ``MissingCapabilityError`` where the
    tower of the pictures does not end with a class token that looks at patches."""
    if not has_towers(model):
        raise MissingCapabilityError(f"{type(model).__name__} neither matches pairs nor compares their features")
    with torch.no_grad():
        written = text_encoder(model, JOB)(texts)
    with torch.enable_grad(), watch_self(model) as layers:
        encoded = cast(EncodesImages, model).encode_images(cast(Tensor, pictures))
        cosine = (encoded.features * written.features).sum(1)
    if not layers:
        raise MissingCapabilityError(NO_CLASS_TOKEN.format(type(model).__name__))
    (gradient,) = torch.autograd.grad(cosine.sum(), layers[-1])
    heat = (layers[-1] * gradient.clamp(min=0)).detach().float().mean(1)[:, :1]
    grid = _square(heat.shape[2])
    if grid[0] * grid[1] == heat.shape[2]:
        raise MissingCapabilityError(NO_CLASS_TOKEN.format(type(model).__name__))
    maps = [_patches(one, grid) for one in heat]
    return _found("grad-cam of towers", [one[:0] for one in maps], [one[0] for one in maps], cosine.detach().float())


def _found(method: Method, tokens: list[Tensor], whole: list[Tensor], score: Tensor) -> TokenMaps:
    return TokenMaps(method, tuple(x.cpu() for x in tokens), tuple(x.cpu() for x in whole), score.cpu())


def _grids(pictures: Pictures, tokens: int) -> Sequence[tuple[int, int]]:
    """Patches (down, across) of each picture; of squares by the number of their tokens."""
    return pictures.grids if isinstance(pictures, PatchBatch) else [_square(tokens)] * len(pictures)


def _square(tokens: int) -> tuple[int, int]:
    side = math.isqrt(tokens)
    return side, side


def _patches(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(t, picture tokens)`` -> ``(t, h, w)``: the patches are the last of a picture's tokens."""
    return rows[:, rows.shape[1] - grid[0] * grid[1] :].unflatten(1, grid)


def _words(tokenizer: ReadsWords, ids: Sequence[int]) -> list[tuple[str, slice]]:
    """The words of a text, each with its tokens; special tokens are none."""
    starts = [i for i, begins in enumerate(tokenizer.word_starts(ids)) if begins]
    spans = [slice(low, high) for low, high in zip(starts, [*starts[1:], len(ids)], strict=True)]
    named = [(tokenizer.decode(ids[span]), span) for span in spans]
    return [(word, span) for word, span in named if word]
