"""BEiT-3 (Wang et al. 2023, "Image as a Foreign Language"): one Multiway Transformer, one task, masked data modelling.

    pictures alone   [MASK] patches -----------> codes of a visual tokenizer
    texts alone      [MASK] tokens ------------> the tokens
    pairs            both, side by side -------> both, each with the help of the other

All three kinds lie in one buffer of tokens and pass the layers together. As published the layers are ``released``
(attention, norms and feed-forward of each modality apart; sub-LayerNorm), in the paper they share the attention and
have vision-language experts on top: two settings of :class:`imglish.models.multiway.MultiwayConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import Batch, PatchMasks, TextBatch
from imglish.models.aligned import itm_losses
from imglish.models.beit import token_rows
from imglish.models.capabilities import Embedded, EncodedImages, EncodedTexts, ImageMemory
from imglish.models.captioning import CaptionForm, CaptionState
from imglish.models.expert_sizes import HALF
from imglish.models.hard_pairs import draw_pairs, pooled_negatives
from imglish.models.multiway import Multiway, MultiwayConfig, init_multiway
from imglish.models.multiway_captions import masked_states, next_states, picture_memory
from imglish.models.visual_codes import CodeTeacher
from imglish.models.vit import ImageInput
from imglish.nn.packing import Packing, Read
from imglish.nn.segments import Segments
from imglish.objectives.codes import mim_loss
from imglish.objectives.itc import itc_loss
from imglish.objectives.mlm import mlm_loss, smoothed_mlm_loss

Output = Literal["mlm", "mim", "itc", "itm"]


@dataclass(frozen=True)
class Beit3Config(MultiwayConfig):
    """Sizes of the body, heads and objective.

    outputs: which heads exist: over words, over visual codes, projections for the contrast, a matching head (not of the
    published model, which retrieves by its towers alone); objective: what ``losses`` trains: masked data modelling
    ("mdm"), the contrast ("itc"), with "itm" among the outputs also the matching of pairs with hard negatives, or
    captioning by masked tokens ("captions"). hard_negatives: share of these drawn by similarity. codes:
    vocabulary of the visual tokenizer; mask_id: the token [MASK], which captions are decoded by; label_smoothing: of
    captioning; drop_worst: share of the masked tokens of a captioning batch whose loss is largest, left out
    (fine-tuning drops 0.2 of them late, against wrong captions).
    """

    codes: int = 8192
    mask_id: int = 64001
    outputs: tuple[Output, ...] = ("mlm", "mim", "itc")
    objective: Literal["mdm", "itc", "captions"] = "mdm"
    temperature: float = 0.07
    hard_negatives: float = 1.0
    label_smoothing: float = 0.1
    drop_worst: float = 0.0

    family: ClassVar[str] = "beit3"

    @property
    def mlm(self) -> bool:
        """Whether the objective needs masked texts."""
        return self.objective != "itc"

    @property
    def mim(self) -> bool:
        """Whether the objective needs masked patches."""
        return self.objective == "mdm"

    @property
    def retrieves(self) -> bool:
        """Whether the objective aligns pictures and texts, so that recalls say what was learned."""
        return self.objective == "itc"

    @property
    def masks_end(self) -> bool:
        """Whether the closing token is masked and predicted too: how captions learn to end."""
        return self.objective == "captions"

    @property
    def closing_token(self) -> bool:
        """Whether texts have to end with a closing token."""
        return self.objective == "captions"

    @property
    def takes_unpaired(self) -> bool:
        """Masked data modelling also learns from pictures alone and texts alone."""
        return self.objective == "mdm"

    @property
    def several_captions(self) -> bool:
        """Captioning reads a picture once for all its captions."""
        return self.objective == "captions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop_worst < 1:
            raise ValueError(f"drop_worst is {self.drop_worst}, a share between 0 and 1")
        needed: dict[str, tuple[Output, ...]] = {"mdm": ("mlm", "mim"), "itc": ("itc",), "captions": ("mlm",)}
        if lacking := [head for head in needed[self.objective] if head not in self.outputs]:
            raise ValueError(f"objective {self.objective} needs the heads {', '.join(lacking)}: add them to outputs")
        if not 0 <= self.hard_negatives <= 1:
            raise ValueError(f"hard_negatives is {self.hard_negatives}, a share between 0 and 1")

    def build(self) -> Beit3:
        return MatchingBeit3(self) if "itm" in self.outputs else Beit3(self)


class Beit3(nn.Module):
    """Encodes pictures and texts, fills masks of both, writes captions; ``losses`` is one training step."""

    family = "beit3"

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.body = Multiway(config)
        self.mlm_head = nn.Linear(width, config.vocab_size) if "mlm" in config.outputs else None
        self.mim_head = nn.Linear(width, config.codes) if "mim" in config.outputs else None
        self.image_proj = nn.Linear(width, width, bias=False) if "itc" in config.outputs else None
        self.text_proj = nn.Linear(width, width, bias=False) if "itc" in config.outputs else None
        self.logit_scale = (
            nn.Parameter(torch.tensor(-math.log(config.temperature))) if "itc" in config.outputs else None
        )
        for head in (self.mlm_head, self.mim_head, self.image_proj, self.text_proj):
            if head is not None:
                init_multiway(head, width)

    @property
    def learns_from(self) -> str | None:
        """What ``targets`` of a recipe has to name: masked data modelling predicts codes of a visual tokenizer."""
        return "a visual tokenizer (dvae, vqkd)" if self.config.objective == "mdm" else None

    def make_teacher(self, tokenizer: nn.Module | None = None) -> CodeTeacher | None:
        """The frozen visual tokenizer whose codes are to be predicted; None for the other objectives."""
        return CodeTeacher(tokenizer, self.config.codes) if self.config.objective == "mdm" else None

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the logit scale at most 100, as CLIP does."""
        if self.logit_scale is not None:
            self.logit_scale.clamp_(max=math.log(100))

    # ---- encoders -------------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> EncodedImages:
        """``(B, 3, H, W)`` uint8 or normalised -> features ``(B, D)`` (``(B, 0)`` without the heads for the contrast)
        and input rows ``(B, L, D)``, with which pairs and captions begin."""
        tokens = self.body.picture_rows(images)
        if self.image_proj is None:
            return EncodedImages(tokens.new_zeros(len(tokens), 0), tokens)
        packing = Packing(image=Segments.equal(tokens.shape[0], tokens.shape[1]))
        states = self.body.transform(tokens.flatten(0, 1), packing, Read.first(packing, tokens.device))
        return EncodedImages(_features(self.image_proj, states), tokens)

    def encode_texts(self, texts: TextBatch) -> EncodedTexts:
        """Packed texts -> features ``(N, D)`` (``(N, 0)`` without the heads for the contrast) and input rows."""
        rows = self.body.text_rows(texts)
        if self.text_proj is None:
            return EncodedTexts(rows.new_zeros(len(texts), 0), texts.segments, rows)
        packing = Packing(text=texts.segments)
        states = self.body.transform(rows, packing, Read.first(packing, rows.device))
        return EncodedTexts(_features(self.text_proj, states), texts.segments, rows)

    def encode_pairs(self, images: Tensor, texts: TextBatch) -> Tensor:
        """Picture b beside text b: states of the class token and of the text's first token, ``(B, 2, D)``."""
        return self.body.pairs(self.body.picture_rows(images), self.body.text_rows(texts), texts.segments)

    # ---- captions -------------------------------------------------------------------------------------------------

    def caption_form(self) -> CaptionForm:
        """One position is kept for the [MASK] behind the last token."""
        return CaptionForm(longest=self.config.max_length - 1)

    def start_captions(self, images: EncodedImages, room: int) -> CaptionState:
        """The pictures pass the layers here, once; what texts look at later are their keys and values."""
        assert isinstance(images.tokens, Tensor)
        memory = picture_memory(self.body, images.tokens)
        return CaptionState.begin(memory, len(memory.layers), room + 1)

    def continue_captions(self, state: CaptionState, texts: TextBatch) -> Tensor:
        """Append ``texts`` and a [MASK] to each sequence; logits ``(N, V)`` of the [MASK], which is then forgotten."""
        assert self.mlm_head is not None
        logits: Tensor = self.mlm_head(next_states(self.body, state, texts, self.config.mask_id))
        return logits

    def fill_caption_masks(
        self, images: Tensor, texts: TextBatch, index: Tensor, counts: tuple[int, ...], captions: int = 1
    ) -> Tensor:
        """Logits over words ``(M, V)`` where captions are masked, texts causal, pictures seeing pictures only.

        texts: ``captions`` of them for each picture, tokens masked; index, counts: the M rows to be predicted. The
        picture passes the layers once for all its captions.
        """
        assert self.mlm_head is not None
        pictures = self.body.picture_rows(images)
        logits: Tensor = self.mlm_head(masked_states(self.body, pictures, texts, index, counts, captions))
        return logits

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(
        self, batch: Batch, teacher: CodeTeacher | None = None, feature_grads: Embedded | None = None
    ) -> dict[str, Tensor]:
        return self.losses(batch, teacher, feature_grads)

    def losses(
        self, batch: Batch, teacher: CodeTeacher | None = None, feature_grads: Embedded | None = None
    ) -> dict[str, Tensor]:
        """One training step of the configured objective. ``feature_grads``: gradients with respect to the features,
        in place of the contrastive loss."""
        if self.config.objective == "mdm":
            return self._masked_data(batch, teacher)
        if self.config.objective == "captions":
            return self._captions(batch)
        embedded = self.embed(batch)
        return self.contrast(embedded) if feature_grads is None else embedded.surrogate(feature_grads)

    def embed(self, batch: Batch, teacher: CodeTeacher | None = None) -> Embedded:
        """Features of pictures and texts, in one packed pass; ``(B, 0)`` where the objective is another one."""
        if self.config.objective != "itc":
            nothing = torch.zeros(len(batch), 0, device=batch.image_ids.device)
            return Embedded(nothing, nothing, batch.image_ids)
        assert self.image_proj is not None
        assert self.text_proj is not None
        pictures, rows = self.body.picture_rows(batch.squares), self.body.text_rows(batch.texts)
        packing = Packing(image=Segments.equal(*pictures.shape[:2]), text=batch.texts.segments)
        given, rows = rows, torch.cat([pictures.flatten(0, 1), rows])
        states = self.body.transform(rows, packing, Read.first(packing, rows.device))
        image, text = states.split([len(pictures), len(batch.texts)])
        features = _features(self.image_proj, image), _features(self.text_proj, text)
        return Embedded(*features, batch.image_ids, towers=(pictures, given))

    def contrast(self, embedded: Embedded, teacher: CodeTeacher | None = None) -> dict[str, Tensor]:
        """Contrast of pictures and texts over the batch of all ranks, the stage between pre-training and retrieval."""
        if self.config.objective != "itc" or self.logit_scale is None:
            return {}
        scale = self.logit_scale.exp()
        loss = itc_loss(embedded.image, embedded.text, scale, embedded.image_ids)
        return {"itc": loss, "metric/logit_scale": scale.detach()}

    def _masked_data(self, batch: Batch, teacher: CodeTeacher | None) -> dict[str, Tensor]:
        """Masked data modelling (section 2.2): pictures, texts and pairs in one buffer, one pass, masked rows read.

        The pairs come with masks of both sides; ``batch.unpaired`` may add pictures and texts alone.
        """
        if teacher is None or batch.patches is None or batch.masked is None:
            raise ValueError("masked data modelling needs a tokenizer's codes, masked patches and masked texts")
        assert self.mim_head is not None
        assert self.mlm_head is not None
        alone, images, patches = batch.unpaired, batch.squares, batch.patches
        ids, index = [batch.masked.ids], [batch.masked.rows]
        none = Segments(())
        words, word_counts, extra = none, none, none
        if alone is not None:
            images, patches = torch.cat([alone.images, images]), _joined(alone.patches, patches)
            words, word_counts = alone.texts.segments, Segments(alone.masked.counts)
            ids.append(alone.masked.ids)
            index.append(alone.masked.rows + batch.texts.segments.total)
            extra = Segments.equal(len(alone.images), self.config.tokens)
        fused = Segments.equal(len(batch), self.config.tokens)
        packing = Packing(extra, fused, batch.texts.segments, words)
        pictures = self.body.picture_rows(images, patches).flatten(0, 1)
        texts = self.body.text_rows(TextBatch(torch.cat(ids), batch.texts.segments + words))
        read = Read(
            torch.cat([token_rows(patches), torch.cat(index) + pictures.shape[0]]),
            Packing(
                Segments(patches.counts[: extra.count]),
                Segments(patches.counts[extra.count :]),
                Segments(batch.masked.counts),
                word_counts,
            ),
        )
        states = self.body.transform(torch.cat([pictures, texts]), packing, read)
        sizes = [stretch.total for stretch in read.packing.stretches]
        on_codes = self.mim_head(states[: sizes[0] + sizes[1]])
        on_words = self.mlm_head(states[sizes[0] + sizes[1] :])
        codes = teacher.codes(images, (self.config.grid, self.config.grid)).flatten()[patches.rows]
        losses = {
            "pair_mim": mim_loss(on_codes[sizes[0] :], codes[sizes[0] :], batch.mean(lambda b: b.masked_patches)),
            "pair_mlm": mlm_loss(on_words[: sizes[2]], batch.masked.labels, count=batch.mean(lambda b: b.masked_words)),
            "metric/mim_accuracy": (on_codes.argmax(1) == codes).float().mean().detach(),
        }
        if alone is not None:
            count = batch.mean(lambda b: b.masked_alone[0])
            losses["mim"] = mim_loss(on_codes[: sizes[0]], codes[: sizes[0]], count)
            count = batch.mean(lambda b: b.masked_alone[1])
            losses["mlm"] = mlm_loss(on_words[sizes[2] :], alone.masked.labels, count=count)
        return losses

    def _captions(self, batch: Batch) -> dict[str, Tensor]:
        if batch.masked is None:
            raise ValueError("captioning is learned from masked texts: the loader makes them")
        masked, config = batch.masked, self.config
        texts = TextBatch(masked.ids, batch.texts.segments)
        logits = self.fill_caption_masks(batch.squares, texts, masked.rows, masked.counts, batch.captions)
        accuracy = (logits.argmax(1) == masked.labels).float().mean()
        count = batch.mean(lambda b: b.masked_words)
        loss = smoothed_mlm_loss(logits, masked.labels, config.label_smoothing, config.drop_worst, count)
        return {"caption": loss, "metric/caption_accuracy": accuracy.detach()}


class MatchingBeit3(Beit3):
    """With a head that says whether a picture and a text belong together: towers recall, pairs rerank."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__(config)
        self.itm_head = nn.Linear(2 * config.width, 2)
        init_multiway(self.itm_head, config.width)

    def project_images(self, tokens: Tensor) -> ImageMemory:
        """The input rows ``tokens (B, L, D)`` themselves: pairs are read from the first layer on."""
        return self.body.project_images(tokens)

    def match(
        self, memory: ImageMemory, texts: EncodedTexts, image_index: Sequence[int], text_index: Sequence[int]
    ) -> Tensor:
        """ITM logits ``(P, 2)``, column 1 = matched, of pairs of a picture of ``memory`` and one of ``texts``."""
        logits: Tensor = self.itm_head(self.body.pooled(memory, texts, image_index, text_index))
        return logits

    def losses(
        self, batch: Batch, teacher: CodeTeacher | None = None, feature_grads: Embedded | None = None
    ) -> dict[str, Tensor]:
        """As :meth:`Beit3.losses`; the contrast is joined by matching of B pairs and 2 B hard negatives."""
        if self.config.objective != "itc":
            return super().losses(batch, teacher, feature_grads)
        assert self.logit_scale is not None
        embedded = self.embed(batch)
        losses = self.contrast(embedded) if feature_grads is None else embedded.surrogate(feature_grads)
        scale, ids = self.logit_scale.exp().detach(), batch.image_ids
        negatives = draw_pairs(embedded.image, embedded.text, scale, ids, batch.draws, self.config.hard_negatives)
        tokens, rows = embedded.towers
        own = self.body.pairs(tokens, rows, batch.texts.segments).flatten(1)
        drawn = pooled_negatives(self.body, negatives, batch, tokens, rows)
        return losses | itm_losses(self.itm_head(torch.cat([own, drawn])), negatives)


def _features(head: nn.Module, rows: Tensor) -> Tensor:
    return F.normalize(head(rows).float(), dim=-1)


def _joined(first: PatchMasks, second: PatchMasks) -> PatchMasks:
    """Masks of the pictures of both, those of ``first`` before."""
    start = len(first.counts) * first.patches
    return PatchMasks(torch.cat([first.rows, second.rows + start]), first.counts + second.counts, first.patches)


def beit3_base() -> Beit3Config:
    """The released base model."""
    return Beit3Config()


def beit3_large() -> Beit3Config:
    """The released large model."""
    return Beit3Config(width=1024, depth=24, heads=16, hidden=4096)


def beit3_giant() -> Beit3Config:
    """The model of the paper (table 2): shared attention, vision-language experts in the top 3 of 40 layers."""
    image = ImageInput(224, HALF, HALF)
    return Beit3Config(image, patch=14, width=1408, depth=40, heads=16, hidden=6144, attention="shared", fused_layers=3)


def beit3_small() -> Beit3Config:
    """For thousands of real photographs and CPUs; 5 x 5 patches, 256 codes."""
    return Beit3Config(
        ImageInput(80, HALF, HALF),
        vocab_size=4000,
        max_length=64,
        codes=256,
        width=192,
        depth=4,
        heads=3,
        hidden=768,
        drop_path=0.0,
    )


def beit3_tiny() -> Beit3Config:
    """For tests."""
    return Beit3Config(
        ImageInput(48, HALF, HALF),
        patch=8,
        vocab_size=500,
        max_length=48,
        codes=64,
        width=64,
        depth=3,
        heads=4,
        hidden=256,
        drop_path=0.0,
    )


def beit3_tiny_paper() -> Beit3Config:
    """For tests, built as in the paper."""
    return replace(beit3_tiny(), attention="shared", fused_layers=1)


CONFIGS = {
    "beit3-base": beit3_base,
    "beit3-large": beit3_large,
    "beit3-giant": beit3_giant,
    "beit3-small": beit3_small,
    "beit3-tiny": beit3_tiny,
    "beit3-tiny-paper": beit3_tiny_paper,
}
