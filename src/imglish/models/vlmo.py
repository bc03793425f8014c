"""VLMo (Bao et al. 2022, "VLMo: Unified Vision-Language Pre-Training with Mixture-of-Modality-Experts").

One Transformer, three ways to use it; attention is shared, feed-forwards are experts of the modality (V, L) or of the
pair (VL, on top):

    picture alone   V V V V V V V V V V V V ----------------> ITC     once more with VL on top -> ITC
    text alone      L L L L L L L L L L L L ----------------> ITC     once more with VL on top -> ITC
    pair            [V+L] x 10 ............ VL VL ----------> ITM, MLM

Before pairs it is trained on pictures alone (:mod:`imglish.models.beit`) and on texts alone (section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import Batch, MaskedTexts, TextBatch
from imglish.models.aligned import itm_losses
from imglish.models.capabilities import Embedded, EncodedImages, EncodedTexts, ImageMemory
from imglish.models.expert_sizes import HALF
from imglish.models.hard_pairs import draw_pairs, pooled_negatives
from imglish.models.pairing import Negatives
from imglish.models.vit import ImageInput
from imglish.models.vlmo_body import VlmoBody, VlmoSizes
from imglish.nn.embed import MlmHead
from imglish.nn.packing import NONE, Packing, Read
from imglish.nn.segments import Segments
from imglish.objectives.itc import itc_loss, itc_loss_of_own_features
from imglish.objectives.mlm import mlm_loss


@dataclass(frozen=True)
class VlmoConfig(VlmoSizes):
    """Sizes and objectives; the defaults are the published base model.

    itc, itm, mlm: which objectives are trained; itc_fused: ITC also from features that passed the VL experts (as in the
    official code; the paper names the first form only); mlm_weight: factor of MLM beside the others; hard_negatives:
    share of ITM negatives drawn by similarity; own_features_only: contrast other ranks' features without their
    gradient, as the official code does, so that its strength depends on the number of ranks; for comparison only.
    """

    embed_dim: int = 768
    temperature: float = 0.07
    itc: bool = True
    itc_fused: bool = True
    itm: bool = True
    mlm: bool = True
    mlm_weight: float = 0.25
    hard_negatives: float = 1.0
    own_features_only: bool = False

    family: ClassVar[str] = "vlmo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.hard_negatives <= 1:
            raise ValueError(f"hard_negatives is {self.hard_negatives}, a share between 0 and 1")
        if self.itc_fused and not (self.itc and self.fused_layers):
            raise ValueError("itc_fused needs itc and at least one of fused_layers")

    def build(self) -> Vlmo:
        return Vlmo(self)


@dataclass(frozen=True)
class _Towers:
    """Input rows of the batch's pictures ``(B, L, D)`` and of its texts ``(T, D)``, which the pairs begin with."""

    tokens: Tensor
    rows: Tensor


class Vlmo(VlmoBody):
    """Encodes pictures and texts, matches pairs, fills masks; ``losses`` is one training step."""

    family = "vlmo"
    config: VlmoConfig

    def __init__(self, config: VlmoConfig) -> None:
        super().__init__(config)
        width = config.width
        if config.mlm:
            self.mlm_head = MlmHead(width, config.vocab_size, config.text_norm_eps)
            self.mlm_words = nn.Linear(width, config.vocab_size, bias=False)
        if config.itm:
            self.pooler = nn.Linear(width, width)
            self.itm_head = nn.Linear(width, 2)
        if config.itc:
            self.image_proj = nn.Linear(width, config.embed_dim, bias=False)
            self.text_proj = nn.Linear(width, config.embed_dim, bias=False)
            self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        if config.itc_fused:
            self.image_proj_fused = nn.Linear(width, config.embed_dim, bias=False)
            self.text_proj_fused = nn.Linear(width, config.embed_dim, bias=False)
            self.logit_scale_fused = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        self.init()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the logit scales at most 100, as CLIP does; officially they may grow without limit."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("logit_scale"):
                parameter.clamp_(max=math.log(100))

    # ---- towers and pairs -------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> EncodedImages:
        """``(B, 3, H, W)`` uint8 or normalised -> features ``(B, E)`` and input rows ``(B, L, D)`` for matching."""
        self._needs(self.config.itc, "ITC")
        tokens = self.picture_rows(images)
        packing = Packing(image=Segments.equal(tokens.shape[0], tokens.shape[1]))
        cls = self.transform(tokens.flatten(0, 1), packing, Read.first(packing, tokens.device))
        return EncodedImages(_features(self.image_proj, cls), tokens)

    def encode_texts(self, texts: TextBatch) -> EncodedTexts:
        """Packed texts -> features ``(N, E)`` and input rows ``(T, D)`` for matching."""
        self._needs(self.config.itc, "ITC")
        rows, packing = self.text_rows(texts), Packing(text=texts.segments)
        cls = self.transform(rows, packing, Read.first(packing, rows.device))
        return EncodedTexts(_features(self.text_proj, cls), texts.segments, rows)

    def match(
        self, memory: ImageMemory, texts: EncodedTexts, image_index: Sequence[int], text_index: Sequence[int]
    ) -> Tensor:
        """ITM logits ``(P, 2)``, column 1 = matched, of pairs of a picture of ``memory`` and one of ``texts``."""
        self._needs(self.config.itm, "ITM")
        return self._itm_logits(self.pooled(memory, texts, image_index, text_index))

    def fill_masks(self, tokens: Tensor, masked: MaskedTexts, segments: Segments) -> Tensor:
        """MLM logits ``(M, V)`` of the masked rows, text b beside picture b; tokens: input rows ``(B, L, D)``."""
        rows = self.text_rows(TextBatch(masked.ids, segments))
        return self._mlm_logits(self.read_pairs(tokens, rows, segments, segments.count, masked.rows, masked.counts))

    def fill_text_masks(self, masked: MaskedTexts, segments: Segments) -> Tensor:
        """MLM logits ``(M, V)`` of the masked rows of texts alone."""
        rows = self.text_rows(TextBatch(masked.ids, segments))
        read = Read(masked.rows, Packing(text=Segments(masked.counts)))
        return self._mlm_logits(self.transform(rows, Packing(text=segments), read))

    def _needs(self, has: bool, objective: str) -> None:
        if not has:
            raise ValueError(f"this VLMo was built without {objective}, so it has no head for it")

    def _itm_logits(self, cls: Tensor) -> Tensor:
        logits: Tensor = self.itm_head(torch.tanh(self.pooler(cls)))
        return logits

    def _mlm_logits(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.mlm_head(rows, self.mlm_words.weight)
        return logits

    # ---- training ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, teacher: None = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]:
        return self.losses(batch, teacher, feature_grads)

    def embed(self, batch: Batch, teacher: None = None) -> Embedded:
        """Pictures and texts on their own, in one packed pass; features of both forms of ITC lie side by side:
        ``(B, 2 E)`` with ``itc_fused``, else ``(B, E)``; ``(B, 0)`` without ITC or pictures."""
        if not (self.config.itc and batch.has_images):
            nothing = torch.zeros(len(batch), 0, device=batch.image_ids.device)
            towers = (
                _Towers(self.picture_rows(batch.squares), self.text_rows(batch.texts)) if batch.has_images else None
            )
            return Embedded(nothing, nothing, batch.image_ids, towers=towers)
        pictures, rows = self.picture_rows(batch.squares), self.text_rows(batch.texts)
        cls = self.towers(pictures, rows, batch.texts.segments, self.config.itc_fused)
        image, text = _features(self.image_proj, cls[0]), _features(self.text_proj, cls[-1])
        if self.config.itc_fused:
            image = torch.cat([image, _features(self.image_proj_fused, cls[1])], dim=1)
            text = torch.cat([text, _features(self.text_proj_fused, cls[2])], dim=1)
        return Embedded(image, text, batch.image_ids, towers=_Towers(pictures, rows))

    def contrast(self, embedded: Embedded, teacher: None = None) -> dict[str, Tensor]:
        """ITC, the mean of its two forms (section 3.2)."""
        if not embedded.image.shape[1]:
            return {}
        loss = itc_loss_of_own_features if self.config.own_features_only else itc_loss
        width = self.config.embed_dim
        scales = [self.logit_scale, *([self.logit_scale_fused] if self.config.itc_fused else [])]
        forms = zip(embedded.image.split(width, 1), embedded.text.split(width, 1), scales, strict=True)
        each = [loss(image, text, scale.exp(), embedded.image_ids) for image, text, scale in forms]
        return {"itc": torch.stack(each).mean()}

    def losses(self, batch: Batch, teacher: None = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]:
        """One training step in three packed passes without a padded token: pictures and texts alone; the pairs known
        beforehand (positive, swapped, masked); the hard negatives, whose numbers reach the host meanwhile.

        A batch of texts alone gives the MLM of the second stage, with full weight. ``feature_grads``: gradients with
        respect to the features, in place of the contrastive loss.
        """
        if not batch.has_images:
            return {"mlm": self._text_loss(batch)}
        embedded = self.embed(batch)
        losses = self.contrast(embedded) if feature_grads is None else embedded.surrogate(feature_grads)
        negatives = self._draw(embedded, batch.draws) if self.config.itm else None
        known, filled = self._known_pairs(batch, embedded.towers)
        if self.config.mlm:
            assert batch.masked is not None
            count = batch.mean(lambda b: b.masked_words)
            loss = mlm_loss(self._mlm_logits(filled), batch.masked.labels, count=count)
            losses |= {"mlm": self.config.mlm_weight * loss}
        if negatives is not None:
            drawn = self._negative_pairs(negatives, batch, embedded.towers)
            losses |= itm_losses(self._itm_logits(torch.cat([known, drawn])), negatives)
        return losses

    def _text_loss(self, batch: Batch) -> Tensor:
        if batch.masked is None or not self.config.mlm:
            raise ValueError("a batch of texts alone is trained by MLM: it needs masked texts and model.mlm=true")
        logits = self.fill_text_masks(batch.masked, batch.texts.segments)
        return mlm_loss(logits, batch.masked.labels, count=batch.mean(lambda b: b.masked_words))

    def _known_pairs(self, batch: Batch, towers: _Towers) -> tuple[Tensor, Tensor]:
        """[CLS] of the clean and of the swapped texts beside their picture, and the masked rows of the masked texts."""
        count, device = len(batch), towers.rows.device
        rows, segments, index = [], NONE, []
        counts: tuple[int, ...] = ()
        if self.config.itm:
            rows, segments = [towers.rows], batch.texts.segments
            if batch.swapped is not None:
                rows, segments = [*rows, self.text_rows(batch.swapped)], segments + batch.swapped.segments
            index, counts = [segments.starts(device)], (1,) * segments.count
        matched = segments.count
        if self.config.mlm:
            if batch.masked is None:
                raise ValueError("the MLM objective needs masked texts: the loader makes them, or set model.mlm=false")
            index.append(batch.masked.rows + segments.total)
            rows.append(self.text_rows(TextBatch(batch.masked.ids, batch.texts.segments)))
            segments, counts = segments + batch.texts.segments, counts + batch.masked.counts
        if not rows:
            return towers.rows[:0], towers.rows[:0]
        out = self.read_pairs(towers.tokens, torch.cat(rows), segments, count, torch.cat(index), counts)
        return out[:matched], out[matched:]

    def _draw(self, embedded: Embedded, draws: Tensor) -> Negatives:
        """One hard negative text a picture and picture a text, over the batch of all ranks, by ITC similarity."""
        if not self.config.itc:
            nothing = torch.ones((), device=draws.device)
            return draw_pairs(embedded.image, embedded.text, nothing, embedded.image_ids, draws, share=0.0)
        image, text = (x[:, : self.config.embed_dim] for x in (embedded.image, embedded.text))
        share = self.config.hard_negatives
        return draw_pairs(image, text, self.logit_scale.exp(), embedded.image_ids, draws, share)

    def _negative_pairs(self, negatives: Negatives, batch: Batch, towers: _Towers) -> Tensor:
        """[CLS] ``(2B, D)``: B texts with their negative picture, B pictures with their negative text."""
        return pooled_negatives(self, negatives, batch, towers.tokens, towers.rows)


def _features(projection: nn.Module, cls: Tensor) -> Tensor:
    return F.normalize(projection(cls).float(), dim=-1)


def vlmo_base() -> VlmoConfig:
    """The published base model: 12 layers, VL experts in the last 2."""
    return VlmoConfig()


def vlmo_base_plus() -> VlmoConfig:
    """Published: 24 narrow layers, absolute positions, no LayerScale."""
    return VlmoConfig(
        width=544,
        depth=24,
        heads=16,
        hidden=2176,
        fused_layers=3,
        positions="absolute",
        layer_scale=None,
        embed_dim=544,
    )


def vlmo_large() -> VlmoConfig:
    """Published: 24 layers, VL experts in the last 3."""
    return VlmoConfig(width=1024, depth=24, heads=16, hidden=4096, fused_layers=3, embed_dim=1024)


def vlmo_small() -> VlmoConfig:
    """For thousands of real photographs and CPUs: 4 layers of width 192 at 80 pixels."""
    return VlmoConfig(
        image=ImageInput(80, HALF, HALF),
        vocab_size=4000,
        max_length=64,
        text_distances=64,
        width=192,
        depth=4,
        heads=3,
        hidden=768,
        fused_layers=1,
        drop_path=0.0,
        embed_dim=128,
    )


def vlmo_tiny() -> VlmoConfig:
    """For tests: seconds on one core."""
    return VlmoConfig(
        image=ImageInput(48, HALF, HALF),
        patch=8,
        vocab_size=500,
        max_length=48,
        text_distances=48,
        width=64,
        depth=4,
        heads=4,
        hidden=256,
        fused_layers=2,
        drop_path=0.0,
        embed_dim=64,
    )


CONFIGS = {
    "vlmo-base": vlmo_base,
    "vlmo-base-plus": vlmo_base_plus,
    "vlmo-large": vlmo_large,
    "vlmo-small": vlmo_small,
    "vlmo-tiny": vlmo_tiny,
}
