"""CoCa (Yu et al. 2022, "Contrastive Captioners"): a vision Transformer, and a causal decoder cut into two halves.

picture -> ViT -> attentional pooling --+--> one token ------------> ITC <---- [CLS] at the end of the text
                                        +--> 256 tokens --+                          |
text    -> causal decoder, lower half (no picture) -------|--------------------------+
                                                          +--> upper half (cross-attention) --> next token

One forward pass gives both losses: the [CLS] token stands behind the text, so nothing in the text sees it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import Batch, TextBatch
from imglish.models.capabilities import Embedded, EncodedImages, EncodedTexts, ImageMemory
from imglish.models.captioning import CaptionForm, CaptionState
from imglish.models.clip import clip_vit
from imglish.models.coca_decoder import MultimodalLayer, UnimodalText
from imglish.models.vit import ImageInput, VitConfig
from imglish.nn.attention import Memory
from imglish.nn.blocks import Activation, BlockConfig
from imglish.nn.pool import QueryPool
from imglish.nn.segments import Segments, upload_index
from imglish.objectives.itc import itc_loss
from imglish.objectives.lm import lm_rows
from imglish.objectives.vocabulary import vocabulary_loss


def coca_vit(image_size: int, patch: int, width: int, depth: int, heads: int, mlp_ratio: float = 4.0) -> VitConfig:
    """The paper's image encoder: patches only, no class token; the poolers normalise what they read."""
    return VitConfig(
        image=ImageInput(image_size, resize="center"),
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio,
        norm_after=False,
        class_token=False,
    )


@dataclass(frozen=True)
class CocaConfig:
    """Sizes and objectives; the defaults are CoCa-Base as published (table 1).

    max_length: tokens of a text, [CLS] not among them. unimodal_depth, multimodal_depth: layers of the two halves.
    pool: "cascade", the contrastive query reads the 256 caption tokens (the paper's choice); "parallel", it reads the
    picture; "shared", one pooler whose first output is contrastive and whose others are for captions (open_clip).
    queries: of the caption pooler. cross: "block", cross-attention between self-attention and feed-forward of a layer
    (paper); "separate", a residual block of its own with a feed-forward behind each layer (open_clip). projection: a
    linear map from pooled picture and [CLS] to the joint space (open_clip; the paper has none).
    cls_sees: "text", the [CLS] token sees its text and itself; "released", what open_clip's released weights see
    (their mask is shifted by one): also one token of filling, and itself only behind a text of full length.
    contrastive_weight, caption_weight: of the two losses. chunk: rows of the similarity matrix, and of the logits over
    the vocabulary, that are computed at a time (None: all).
    """

    vision: VitConfig = field(default_factory=lambda: coca_vit(288, 18, 768, 12, 12))
    vocab_size: int = 64000
    max_length: int = 64
    width: int = 768
    heads: int = 12
    unimodal_depth: int = 12
    multimodal_depth: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    activation: Activation = "gelu"
    embed_dim: int = 768
    pool: Literal["cascade", "parallel", "shared"] = "cascade"
    queries: int = 256
    pool_heads: int = 12
    cross: Literal["block", "separate"] = "block"
    projection: bool = False
    cls_sees: Literal["text", "released"] = "text"
    temperature: float = 0.07
    contrastive_weight: float = 1.0
    caption_weight: float = 2.0
    chunk: int | None = 512

    family: ClassVar[str] = "coca"
    several_captions: ClassVar[bool] = True
    closing_token: ClassVar[bool] = True

    @property
    def image(self) -> ImageInput:
        return self.vision.image

    def __post_init__(self) -> None:
        if not self.projection and self.embed_dim != self.width:
            raise ValueError(f"without projection, embed_dim {self.embed_dim} must be width {self.width}")
        if self.pool == "shared" and self.queries < 2:
            raise ValueError('pool="shared" needs at least two queries: one for the contrast, the others for captions')
        if self.vision.norm_after:
            raise ValueError("vision.norm_after must be false: the pooler normalises the tokens that it reads")
        if self.unimodal_depth < 1 or self.multimodal_depth < 1:
            raise ValueError("both halves of the decoder need at least one layer")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, it must be positive")

    def block(self, cross: bool) -> BlockConfig:
        """A layer of the decoder."""
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            hidden=int(self.width * self.mlp_ratio),
            norm_eps=self.norm_eps,
            activation=self.activation,
            cross_width=self.width if cross else None,
        )

    def build(self) -> Coca:
        return Coca(self)


@dataclass(frozen=True)
class _Towers:
    """What the upper half needs: caption tokens ``(B, Q, D)`` and packed states of the texts ``(T, D)``."""

    tokens: Tensor
    rows: Tensor


class Coca(nn.Module):
    """Encodes pictures and texts into one space and writes captions; ``losses`` is one training step."""

    family = "coca"

    def __init__(self, config: CocaConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.vision = config.vision.build()
        vision, eps = config.vision.width, config.vision.norm_eps
        self.caption_pool = QueryPool(config.queries, width, config.pool_heads, vision, eps)
        self.contrast_pool: QueryPool | None = None
        if config.pool != "shared":
            read = width if config.pool == "cascade" else vision
            self.contrast_pool = QueryPool(1, width, config.pool_heads, read, eps)
        self.text = UnimodalText(config)
        self.image_proj: nn.Module = nn.Identity()
        self.text_proj: nn.Module = nn.Identity()
        if config.projection:
            self.image_proj = nn.Linear(width, config.embed_dim, bias=False)
            self.text_proj = nn.Linear(width, config.embed_dim, bias=False)
        self.layers = nn.ModuleList(MultimodalLayer(config) for _ in range(config.multimodal_depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        _init(self)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the logit scale at most 100, as CLIP; the trainer calls it after each step."""
        self.logit_scale.clamp_(0, math.log(100))

    # ---- encoders -------------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> EncodedImages:
        """``(B, 3, H, W)`` uint8 or normalised -> features ``(B, E)`` and caption tokens ``(B, Q, D)``."""
        pooled, tokens = self.pool_images(images)
        return EncodedImages(_unit(self.image_proj(pooled)), tokens)

    def encode_texts(self, texts: TextBatch) -> EncodedTexts:
        """Packed texts -> features ``(N, E)``."""
        return EncodedTexts(_unit(self.text_proj(self.text.class_states(texts))), texts.segments)

    def pool_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Attentional pooling: the contrastive token ``(B, D)`` and the caption tokens ``(B, Q, D)`` of pictures."""
        tokens = self.vision(images)
        captions: Tensor = self.caption_pool(tokens)
        if self.contrast_pool is None:
            return captions[:, 0], captions[:, 1:]
        pooled = self.contrast_pool(captions if self.config.pool == "cascade" else tokens)
        return pooled[:, 0], captions

    # ---- captions -------------------------------------------------------------------------------------------------

    def project_images(self, tokens: Tensor) -> ImageMemory:
        """Keys and values of caption tokens ``(B, Q, D)`` for every layer of the upper half, once a picture."""
        flat = tokens.flatten(0, 1)
        made = tuple(cast(MultimodalLayer, layer).project(flat) for layer in self.layers)
        return ImageMemory(made, Segments.equal(tokens.shape[0], tokens.shape[1]))

    def decode(self, rows: Tensor, segments: Segments, memory: ImageMemory, texts: Segments) -> Tensor:
        """States ``(T, D)`` behind every row, normalised, of which ``head`` makes the logits of the next token.

        rows: ``(T, D)`` of the lower half, ``segments`` their texts, in the order of their pictures;
        ``texts.lengths[i]``: how many consecutive texts belong to picture i of ``memory``.
        """
        for layer, (k, v) in zip(self.layers, memory.layers, strict=True):
            rows = layer(rows, segments, Memory(k, v, memory.segments, texts), causal=True)
        states: Tensor = self.norm(rows)
        return states

    def caption_form(self) -> CaptionForm:
        return CaptionForm(longest=self.config.max_length)

    def start_captions(self, images: EncodedImages, room: int) -> CaptionState:
        assert isinstance(images.tokens, Tensor)
        depth = self.config.unimodal_depth + self.config.multimodal_depth
        return CaptionState.begin(self.project_images(images.tokens), depth, room)

    def continue_captions(self, state: CaptionState, texts: TextBatch) -> Tensor:
        """Tokens never see [CLS], so it takes no part here and both halves keep a cache."""
        step = state.cache.extend(texts.segments, state.device)
        rows, lower = self.text.embed(texts.ids, step.positions), self.config.unimodal_depth
        for block, cache in zip(self.text.blocks, step.layers[:lower], strict=True):
            rows = block(rows, texts.segments, cache=cache)
        for layer, memory, cache in zip(self.layers, state.memories(), step.layers[lower:], strict=True):
            rows = layer(rows, texts.segments, memory, cache=cache)
        logits: Tensor = self.head(self.norm(rows[texts.segments.ends(rows.device)]))
        return logits

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, teacher: Any = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]:
        return self.losses(batch, teacher, feature_grads)

    def embed(self, batch: Batch, teacher: Any = None) -> Embedded:
        """Each picture once, each of its captions through the lower half."""
        pooled, tokens = self.pool_images(batch.squares)
        rows, cls = self.text(batch.texts)
        return Embedded(
            image=_unit(self.image_proj(pooled)),
            text=_unit(self.text_proj(cls)),
            image_ids=batch.image_ids,
            towers=_Towers(tokens, rows),
        )

    def contrast(self, embedded: Embedded, teacher: Any = None) -> dict[str, Tensor]:
        """The contrastive loss over the batch of all ranks (equation 1 of the paper, with its weight)."""
        if not self.config.contrastive_weight:
            return {}
        scale = self.logit_scale.exp()
        loss = itc_loss(embedded.image, embedded.text, scale, embedded.image_ids, self.config.chunk)
        return {"itc": loss * self.config.contrastive_weight, "metric/logit_scale": scale.detach()}

    def losses(self, batch: Batch, teacher: Any = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]:
        """One training step (equation 4): ITC by the lower half's [CLS], captioning by the upper half.

        The upper half gets the tokens that have a successor; its logits are made for these and no others.
        """
        embedded = self.embed(batch)
        losses = self.contrast(embedded) if feature_grads is None else embedded.surrogate(feature_grads)
        if not self.config.caption_weight:
            return losses
        towers: _Towers = embedded.towers
        device, segments = towers.rows.device, batch.texts.segments
        predicting, predicted = lm_rows(segments)
        inputs = Segments.of(max(n - 1, 0) for n in segments.lengths)
        texts = Segments.equal(len(batch), batch.captions)
        memory = self.project_images(towers.tokens)
        states = self.decode(towers.rows[upload_index(predicting, device)], inputs, memory, texts)
        targets = batch.texts.ids[upload_index(predicted, device)]
        count = batch.mean(lambda b: b.texts.segments.total - len(b.texts))
        nats = vocabulary_loss(states, self.head.weight, targets, count, self.config.chunk)
        losses["caption"] = nats * self.config.caption_weight
        losses["metric/token_nats"] = nats.detach()
        return losses


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)


@torch.no_grad()
def _init(model: Coca) -> None:
    """CLIP's initial weights for everything, poolers, cross-attention and output matrix too.

    (In open_clip the output matrix keeps whatever memory held, because its initialisation is never called.)
    """
    config = model.config
    width, depth = config.width, config.unimodal_depth + config.multimodal_depth
    nn.init.normal_(model.text.words.weight, std=0.02)
    nn.init.normal_(model.text.positions, std=0.01)
    nn.init.normal_(model.text.cls, std=0.01)
    nn.init.normal_(model.head.weight, std=0.02)
    nn.init.normal_(model.vision.positions, std=config.vision.width**-0.5)
    if model.vision.class_token is not None:
        nn.init.normal_(model.vision.class_token, std=config.vision.width**-0.5)
    for part in (model.image_proj, model.text_proj):
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=width**-0.5)
    for tower, layers in ((model.vision, config.vision.depth), (model.text, depth), (model.layers, depth)):
        for name, linear in tower.named_modules():
            if isinstance(linear, nn.Linear):
                std = linear.in_features**-0.5
                if name.endswith((".out", ".fc2")):  # what a layer adds to its residual stream
                    std = linear.out_features**-0.5 * (2 * layers) ** -0.5
                elif name.endswith(".fc1"):
                    std = (2 * linear.in_features) ** -0.5
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)
    for pool in (model.caption_pool, model.contrast_pool):
        if pool is not None:
            for linear in (pool.q, pool.kv, pool.out):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                nn.init.zeros_(linear.bias)


# ---- named sizes --------------------------------------------------------------------------------------------------


def coca_base() -> CocaConfig:
    """CoCa-Base (table 1): 86 M in the image encoder, 297 M in the decoder."""
    return CocaConfig()


def coca_large() -> CocaConfig:
    """CoCa-Large (table 1): 303 M in the image encoder, 484 M in the decoder."""
    return CocaConfig(vision=coca_vit(288, 18, 1024, 24, 16), width=1024, heads=16, embed_dim=1024, pool_heads=16)


def coca_2b() -> CocaConfig:
    """CoCa (table 1): 1 B in the image encoder, 1.1 B in the decoder."""
    return CocaConfig(
        vision=coca_vit(288, 18, 1408, 40, 16, mlp_ratio=6144 / 1408),
        width=1408,
        heads=16,
        unimodal_depth=18,
        multimodal_depth=18,
        embed_dim=1408,
        pool_heads=16,
    )


def openclip_coca(image: tuple[int, int, int, int], width: int, heads: int) -> CocaConfig:
    """open_clip's variant; image: (patch, width, depth, heads) at 224 px. New runs use the correct mask."""
    patch, image_width, depth, image_heads = image
    vision = clip_vit(224, patch, image_width, depth, image_heads, activation="gelu")
    return CocaConfig(
        vision=replace(vision, norm_after=False),
        vocab_size=49408,
        max_length=76,
        width=width,
        heads=heads,
        norm_eps=1e-5,
        embed_dim=width,
        pool="shared",
        pool_heads=8,
        cross="separate",
        projection=True,
    )


def coca_small() -> CocaConfig:
    """5.9 M parameters (4,000 words), for thousands of real photographs and CPUs."""
    return CocaConfig(
        vision=coca_vit(80, 16, 192, 4, 3),
        vocab_size=4000,
        max_length=64,
        width=192,
        heads=3,
        unimodal_depth=2,
        multimodal_depth=2,
        embed_dim=128,
        queries=25,
        pool_heads=3,
        projection=True,
    )


def coca_tiny() -> CocaConfig:
    """For tests: seconds on one core."""
    return CocaConfig(
        vision=coca_vit(48, 8, 64, 3, 4),
        vocab_size=500,
        max_length=48,
        width=64,
        heads=4,
        unimodal_depth=2,
        multimodal_depth=2,
        embed_dim=64,
        queries=9,
        pool_heads=4,
    )


CONFIGS: dict[str, Callable[[], CocaConfig]] = {
    "coca-base": coca_base,
    "coca-large": coca_large,
    "coca-2b": coca_2b,
    "openclip-coca-vit-b-32": lambda: openclip_coca((32, 768, 12, 12), 512, 8),
    "openclip-coca-vit-l-14": lambda: openclip_coca((14, 1024, 24, 16), 768, 12),
    "coca-small": coca_small,
    "coca-tiny": coca_tiny,
}
