"""ALBEF (Li et al. 2021, "Align before Fuse"): a vision Transformer, a text Transformer and a fusion Transformer.

picture -> ViT-12 ------------------------> tokens --+--------------------------> ITC
text    -> BERT layers 0-5 -> states ----------------|--> BERT layers 6-11 -----> ITM, MLM
                                                     +--> (cross-attention)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from imglish.data.batch import Batch, MaskedTexts, TextBatch
from imglish.models.aligned import AlignedConfig, AlignedFusion, init_all, itm_losses
from imglish.models.capabilities import Embedded, EncodedTexts
from imglish.models.pairing import all_texts, lay_out
from imglish.models.vit import ImageInput, VitConfig
from imglish.nn.embed import BertEmbedding, MlmHead
from imglish.nn.segments import Rows, Segments, upload_index
from imglish.objectives.mlm import mlm_loss
from imglish.objectives.momentum import MomentumTeacher, TeacherConfig


@dataclass(frozen=True)
class AlbefConfig(AlignedConfig):
    """Sizes and objectives; the defaults are the published model (ViT-B/16 at 256 px, BERT-base split 6/6).

    fusion_layer: text layers before the fusion; mlm: whether it is trained; the rest: see :class:`AlignedConfig`.
    """

    vision: VitConfig = field(default_factory=lambda: VitConfig(image=ImageInput(256)))
    fusion_layer: int = 6
    mlm: bool = True

    family: ClassVar[str] = "albef"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fusion_layer < self.depth:
            raise ValueError(f"fusion_layer {self.fusion_layer} must lie between 1 and depth - 1 = {self.depth - 1}")

    def build(self) -> Albef:
        return Albef(self)


@dataclass(frozen=True)
class _Towers:
    """What the fusion needs of one batch: pictures, and packed states of the clean (then masked, swapped) texts."""

    tokens: Tensor
    rows: Tensor
    segments: Segments
    teacher: _Towers | None = None


class Albef(AlignedFusion):
    """Encodes pictures and texts, matches pairs, fills masks; ``losses`` is one training step."""

    family = "albef"
    config: AlbefConfig

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = config.vision.build()
        self.embedding = BertEmbedding(
            config.vocab_size, config.max_length, config.width, config.norm_eps, config.dropout
        )
        fusion = range(config.depth - config.fusion_layer)
        self.text_layers = nn.ModuleList(config.text_block(cross=False) for _ in range(config.fusion_layer))
        self.fusion_layers = nn.ModuleList(config.text_block(cross=True) for _ in fusion)
        self.mlm_head = MlmHead(config.width, config.vocab_size, config.norm_eps)
        self.image_proj = nn.Linear(config.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.width, config.embed_dim)
        self.itm_head = nn.Linear(config.width, 2)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        init_all(self)

    # ---- encoders -------------------------------------------------------------------------------------------------

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

    # ---- fusion ---------------------------------------------------------------------------------------------------

    def fusing(self) -> Iterable[nn.Module]:
        return self.fusion_layers

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

    def embed(self, batch: Batch, teacher: MomentumTeacher[Albef] | None = None) -> Embedded:
        """Towers of student and teacher: features for the contrast, states for the fusion."""
        teacher = self._needed(teacher)
        count = len(batch)
        texts = all_texts(batch, self.config.mlm)  # clean, masked and swapped texts pass the text layers together
        tokens = self.vision(batch.squares)
        rows = self._text_states(texts)
        starts = texts.segments.starts(rows.device)
        wrong = batch.swapped is not None and self.config.itc_swapped
        with torch.no_grad():
            theirs = teacher.model._teacher_towers(batch, distils=teacher.alpha > 0)
        return Embedded(
            image=self._image_features(tokens[:, 0]),
            text=self._text_features(rows[starts[:count]]),
            image_ids=batch.image_ids,
            image_m=teacher.model._image_features(theirs.tokens[:, 0]),
            text_m=teacher.model._text_features(theirs.rows[:count]),
            swapped=self._text_features(rows[starts[-count:]]) if wrong else None,
            towers=_Towers(tokens, rows, texts.segments, theirs),
        )

    def _teacher_towers(self, batch: Batch, distils: bool) -> _Towers:
        """Of the clean texts [CLS] only, ``(B, D)``; then, where MLM is distilled, all states of the masked texts."""
        texts = batch.texts
        tokens, segments = self.vision(batch.squares), texts.segments
        if batch.masked is None or not distils or not self.config.mlm:
            return _Towers(tokens, self._text_states(texts, Rows.first(segments, tokens.device)), segments)
        both = TextBatch(torch.cat([texts.ids, batch.masked.ids]), segments + segments)
        read = np.concatenate([segments.bounds[:-1], np.arange(segments.total, 2 * segments.total)])
        rows = Rows(upload_index(read, tokens.device), Segments.equal(segments.count, 1) + segments)
        return _Towers(tokens, self._text_states(both, rows), segments)

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
            losses |= self._mlm(out[upload_index(plan.masked, out.device)], batch, towers, self._needed(teacher))
        if negatives is not None:
            known = self.itm_head(out[upload_index(plan.matched, out.device)])
            clean = batch.texts.segments
            drawn = self._match_negatives(negatives, memory, towers.tokens, towers.rows[: clean.total], clean)
            losses |= itm_losses(torch.cat([known, drawn]), negatives)
        return losses

    def _mlm(self, rows: Tensor, batch: Batch, towers: _Towers, teacher: MomentumTeacher[Albef]) -> dict[str, Tensor]:
        if batch.masked is None:
            raise ValueError("the MLM objective needs masked texts: the loader makes them, or set model.mlm=false")
        soft = None
        if teacher.alpha > 0 and towers.teacher is not None:
            with torch.no_grad():
                soft = teacher.model._soft_labels(towers.teacher, batch.masked)
        masked, count = batch.masked, batch.mean(lambda b: b.masked_words)
        return {"mlm": mlm_loss(self._mlm_logits(rows), masked.labels, soft, teacher.alpha, count)}

    def _soft_labels(self, towers: _Towers, masked: MaskedTexts) -> Tensor:
        """The teacher's logits ``(M, V)``, from the masked texts and the momentum picture tokens."""
        count = towers.segments.count
        read = Rows(masked.rows, Segments(masked.counts))
        memory = self.project_images(towers.tokens)
        rows = self.fuse(towers.rows[count:], towers.segments, memory, Segments.equal(count, 1), read)
        return self._mlm_logits(rows)


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
