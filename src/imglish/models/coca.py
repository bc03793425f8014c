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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import Batch, TextBatch
from imglish.models.capabilities import Embedded, EncodedImages, EncodedTexts, ImageMemory
from imglish.models.captioning import CaptionForm, CaptionState
from imglish.models.clip import clip_vit
from imglish.models.vit import ImageInput, VitConfig
from imglish.nn.attention import CrossAttention, Memory, attend
from imglish.nn.blocks import Activation, Block, BlockConfig, Mlp
from imglish.nn.cache import LayerCache
from imglish.nn.pool import QueryPool
from imglish.nn.segments import Rows, Segments, upload_index
from imglish.objectives.itc import itc_loss
from imglish.objectives.lm import lm_rows
from imglish.objectives.vocabulary import vocabulary_loss

PAD = 0  # the filling of texts in open_clip, which its released weights have learned to read


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


class UnimodalText(nn.Module):
    """The lower half of the decoder: causal, without picture, with a learned [CLS] behind each text (section 3.2)."""

    def __init__(self, config: CocaConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.empty(config.max_length + 1, config.width))
        self.cls = nn.Parameter(torch.empty(config.width))
        self.blocks = nn.ModuleList(config.block(cross=False).build() for _ in range(config.unimodal_depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, texts: TextBatch) -> tuple[Tensor, Tensor]:
        """``(T,)`` ids -> states ``(T, D)`` of the tokens for the upper half, and of [CLS], normalised, ``(N, D)``."""
        if self.config.cls_sees == "released":
            return self._released(texts)
        rows, segments = self._with_cls(texts)
        for block in self.blocks:
            rows = block(rows, segments, causal=True)
        ends = segments.bounds[1:] - 1
        tokens = np.delete(np.arange(segments.total), ends)
        return rows[upload_index(tokens, rows.device)], self.norm(rows[segments.ends(rows.device)])

    def class_states(self, texts: TextBatch) -> Tensor:
        """[CLS] alone, ``(N, D)``: the last layer computes its row only."""
        if self.config.cls_sees == "released":
            return self._released(texts)[1]
        rows, segments = self._with_cls(texts)
        for block in self.blocks[:-1]:
            rows = block(rows, segments, causal=True)
        read = Rows.last(segments, rows.device)
        states: Tensor = self.norm(self.blocks[-1](rows, segments, causal=True, read=read))
        return states

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """``(T,)`` ids at ``(T,)`` positions -> ``(T, D)``."""
        rows: Tensor = self.words(ids) + self.positions[positions]
        return rows

    def _with_cls(self, texts: TextBatch) -> tuple[Tensor, Segments]:
        """Every text followed by its [CLS], whose position is the last one however short the text is."""
        segments, device = self._checked(texts), texts.ids.device
        rows = torch.cat([self.embed(texts.ids, segments.positions(device)), self._class_rows(segments.count)])
        order = np.insert(np.arange(segments.total), segments.bounds[1:], segments.total + np.arange(segments.count))
        return rows[upload_index(order, device)], Segments.of(n + 1 for n in segments.lengths)

    def _class_rows(self, count: int) -> Tensor:
        return (self.cls + self.positions[-1]).expand(count, -1)

    def _checked(self, texts: TextBatch) -> Segments:
        if texts.segments.longest > self.config.max_length:
            raise ValueError(
                f"a text has {texts.segments.longest} tokens, the model takes {self.config.max_length}: "
                "tokenize with a smaller max_length"
            )
        return texts.segments

    def _released(self, texts: TextBatch) -> tuple[Tensor, Tensor]:
        """The same with the mask of open_clip's released weights: see :func:`released_layout`."""
        segments, device = self._checked(texts), texts.ids.device
        filled, own, keys, key_segments = released_layout(segments, self.config.max_length)
        place = upload_index(own, device)
        ids = texts.ids.new_full((filled.total,), PAD).index_copy(0, place, texts.ids)
        rows = torch.cat([self.embed(ids, filled.positions(device)), self._class_rows(segments.count)])
        seen = Rows(upload_index(keys, device), key_segments)
        for block in self.blocks:
            rows = released_block(cast(Block, block), rows, filled, seen)
        return rows[place], self.norm(rows[filled.total :])


def released_layout(segments: Segments, max_length: int) -> tuple[Segments, np.ndarray, np.ndarray, Segments]:
    """Which rows the [CLS] tokens of open_clip's released weights see.

    A text shorter than ``max_length`` is followed by one token of filling. The rows are those of all texts, then the N
    [CLS]. Returns the lengths with the filling, the row numbers of the tokens without it, and the rows that each [CLS]
    sees, with their number: text and filling, or a text of full length and [CLS] itself.
    """
    lengths = np.asarray(segments.lengths, dtype=np.int64)
    full = lengths == max_length
    filled = Segments.of(lengths + ~full)
    own = np.arange(segments.total) + np.repeat(np.cumsum(~full) - ~full, lengths)
    classes = filled.total + np.flatnonzero(full)
    keys = np.insert(np.arange(filled.total), filled.bounds[1:][full], classes)
    return filled, own, keys, Segments.of(np.asarray(filled.lengths) + full)


def released_block(block: Block, rows: Tensor, texts: Segments, seen: Rows) -> Tensor:
    """A layer over the rows of ``texts`` (causal) and, behind them, one [CLS] a text, which sees the rows ``seen``."""
    heads, total = block.attn.heads, texts.total
    q, k, v = block.attn.qkv(block.norm1(rows)).unflatten(1, (3, heads, -1)).unbind(1)
    among = attend(q[:total], k[:total], v[:total], texts, texts, causal=True)
    one = Segments.equal(texts.count, 1)
    cls = attend(q[total:], k[seen.index], v[seen.index], one, seen.segments)
    rows = rows + block.attn.out(torch.cat([among, cls]).flatten(1))
    out: Tensor = rows + block.mlp(block.norm2(rows))
    return out


class CrossBlock(nn.Module):
    """Cross-attention as a residual block of its own, with a norm for the picture and a feed-forward (open_clip)."""

    def __init__(self, config: CocaConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.norm_memory = nn.LayerNorm(width, eps=config.norm_eps)
        self.cross = CrossAttention(width, config.heads, width)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), config.activation)

    def forward(self, rows: Tensor, segments: Segments, memory: Memory) -> Tensor:
        rows = rows + self.cross(self.norm1(rows), segments, memory)
        out: Tensor = rows + self.mlp(self.norm2(rows))
        return out


class MultimodalLayer(nn.Module):
    """A layer of the upper half: causal self-attention and cross-attention to the caption tokens of the picture."""

    def __init__(self, config: CocaConfig) -> None:
        super().__init__()
        separate = config.cross == "separate"
        self.block = config.block(cross=not separate).build()
        self.cross = CrossBlock(config) if separate else None

    def project(self, tokens_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each ``(S, heads, head_dim)``, of the caption tokens ``(S, D)``."""
        if self.cross is not None:
            return self.cross.cross.project(self.cross.norm_memory(tokens_SD))
        return cast(CrossAttention, self.block.cross).project(tokens_SD)

    def forward(
        self, rows: Tensor, segments: Segments, memory: Memory, causal: bool = False, cache: LayerCache | None = None
    ) -> Tensor:
        """``(T, D)`` -> ``(T, D)``; texts in the order of their pictures."""
        if self.cross is None:
            out: Tensor = self.block(rows, segments, memory, causal, cache=cache)
            return out
        rows = self.block(rows, segments, causal=causal, cache=cache)
        return cast(Tensor, self.cross(rows, segments, memory))


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

    def make_teacher(self) -> None:
        """CoCa is trained without a momentum teacher."""

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
        count = batch.tokens - len(batch.texts)
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
