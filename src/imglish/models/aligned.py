"""Align before fuse: what ALBEF (Li et al. 2021, section 3) and BLIP (Li et al. 2022, section 3) have in common.

Two towers whose features meet in ITC against a momentum teacher and its queue, and a fusion that tells matching pairs
from hard negatives, which ITC similarity draws. A model gives its modules and its layers; this file is the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import Batch
from imglish.models.capabilities import Embedded, EncodedImages, EncodedTexts, ImageMemory
from imglish.models.pairing import Negatives, join_memories
from imglish.models.vit import ImageInput, VisionTransformer, VitConfig
from imglish.nn.attention import CrossAttention, Memory
from imglish.nn.blocks import Block, BlockConfig
from imglish.nn.segments import HostCopy, Rows, Segments, upload_index
from imglish.objectives.exchange import gather_rows
from imglish.objectives.gather import gather, gather_with_grad, rank, world_size
from imglish.objectives.itm import draw_negatives, has_negative, itm_loss, negative_weights
from imglish.objectives.momentum import DistilledItc, MomentumTeacher, TeacherConfig, distilled_itc


@dataclass(frozen=True)
class AlignedConfig:
    """Sizes of both models; the defaults are BERT-base and ViT-B/16.

    itc, itm: which objectives are trained; hard_negatives: share of the ITM negatives that are drawn by ITC similarity
    (published: all of them), the others are drawn uniformly; itc_swapped: also the ITC sees the wrong captions of
    :class:`Batch` (ITM sees them always). embedding_std: of words and positions, of text and picture, at the start;
    0.02 as published. A tiny model with its high learning rate learns where things are sooner from a larger one.
    """

    vision: VitConfig = field(default_factory=VitConfig)
    vocab_size: int = 30522
    max_length: int = 512
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    norm_eps: float = 1e-12
    dropout: float = 0.1
    embed_dim: int = 256
    temperature: float = 0.07
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    itc: bool = True
    itm: bool = True
    hard_negatives: float = 1.0
    itc_swapped: bool = False
    embedding_std: float = 0.02

    @property
    def image(self) -> ImageInput:
        return self.vision.image

    @property
    def retrieves(self) -> bool:
        """Whether training aligns or matches pictures and texts, so that recalls say what was learned."""
        return self.itc or self.itm

    def __post_init__(self) -> None:
        if not 0 <= self.hard_negatives <= 1:
            raise ValueError(f"hard_negatives is {self.hard_negatives}, a share between 0 and 1")

    def text_block(self, cross: bool) -> Block:
        """A layer of the text Transformer (BERT's), with or without cross-attention to the picture."""
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            hidden=self.hidden,
            norm="post",
            norm_eps=self.norm_eps,
            cross_width=self.vision.width if cross else None,
            dropout=self.dropout,
        ).build()


class AlignedFusion(nn.Module):
    """A model with these modules; ``image_proj`` and ``text_proj`` read the class tokens, ``itm_head`` gives two logits
    (column 1 = matched) from the [CLS] of the last fusion layer."""

    config: AlignedConfig
    vision: VisionTransformer
    image_proj: nn.Linear
    text_proj: nn.Linear
    itm_head: nn.Linear
    temperature: nn.Parameter

    def fusing(self) -> Iterable[nn.Module]:
        """The layers that look at the picture, in their order."""
        raise NotImplementedError

    def embed(self, batch: Batch, teacher: MomentumTeacher[Self] | None = None) -> Embedded:
        """Features of student and teacher for the contrast, states for the fusion."""
        raise NotImplementedError

    def losses(
        self, batch: Batch, teacher: MomentumTeacher[Self] | None = None, feature_grads: Embedded | None = None
    ) -> dict[str, Tensor]:
        """One training step."""
        raise NotImplementedError

    def forward(
        self, batch: Batch, teacher: MomentumTeacher[Self] | None = None, feature_grads: Embedded | None = None
    ) -> dict[str, Tensor]:
        return self.losses(batch, teacher, feature_grads)

    def make_teacher(self) -> MomentumTeacher[Self] | None:
        """The momentum copy, with the queue; the trainer keeps it."""
        return MomentumTeacher(self, self.config.teacher, self.config.embed_dim)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the temperature in [0.001, 0.5], as the official pre-training does before each step."""
        self.temperature.clamp_(0.001, 0.5)

    # ---- towers ---------------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> EncodedImages:
        """``(B, 3, H, W)`` uint8 or normalised -> features ``(B, E)`` and tokens ``(B, L, D)``."""
        tokens = self.vision(images)
        return EncodedImages(self._image_features(tokens[:, 0]), tokens)

    def _image_features(self, cls: Tensor) -> Tensor:
        return F.normalize(self.image_proj(cls).float(), dim=-1)

    def _text_features(self, cls: Tensor) -> Tensor:
        return F.normalize(self.text_proj(cls).float(), dim=-1)

    # ---- fusion ---------------------------------------------------------------------------------------------------

    def project_images(self, tokens: Tensor) -> ImageMemory:
        """Keys and values of ``tokens (B, L, D)`` for every fusion layer, once a picture and when they are needed."""
        return project(self.fusing(), tokens)

    def fuse(
        self, rows: Tensor, segments: Segments, memory: ImageMemory, texts: Segments, read: Rows | None = None
    ) -> Tensor:
        """Fusion layers over packed text states that lie in the order of their pictures: see :func:`look`."""
        return look(self.fusing(), rows, segments, memory, texts, read)

    def match(
        self, memory: ImageMemory, texts: EncodedTexts, image_index: Sequence[int], text_index: Sequence[int]
    ) -> Tensor:
        """ITM logits ``(P, 2)``, column 1 = matched, of pairs of a picture of ``memory`` and one of ``texts``.

        Texts that meet the same picture are laid side by side, so its keys and values are neither projected again
        nor copied; only [CLS] is computed in the last layer. Pairs may come in any order.
        """
        if texts.rows is None:
            raise ValueError("match needs texts.rows: encode the texts with this model")
        return self._match(memory, texts.rows, texts.segments, np.asarray(image_index), np.asarray(text_index))

    def _match(
        self, memory: ImageMemory, rows: Tensor, segments: Segments, pictures: np.ndarray, texts: np.ndarray
    ) -> Tensor:
        order = np.argsort(pictures, kind="stable")
        chosen = texts[order]
        rows = rows[upload_index(segments.rows_of(chosen), rows.device)]
        segments = segments.select(chosen)
        per_picture = Segments.of(np.bincount(pictures, minlength=memory.segments.count))
        cls = self.fuse(rows, segments, memory, per_picture, Rows.first(segments, rows.device))
        logits: Tensor = self.itm_head(cls)
        return logits[upload_index(np.argsort(order, kind="stable"), logits.device)]

    # ---- objectives -----------------------------------------------------------------------------------------------

    def contrast(self, embedded: Embedded, teacher: MomentumTeacher[Self] | None = None) -> dict[str, Tensor]:
        """The contrastive loss alone, from features (ALBEF, section 3.2, with the soft targets of section 3.3)."""
        return {"itc": self.distilled_itc(embedded, self._needed(teacher)).loss} if self.config.itc else {}

    def distilled_itc(self, embedded: Embedded, teacher: MomentumTeacher[Self]) -> DistilledItc:
        """ITC with its similarities."""
        image_m, text_m = embedded.momentum()
        return distilled_itc(
            embedded.image,
            embedded.text,
            image_m,
            text_m,
            embedded.image_ids,
            self.temperature,
            teacher,
            embedded.swapped,
        )

    def _draw(self, embedded: Embedded, draws: Tensor) -> Negatives:
        """One hard negative text a picture and picture a text, over the batch of all ranks, by ITC similarity."""
        ids, everyone = embedded.image_ids, gather(embedded.image_ids)
        with torch.no_grad():
            nothing = torch.zeros(ids.shape[0], everyone.shape[0], device=ids.device)
            texts = pictures = negative_weights(nothing, ids, everyone)
            if self.config.itc and self.config.hard_negatives > 0:
                image_m, text_m = embedded.momentum()
                i2t = embedded.image @ gather(text_m).T / self.temperature
                t2i = embedded.text @ gather(image_m).T / self.temperature
                texts = texts.lerp(negative_weights(i2t, ids, everyone), self.config.hard_negatives)
                pictures = pictures.lerp(negative_weights(t2i, ids, everyone), self.config.hard_negatives)
            chosen = torch.stack([draw_negatives(pictures, draws[:, 0]), draw_negatives(texts, draws[:, 1])])
            exist = torch.cat([has_negative(pictures), has_negative(texts)])
        return Negatives(HostCopy(chosen), exist)

    def _match_negatives(
        self,
        negatives: Negatives,
        memory: ImageMemory,
        tokens: Tensor,
        rows: Tensor,
        segments: Segments,
        known: bool = False,
    ) -> Tensor:
        """ITM logits ``(2B, 2)``: B texts with their negative picture, B pictures with their negative text.

        memory: of ``tokens (B, L, D)``; rows: of ``segments``, the B texts and behind them perhaps B other texts a
        picture. ``known``: before the negatives, the logits of all these texts with their own picture.
        """
        count = tokens.shape[0]
        mine, others = np.arange(count), Segments(segments.lengths[count:])
        chosen_image, chosen_text = negatives.chosen.numpy()
        own_texts, candidates = mine, segments.count - others.count
        if world_size() > 1:  # this rank's pictures come first in the memory, then the foreign ones that were drawn
            clean = Segments(segments.lengths[:count])
            gathered, everyone = gather_rows(rows[: clean.total], clean)
            rows, segments = torch.cat([gathered, rows[clean.total :]]), everyone + others
            pictures = gather_with_grad(tokens)
            first = rank() * count
            foreign = np.setdiff1d(chosen_image, first + mine)
            memory = join_memories(memory, self.project_images(pictures[upload_index(foreign, rows.device)]))
            place = {int(n): count + i for i, n in enumerate(foreign)} | {first + i: i for i in range(count)}
            chosen_image = np.array([place[int(n)] for n in chosen_image])
            own_texts, candidates = first + mine, everyone.count
        image_index, text_index = [chosen_image, mine], [own_texts, chosen_text]
        if known:
            more = np.arange(others.count)
            image_index = [mine, more % count, *image_index]
            text_index = [own_texts, candidates + more, *text_index]
        return self._match(memory, rows, segments, np.concatenate(image_index), np.concatenate(text_index))

    def _needed(self, teacher: MomentumTeacher[Self] | None) -> MomentumTeacher[Self]:
        if teacher is None:
            raise ValueError(f"{type(self).__name__} trains with its momentum teacher: pass model.make_teacher()")
        return teacher


class Projections(Sequence[tuple[Tensor, ...]]):
    """Keys and values of pictures for every layer, each made when it is first asked for, and kept.

    tokens: ``(S, D)``; crosses: the cross-attention of every layer.
    """

    def __init__(self, tokens: Tensor, crosses: Sequence[CrossAttention]) -> None:
        self.tokens, self.crosses = tokens, crosses
        self.made: dict[int, tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        return len(self.crosses)

    @overload
    def __getitem__(self, layer: int) -> tuple[Tensor, ...]: ...
    @overload
    def __getitem__(self, layer: slice) -> tuple[tuple[Tensor, ...], ...]: ...
    def __getitem__(self, layer: int | slice) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], ...]:
        if isinstance(layer, slice):
            return tuple(self[i] for i in range(*layer.indices(len(self))))
        if not 0 <= layer < len(self):
            raise IndexError(f"layer {layer} of {len(self)}")
        if layer not in self.made:
            self.made[layer] = self.crosses[layer].project(self.tokens)
        return self.made[layer]

    def seen(self, layer: int, rows: int, segments: Segments, texts: Segments) -> Memory:
        """What ``rows`` text rows look at in this layer: keys and values, or the tokens themselves where that is less
        work (outside of training, whose gradients then stay those of one order of work)."""
        if layer in self.made or torch.is_grad_enabled() or not self.crosses[layer].rather_reads(rows, segments):
            keys, values = self[layer]
            return Memory(keys, values, segments, texts)
        return Memory(self.tokens, self.tokens, segments, texts, projected=False)


def project(layers: Iterable[nn.Module], tokens: Tensor) -> ImageMemory:
    """Keys and values of ``tokens (B, L, D)`` for the cross-attention of every layer, once a picture."""
    segments = Segments.equal(tokens.shape[0], tokens.shape[1])
    crosses = [cast(CrossAttention, layer.cross) for layer in layers]
    return ImageMemory(Projections(tokens.flatten(0, 1), crosses), segments)


def look(
    layers: Iterable[nn.Module],
    rows: Tensor,
    segments: Segments,
    memory: ImageMemory,
    texts: Segments,
    read: Rows | None = None,
    causal: bool = False,
) -> Tensor:
    """``layers`` over packed text rows that lie in the order of their pictures.

    rows: ``(T, D)`` of ``segments``; ``texts.lengths[i]``: how many consecutive texts belong to picture i of
    ``memory``. Returns ``(T, D)``, or the M rows of ``read``: the last layer computes those only.
    """
    last = len(memory.layers) - 1
    for i, layer in enumerate(layers):
        here = read if i == last else None
        if isinstance(memory.layers, Projections):
            seen = memory.layers.seen(i, (segments if here is None else here.segments).total, memory.segments, texts)
        else:
            keys, values = memory.layers[i]
            seen = Memory(keys, values, memory.segments, texts)
        rows = layer(rows, segments, memory=seen, causal=causal, read=here)
    return rows


def itm_losses(logits: Tensor, negatives: Negatives) -> dict[str, Tensor]:
    """ITM over ``logits (P, 2)``: B positives, perhaps swapped texts, and last the 2B hard ``negatives``."""
    drawn = negatives.exist.shape[0]
    labels = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    labels[: drawn // 2] = 1
    counted = torch.ones_like(labels, dtype=torch.bool)
    counted[-drawn:] = negatives.exist
    accuracy = (logits.argmax(1) == labels).float().mean()
    return {"itm": itm_loss(logits, labels, counted), "metric/itm_accuracy": accuracy.detach()}


def init_weights(module: nn.Module, width: int, embedding_std: float) -> None:
    """Linear layers and embeddings normal, biases zero. At width 768 the deviation of layers is 0.02 (BERT, DeiT);
    smaller models start in proportion to 1 / sqrt(width), with activations of the same size."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02 * math.sqrt(768 / width))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=embedding_std)


def init_all(model: AlignedFusion) -> None:
    """Weights at the start of training."""
    config = model.config
    init_weights(model, config.width, config.embedding_std)
    init_weights(model.vision, config.vision.width, config.embedding_std)
    with torch.no_grad():
        model.vision.positions.mul_(config.embedding_std / 0.02)
