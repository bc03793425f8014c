"""ALBEF (Li et al. 2021, "Align before Fuse"): a vision Transformer, a text Transformer and a fusion Transformer.

picture -> ViT-12 ------------------------> tokens --+--------------------------> ITC
text    -> BERT layers 0-5 -> states ----------------|--> BERT layers 6-11 -----> ITM, MLM
                                                     +--> (cross-attention)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import Batch, MaskedTexts, TextBatch
from imglish.models.capabilities import Embedded, EncodedImages, EncodedTexts, ImageMemory
from imglish.models.pairing import Negatives, all_texts, join_memories, lay_out
from imglish.models.vit import ImageInput, VitConfig
from imglish.nn.attention import CrossAttention, Memory
from imglish.nn.blocks import BlockConfig
from imglish.nn.embed import BertEmbedding, MlmHead
from imglish.nn.segments import HostCopy, Rows, Segments, upload_index
from imglish.objectives.exchange import gather_rows
from imglish.objectives.gather import gather, gather_with_grad, rank, world_size
from imglish.objectives.itm import draw_negatives, has_negative, itm_loss, negative_weights
from imglish.objectives.mlm import mlm_loss
from imglish.objectives.momentum import DistilledItc, MomentumTeacher, TeacherConfig, distilled_itc


@dataclass(frozen=True)
class AlbefConfig:
    """Sizes and objectives; the defaults are the published model (ViT-B/16 at 256 px, BERT-base split 6/6).

    fusion_layer: text layers before the fusion; itc, itm, mlm: which objectives are trained; hard_negatives: share of
    the ITM negatives that are drawn by ITC similarity (published: all of them), the others are drawn uniformly;
    itc_swapped: also the ITC sees the wrong captions of :class:`Batch` (ITM sees them always). embedding_std: of words
    and positions, of text and picture, at the start; 0.02 as published. A tiny model with its high learning rate learns
    where things are sooner from a larger one.
    """

    vision: VitConfig = field(default_factory=lambda: VitConfig(image=ImageInput(256)))
    vocab_size: int = 30522
    max_length: int = 512
    width: int = 768
    depth: int = 12
    fusion_layer: int = 6
    heads: int = 12
    hidden: int = 3072
    norm_eps: float = 1e-12
    dropout: float = 0.1
    embed_dim: int = 256
    temperature: float = 0.07
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    itc: bool = True
    itm: bool = True
    mlm: bool = True
    hard_negatives: float = 1.0
    itc_swapped: bool = False
    embedding_std: float = 0.02

    family: ClassVar[str] = "albef"

    @property
    def image(self) -> ImageInput:
        return self.vision.image

    def __post_init__(self) -> None:
        if not 0 < self.fusion_layer < self.depth:
            raise ValueError(f"fusion_layer {self.fusion_layer} must lie between 1 and depth - 1 = {self.depth - 1}")
        if not 0 <= self.hard_negatives <= 1:
            raise ValueError(f"hard_negatives is {self.hard_negatives}, a share between 0 and 1")

    def build(self) -> Albef:
        return Albef(self)


@dataclass(frozen=True)
class _Towers:
    """What the fusion needs of one batch: pictures, and packed states of the clean (then masked, swapped) texts."""

    tokens: Tensor
    rows: Tensor
    segments: Segments
    teacher: _Towers | None = None


class Albef(nn.Module):
    """Encodes pictures and texts, matches pairs, fills masks; ``losses`` is one training step."""

    family = "albef"

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = config.vision.build()
        self.embedding = BertEmbedding(
            config.vocab_size, config.max_length, config.width, config.norm_eps, config.dropout
        )

        def block(cross_width: int | None) -> nn.Module:
            return BlockConfig(
                width=config.width,
                heads=config.heads,
                hidden=config.hidden,
                norm="post",
                norm_eps=config.norm_eps,
                cross_width=cross_width,
                dropout=config.dropout,
            ).build()

        self.text_layers = nn.ModuleList(block(None) for _ in range(config.fusion_layer))
        fusion = range(config.depth - config.fusion_layer)
        self.fusion_layers = nn.ModuleList(block(config.vision.width) for _ in fusion)
        self.mlm_head = MlmHead(config.width, config.vocab_size, config.norm_eps)
        self.image_proj = nn.Linear(config.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.width, config.embed_dim)
        self.itm_head = nn.Linear(config.width, 2)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        _init(self, config.width, config.embedding_std)
        _init(self.vision, config.vision.width, config.embedding_std)
        with torch.no_grad():
            self.vision.positions.mul_(config.embedding_std / 0.02)

    def make_teacher(self) -> MomentumTeacher[Albef]:
        """The momentum copy, with the queue; the trainer keeps it."""
        return MomentumTeacher(self, self.config.teacher, self.config.embed_dim)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the temperature in [0.001, 0.5], as the official pre-training does before each step."""
        self.temperature.clamp_(0.001, 0.5)

    # ---- encoders -------------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> EncodedImages:
        """``(B, 3, H, W)`` uint8 or normalised -> features ``(B, E)`` and tokens ``(B, L, D)``."""
        tokens = self.vision(images)
        return EncodedImages(self._image_features(tokens), tokens)

    def encode_texts(self, texts: TextBatch) -> EncodedTexts:
        """Packed texts -> features ``(N, E)`` and states after the text layers ``(T, D)``."""
        rows = self._text_states(texts)
        return EncodedTexts(self._text_features(rows[texts.segments.starts(rows.device)]), texts.segments, rows)

    def _text_states(self, texts: TextBatch, read: Rows | None = None) -> Tensor:
        rows = self.embedding(texts)
        for layer in self.text_layers[:-1]:
            rows = layer(rows, texts.segments)
        states: Tensor = self.text_layers[-1](rows, texts.segments, read=read)
        return states

    def _image_features(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.image_proj(tokens[:, 0]).float(), dim=-1)

    def _text_features(self, cls: Tensor) -> Tensor:
        return F.normalize(self.text_proj(cls).float(), dim=-1)

    # ---- fusion ---------------------------------------------------------------------------------------------------

    def project_images(self, tokens: Tensor) -> ImageMemory:
        """Keys and values of ``tokens (B, L, D)`` for every fusion layer, once a picture."""
        segments = Segments.equal(tokens.shape[0], tokens.shape[1])
        flat = tokens.flatten(0, 1)
        crosses = (cast(CrossAttention, layer.cross) for layer in self.fusion_layers)
        return ImageMemory(tuple(cross.project(flat) for cross in crosses), segments)

    def fuse(
        self, rows: Tensor, segments: Segments, memory: ImageMemory, texts: Segments, read: Rows | None = None
    ) -> Tensor:
        """Fusion layers over packed text states that lie in the order of their pictures.

        rows: ``(T, D)`` of ``segments``; ``texts.lengths[i]``: how many consecutive texts belong to picture i of
        ``memory``. Returns ``(T, D)``, or the M rows of ``read``: the last layer computes those only.
        """
        last = len(memory.layers) - 1
        for i, (layer, (k, v)) in enumerate(zip(self.fusion_layers, memory.layers, strict=True)):
            seen = Memory(k, v, memory.segments, texts)
            rows = layer(rows, segments, memory=seen, read=read if i == last else None)
        return rows

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

    def fill_masks(self, tokens: Tensor, masked: MaskedTexts, segments: Segments) -> Tensor:
        """MLM logits ``(M, V)`` of the masked rows, text b looking at picture b; tokens ``(B, L, D)``."""
        states = self._text_states(TextBatch(masked.ids, segments))
        read = Rows(masked.rows, Segments(masked.counts))
        one_each = Segments.equal(segments.count, 1)
        return self._mlm_logits(self.fuse(states, segments, self.project_images(tokens), one_each, read))

    def _mlm_logits(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.mlm_head(rows, self.embedding.words.weight)
        return logits

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(
        self, batch: Batch, teacher: MomentumTeacher[Albef] | None = None, feature_grads: Embedded | None = None
    ) -> dict[str, Tensor]:
        return self.losses(batch, teacher, feature_grads)

    def embed(self, batch: Batch, teacher: MomentumTeacher[Albef] | None = None) -> Embedded:
        """Towers of student and teacher: features for the contrast, states for the fusion."""
        teacher = _needed(teacher)
        count = len(batch)
        texts = all_texts(batch, self.config.mlm)  # clean, masked and swapped texts pass the text layers together
        tokens = self.vision(batch.images)
        rows = self._text_states(texts)
        starts = texts.segments.starts(rows.device)
        wrong = batch.swapped is not None and self.config.itc_swapped
        with torch.no_grad():
            theirs = teacher.model._teacher_towers(batch, distils=teacher.alpha > 0)
        return Embedded(
            image=self._image_features(tokens),
            text=self._text_features(rows[starts[:count]]),
            image_ids=batch.image_ids,
            image_m=teacher.model._image_features(theirs.tokens),
            text_m=teacher.model._text_features(theirs.rows[:count]),
            swapped=self._text_features(rows[starts[-count:]]) if wrong else None,
            towers=_Towers(tokens, rows, texts.segments, theirs),
        )

    def _teacher_towers(self, batch: Batch, distils: bool) -> _Towers:
        """Of the clean texts [CLS] only, ``(B, D)``; then, where MLM is distilled, all states of the masked texts."""
        texts = batch.texts
        tokens, segments = self.vision(batch.images), texts.segments
        if batch.masked is None or not distils or not self.config.mlm:
            return _Towers(tokens, self._text_states(texts, Rows.first(segments, tokens.device)), segments)
        both = TextBatch(torch.cat([texts.ids, batch.masked.ids]), segments + segments)
        read = np.concatenate([segments.bounds[:-1], np.arange(segments.total, 2 * segments.total)])
        rows = Rows(upload_index(read, tokens.device), Segments.equal(segments.count, 1) + segments)
        return _Towers(tokens, self._text_states(both, rows), segments)

    def contrast(self, embedded: Embedded, teacher: MomentumTeacher[Albef] | None = None) -> dict[str, Tensor]:
        """The contrastive loss alone, from features (section 3.2, with the soft targets of section 3.3)."""
        return {"itc": self.distilled_itc(embedded, _needed(teacher)).loss} if self.config.itc else {}

    def distilled_itc(self, embedded: Embedded, teacher: MomentumTeacher[Albef]) -> DistilledItc:
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

    def losses(
        self, batch: Batch, teacher: MomentumTeacher[Albef] | None = None, feature_grads: Embedded | None = None
    ) -> dict[str, Tensor]:
        """One training step: ITC, ITM and MLM by one pass of the towers and two of the fusion layers.

        The first fusion pass holds what is known beforehand (positive, masked and swapped texts, side by side at
        their picture); the second the hard negatives, whose numbers reach the host while the first one computes.
        ``feature_grads``: gradients with respect to the features, in place of the contrastive loss.
        """
        embedded = self.embed(batch, teacher)
        losses = self.contrast(embedded, teacher) if feature_grads is None else embedded.surrogate(feature_grads)
        if not (self.config.itm or self.config.mlm):
            return losses
        towers: _Towers = embedded.towers
        negatives = self._draw(embedded, batch.draws) if self.config.itm else None
        memory = self.project_images(towers.tokens)
        plan = lay_out(batch, self.config.itm, self.config.mlm)
        states = towers.rows[upload_index(plan.rows, towers.rows.device)]
        read = Rows(plan.read_index(batch.masked, states.device), plan.read)
        out = self.fuse(states, plan.segments, memory, plan.texts, read)
        if self.config.mlm:
            losses |= self._mlm(out[upload_index(plan.masked, out.device)], batch, towers, _needed(teacher))
        if negatives is not None:
            known = self.itm_head(out[upload_index(plan.matched, out.device)])
            drawn = self._match_negatives(negatives, memory, towers, len(batch))
            losses |= _itm(known, drawn, negatives, len(batch))
        return losses

    def _mlm(self, rows: Tensor, batch: Batch, towers: _Towers, teacher: MomentumTeacher[Albef]) -> dict[str, Tensor]:
        if batch.masked is None:
            raise ValueError("the MLM objective needs masked texts: the loader makes them, or set model.mlm=false")
        soft = None
        if teacher.alpha > 0 and towers.teacher is not None:
            with torch.no_grad():
                soft = teacher.model._soft_labels(towers.teacher, batch.masked)
        return {"mlm": mlm_loss(self._mlm_logits(rows), batch.masked.labels, soft, teacher.alpha)}

    def _soft_labels(self, towers: _Towers, masked: MaskedTexts) -> Tensor:
        """The teacher's logits ``(M, V)``, from the masked texts and the momentum picture tokens."""
        count = towers.segments.count
        read = Rows(masked.rows, Segments(masked.counts))
        memory = self.project_images(towers.tokens)
        rows = self.fuse(towers.rows[count:], towers.segments, memory, Segments.equal(count, 1), read)
        return self._mlm_logits(rows)

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

    def _match_negatives(self, negatives: Negatives, memory: ImageMemory, towers: _Towers, count: int) -> Tensor:
        """ITM logits ``(2B, 2)``: B texts with their negative picture, B pictures with their negative text."""
        mine = np.arange(count)
        segments = Segments(towers.segments.lengths[:count])
        rows = towers.rows[: segments.total]
        if world_size() > 1:
            rows, segments = gather_rows(rows, segments)
            everyone = gather_with_grad(towers.tokens)
        chosen_image, chosen_text = negatives.chosen.numpy()
        if world_size() > 1:  # this rank's pictures come first in the memory, then the foreign ones that were drawn
            first = rank() * count
            foreign = np.setdiff1d(chosen_image, first + mine)
            memory = join_memories(memory, self.project_images(everyone[upload_index(foreign, rows.device)]))
            place = {int(n): count + i for i, n in enumerate(foreign)} | {first + i: i for i in range(count)}
            chosen_image = np.array([place[int(n)] for n in chosen_image])
            own_texts = first + mine
        else:
            own_texts = mine
        pictures, texts = np.concatenate([chosen_image, mine]), np.concatenate([own_texts, chosen_text])
        return self._match(memory, rows, segments, pictures, texts)


def _needed(teacher: MomentumTeacher[Albef] | None) -> MomentumTeacher[Albef]:
    if teacher is None:
        raise ValueError("ALBEF trains with its momentum teacher: pass model.make_teacher()")
    return teacher


def _itm(known: Tensor, drawn: Tensor, negatives: Negatives, count: int) -> dict[str, Tensor]:
    """ITM over B positives and the swapped texts (``known``), then the 2B hard negatives (``drawn``)."""
    logits = torch.cat([known, drawn])
    labels = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    labels[:count] = 1
    counted = torch.ones_like(labels, dtype=torch.bool)
    counted[known.shape[0] :] = negatives.exist
    accuracy = (logits.argmax(1) == labels).float().mean()
    return {"itm": itm_loss(logits, labels, counted), "metric/itm_accuracy": accuracy.detach()}


def _init(module: nn.Module, width: int, embedding_std: float) -> None:
    """Linear layers and embeddings normal, biases zero. At width 768 the deviation of layers is 0.02 (BERT, DeiT);
    smaller models start in proportion to 1 / sqrt(width), with activations of the same size."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02 * math.sqrt(768 / width))
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=embedding_std)


def albef_base() -> AlbefConfig:
    """The published model: 209.9 M parameters."""
    return AlbefConfig()


def albef_small() -> AlbefConfig:
    """4.9 M parameters (4,000 words), for thousands of real photographs and CPUs."""
    return AlbefConfig(
        vision=VitConfig(image=ImageInput(80), patch=16, width=192, depth=4, heads=3),
        vocab_size=4000,
        max_length=64,
        width=192,
        depth=4,
        fusion_layer=2,
        heads=3,
        hidden=768,
        dropout=0.0,
        embed_dim=128,
        teacher=TeacherConfig(queue_size=1024),
    )


def albef_tiny() -> AlbefConfig:
    """For tests and the quickstart: seconds on one core."""
    return AlbefConfig(
        vision=VitConfig(image=ImageInput(48), patch=8, width=64, depth=3, heads=4),
        vocab_size=500,
        max_length=48,
        width=64,
        depth=4,
        fusion_layer=2,
        heads=4,
        hidden=256,
        dropout=0.0,
        embed_dim=64,
        teacher=TeacherConfig(queue_size=1024),
    )


CONFIGS = {"albef-base": albef_base, "albef-small": albef_small, "albef-tiny": albef_tiny}
