"""ViLT (Kim et al. 2021, "Vision-and-Language Transformer without convolution or region supervision").

words   -> embedding + type 0 --+
                                +--> one Transformer over [text; picture] --> ITM ([CLS]), WPA (all rows), MLM
patches -> linear    + type 1 --+

There are no towers: a picture and a text meet in the first layer, so every pair is read on its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from imglish.data.batch import Batch, MaskedTexts, TextBatch
from imglish.data.pictures import Pictures
from imglish.models.capabilities import Embedded, EncodedImages, EncodedTexts, ImageMemory
from imglish.models.vilt_pictures import AspectInput, RegionInput, neighbours
from imglish.nn.blocks import BlockConfig
from imglish.nn.embed import BertEmbedding, MlmHead
from imglish.nn.segments import HostCopy, Ragged, Rows, Segments, upload_index
from imglish.objectives.itm import itm_loss
from imglish.objectives.mlm import mlm_loss
from imglish.objectives.wpa import alignment_distance, wpa_loss


@dataclass(frozen=True)
class ViltConfig:
    """Sizes and objectives; the defaults are ViLT-B/32 (a ViT with BERT's word embeddings in front).

    image: patches of pixels, or the regions of a detector; types: rows of the table of token types (text, picture, and
    for NLVR2 a second picture); itm, mlm: which objectives are trained, and which heads exist; wpa: word-patch
    alignment on the pairs of the ITM, with its weight, and beta and iterations of IPOT (section 3.2).
    one_forward: MLM and ITM read one forward of the masked texts in place of two: half the work, but the matcher sees
    masked texts, and masks are filled at the matching pairs only (ViLBERT's way; published: false).
    """

    image: AspectInput | RegionInput = field(default_factory=AspectInput)
    vocab_size: int = 30522
    max_length: int = 40
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    text_norm_eps: float = 1e-12
    dropout: float = 0.1
    types: int = 2
    itm: bool = True
    mlm: bool = True
    wpa: bool = True
    wpa_weight: float = 0.1
    wpa_beta: float = 0.5
    wpa_iterations: int = 50
    one_forward: bool = False

    family: ClassVar[str] = "vilt"
    closing_token: ClassVar[bool] = True  # the last token of a text stands for none of its words

    def __post_init__(self) -> None:
        if self.wpa and not self.itm:
            raise ValueError("wpa aligns the pairs of the ITM: with itm=false set wpa=false too")
        if self.one_forward and not (self.itm and self.mlm):
            raise ValueError("one_forward joins MLM and ITM: it needs both")
        if self.types < 2:
            raise ValueError(f"types is {self.types}: text and picture need one each")

    def build(self) -> Vilt:
        return Vilt(self)


@dataclass(frozen=True)
class Pairs:
    """Sequences [text; picture], packed: rows ``(T, D)`` of ``segments``; words: the length of each text (host)."""

    rows: Tensor
    segments: Segments
    words: tuple[int, ...]

    @staticmethod
    def of(texts: Ragged, pictures: Ragged, text_index: np.ndarray, image_index: np.ndarray) -> Pairs:
        """Pair p: text ``text_index[p]``, picture ``image_index[p]``."""
        order = np.stack([text_index, len(texts) + image_index], axis=1).ravel()
        pieces = texts.segments + pictures.segments
        both = torch.cat([texts.rows, pictures.rows])
        words = texts.segments.select(text_index).lengths
        lengths = np.asarray(words) + np.asarray(pictures.segments.select(image_index).lengths)
        return Pairs(both[upload_index(pieces.rows_of(order), both.device)], Segments.of(lengths), words)

    def aligned(self, leading: int) -> tuple[np.ndarray, Segments, np.ndarray, Segments]:
        """Row numbers of what WPA aligns: words without [CLS] and the last token, patches without ``leading`` rows."""
        pieces: list[int] = []
        for total, words in zip(self.segments.lengths, self.words, strict=True):
            first, inner = min(words, 1), max(words - 2, 0)
            pieces += [first, inner, words - first - inner + leading, total - words - leading]
        parts = Segments.of(pieces)
        inner_words, patches = range(1, len(pieces), 4), range(3, len(pieces), 4)
        return parts.rows_of(inner_words), parts.select(inner_words), parts.rows_of(patches), parts.select(patches)


class Vilt(nn.Module):
    """Matches pairs and fills masks; ``losses`` is one training step."""

    family = "vilt"
    itm_pairs = (0.5, 0.5)  # matching and other ones for each picture of a batch, on average

    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embedding = BertEmbedding(
            config.vocab_size, config.max_length, width, config.text_norm_eps, config.dropout
        )
        self.pictures = config.image.build(width, config.dropout, config.text_norm_eps)
        self.types = nn.Embedding(config.types, width)
        block = BlockConfig(
            width=width,
            heads=config.heads,
            hidden=int(width * config.mlp_ratio),
            norm_eps=config.norm_eps,
            dropout=config.dropout,
        )
        self.blocks = nn.ModuleList(block.build() for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.pooler = nn.Linear(width, width)
        self.itm_head = nn.Linear(width, 2) if config.itm else None
        self.mlm_head = MlmHead(width, config.vocab_size, config.text_norm_eps) if config.mlm else None
        self.mlm_words = nn.Linear(width, config.vocab_size, bias=False) if config.mlm else None  # published: not tied
        _init(self, width)

    # ---- inputs ---------------------------------------------------------------------------------------------------

    def embed_images(self, images: Pictures, kind: int = 1) -> EncodedImages:
        """Patches, squares or regions -> their input rows; kind: row of the type table (2: NLVR2's second picture)."""
        made = self.pictures(images)
        rows = made.rows + self.types.weight[kind]
        return EncodedImages(rows.new_zeros(len(made), 0), Ragged(rows, made.segments))

    def embed_texts(self, texts: TextBatch) -> EncodedTexts:
        """Packed texts -> their input rows ``(T, D)``."""
        rows = self._texts(texts).rows
        return EncodedTexts(rows.new_zeros(len(texts), 0), texts.segments, rows)

    def _texts(self, texts: TextBatch) -> Ragged:
        return Ragged(self.embedding(texts) + self.types.weight[0], texts.segments)

    def _images(self, images: Pictures) -> Ragged:
        tokens = self.embed_images(images).tokens
        assert isinstance(tokens, Ragged)
        return tokens

    # ---- pairs ----------------------------------------------------------------------------------------------------

    def read_pairs(self, pairs: Pairs, read: Rows | None = None) -> Tensor:
        """The Transformer over packed pairs: states ``(T, D)``, or of the M rows of ``read``, which are then all that
        the last layer computes."""
        rows = pairs.rows
        for block in self.blocks[:-1]:
            rows = block(rows, pairs.segments)
        states: Tensor = self.norm(self.blocks[-1](rows, pairs.segments, read=read))
        return states

    def pool(self, cls: Tensor) -> Tensor:
        """tanh of a linear layer on the states of [CLS], ``(P, D)``: what the heads of pairs read."""
        return torch.tanh(self.pooler(cls))

    def project_images(self, tokens: Ragged) -> ImageMemory:
        """Nothing can be projected before the text is known: the input rows are kept."""
        return ImageMemory(((tokens.rows,),), tokens.segments)

    def match(
        self, memory: ImageMemory, texts: EncodedTexts, image_index: Sequence[int], text_index: Sequence[int]
    ) -> Tensor:
        """ITM logits ``(P, 2)``, column 1 = matched, of pairs of a picture of ``memory`` and one of ``texts``."""
        if texts.rows is None:
            raise ValueError("match needs texts.rows: embed the texts with this model")
        if self.itm_head is None:
            raise ValueError("this model was built without ITM: it has no matching head")
        pictures = Ragged(memory.layers[0][0], memory.segments)
        pairs = Pairs.of(Ragged(texts.rows, texts.segments), pictures, np.asarray(text_index), np.asarray(image_index))
        logits: Tensor = self.itm_head(self.pool(self.read_pairs(pairs, Rows.first(pairs.segments, pairs.rows.device))))
        return logits

    def fill_masks(self, tokens: Ragged, masked: MaskedTexts, segments: Segments) -> Tensor:
        """MLM logits ``(M, V)`` of the masked rows, text b looking at picture b."""
        own = np.arange(segments.count)
        pairs = Pairs.of(self._texts(TextBatch(masked.ids, segments)), tokens, own, own)
        index = masked.rows + upload_index(_shift(pairs, segments, masked.counts), masked.rows.device)
        return self._words(self.read_pairs(pairs, Rows(index, Segments(masked.counts))))

    def _words(self, states: Tensor) -> Tensor:
        if self.mlm_head is None or self.mlm_words is None:
            raise ValueError("this model was built without MLM: it has no head for words")
        logits: Tensor = self.mlm_head(states, self.mlm_words.weight)
        return logits

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, teacher: Any = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]:
        return self.losses(batch, teacher, feature_grads)

    def losses(self, batch: Batch, teacher: Any = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]:
        """One training step (section 3.2): MLM on the pairs, ITM and WPA with about half of the pictures replaced.

        Which pictures are replaced is decided on the device and reaches the host while the MLM is computed.
        """
        config = self.config
        pictures = self._images(batch.images)
        wrong = HostCopy(replaced(batch)) if config.itm else None
        losses: dict[str, Tensor] = {}
        if config.mlm and not config.one_forward:
            masked = _masked(batch)
            logits = self.fill_masks(pictures, masked, batch.texts.segments)
            losses["mlm"] = mlm_loss(logits, masked.labels, count=batch.mean(lambda b: b.masked_words))
        if wrong is not None:
            losses |= self._match_step(batch, pictures, wrong.numpy())
        return losses

    def _match_step(self, batch: Batch, pictures: Ragged, wrong: np.ndarray) -> dict[str, Tensor]:
        """ITM and WPA (and with ``one_forward`` MLM); ``wrong``: bool ``(B,)``, whose picture is its neighbour's."""
        own = np.arange(len(batch))
        texts = TextBatch(_masked(batch).ids, batch.texts.segments) if self.config.one_forward else batch.texts
        image_index, text_index = np.where(wrong, neighbours(len(batch)), own), own
        if batch.swapped is not None:  # wrong captions that the data give, beside the right picture
            texts = TextBatch(torch.cat([texts.ids, batch.swapped.ids]), texts.segments + batch.swapped.segments)
            image_index, text_index = np.concatenate([image_index, own]), np.arange(len(texts))
        matched = np.concatenate([~wrong, np.zeros(len(texts) - len(batch), dtype=bool)])
        pairs = Pairs.of(self._texts(texts), pictures, text_index, image_index)
        losses, states = self.itm_wpa(pairs, matched)
        if self.config.one_forward:
            masked = _masked(batch)

            def matching_words(b: Batch) -> float:
                stays = ~(wrong if b is batch else replaced(b).cpu().numpy())
                return int(np.dot(stays, _masked(b).counts))

            kept = np.flatnonzero(np.repeat(~wrong, masked.counts))
            shift = _shift(pairs, batch.texts.segments, masked.counts)[kept]
            index, device = upload_index(kept, states.device), states.device
            logits = self._words(states[masked.rows[index] + upload_index(shift, device)])
            losses["mlm"] = mlm_loss(logits, masked.labels[index], count=batch.mean(matching_words))
        return losses

    def itm_wpa(self, pairs: Pairs, matched: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """ITM, and word-patch alignment where the model has it, over pairs of which ``matched`` (bool ``(P,)``, host)
        belong together; and the states of the rows that were read (all, or [CLS] alone without WPA)."""
        config, device = self.config, pairs.rows.device
        if self.itm_head is None:
            raise ValueError("this model was built without ITM")
        everything = config.wpa or config.one_forward
        first = Rows.first(pairs.segments, device)
        states = self.read_pairs(pairs, None if everything else first)
        logits = self.itm_head(self.pool(states[first.index] if everything else states))
        labels = upload_index(matched, device)
        losses = {"itm": itm_loss(logits, labels, torch.ones_like(labels, dtype=torch.bool))}
        losses["metric/itm_accuracy"] = (logits.argmax(1) == labels).float().mean().detach()
        if config.wpa:
            distance = self.align(states, pairs)
            losses["wpa"] = config.wpa_weight * wpa_loss(distance, labels)
        return losses, states

    def align(self, states: Tensor, pairs: Pairs) -> Tensor:
        """Transport cost ``(P,)`` between the words and the patches of each pair, from all its states ``(T, D)``."""
        words, word_segments, patches, patch_segments = pairs.aligned(self.pictures.leading)
        return alignment_distance(
            states[upload_index(words, states.device)],
            word_segments,
            states[upload_index(patches, states.device)],
            patch_segments,
            self.config.wpa_beta,
            self.config.wpa_iterations,
        )


def replaced(batch: Batch) -> Tensor:
    """Which pictures the ITM replaces by their neighbour's, bool ``(B,)``: half of them by the sample's own draw, and
    none by another copy of itself."""
    neighbour = batch.image_ids[upload_index(neighbours(len(batch)), batch.image_ids.device)]
    return (batch.draws[:, 0] >= 0.5) & (neighbour != batch.image_ids)


def _masked(batch: Batch) -> MaskedTexts:
    if batch.masked is None:
        raise ValueError("the MLM objective needs masked texts: the loader makes them, or set model.mlm=false")
    return batch.masked


def _shift(pairs: Pairs, texts: Segments, counts: tuple[int, ...]) -> np.ndarray:
    """What to add to row numbers among packed texts to find them among pairs, one for each of ``counts`` rows a text;
    pair b begins with text b."""
    return np.repeat(pairs.segments.bounds[: texts.count] - texts.bounds[:-1], counts)


def _init(model: Vilt, width: int) -> None:
    """Linear layers and embeddings normal, biases zero; at width 768 the deviation is 0.02, smaller models start in
    proportion to 1 / sqrt(width)."""
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02 * math.sqrt(768 / width))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=0.02)


def vilt_base() -> ViltConfig:
    """The published model, ViLT-B/32: 111.6 M parameters, and 24.1 M in the heads of pre-training."""
    return ViltConfig(image=AspectInput(most=200))


def vilt_small() -> ViltConfig:
    """5.2 M parameters (4,000 words), for thousands of real photographs and CPUs; at most 5 x 8 = 40 patches."""
    return ViltConfig(
        image=AspectInput(80, longest=133, patch=16),
        vocab_size=4000,
        max_length=64,
        width=192,
        depth=8,
        heads=3,
        dropout=0.0,
    )


def vilt_tiny() -> ViltConfig:
    """For tests: seconds on one core."""
    return ViltConfig(
        image=AspectInput(48, longest=80, patch=8),
        vocab_size=500,
        max_length=48,
        width=64,
        depth=3,
        heads=4,
        dropout=0.0,
    )


def vilt_regions() -> ViltConfig:
    """The same Transformer over the regions of a detector (2048 numbers each), as UNITER reads pictures."""
    return ViltConfig(image=RegionInput(2048), max_length=60)


CONFIGS = {
    "vilt-base": vilt_base,
    "vilt-small": vilt_small,
    "vilt-tiny": vilt_tiny,
    "vilt-regions": vilt_regions,
}
