"""BLIP (Li et al. 2022, "Bootstrapping Language-Image Pre-training"): one text Transformer in three modes (figure 2).

text mode           sequence             self-attention      cross-attention  objective
unimodal encoder    [CLS] words [SEP]    both directions     left out         ITC
grounded encoder    [ENC] words [SEP]    both directions     to the picture   ITM
grounded decoder    [DEC] words [SEP]    causal, its own     to the picture   LM

Encoder and decoder share every other weight: embeddings, cross-attention, feed-forward. So a picture's keys and values
are projected once for its caption, its negatives and the words that are to be written about it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from imglish.data.batch import Batch, TextBatch
from imglish.models.aligned import AlignedConfig, AlignedFusion, init_all, itm_losses, look, project
from imglish.models.capabilities import Embedded, EncodedImages, EncodedTexts, ImageMemory
from imglish.models.captioning import CaptionForm, CaptionState
from imglish.models.pairing import all_texts
from imglish.models.vit import ImageInput, VitConfig
from imglish.nn.blocks import Block
from imglish.nn.embed import BertEmbedding, MlmHead
from imglish.nn.segments import Rows, Segments, upload_index
from imglish.objectives.lm import lm_loss, lm_rows
from imglish.objectives.momentum import MomentumTeacher, TeacherConfig

Share = Literal["all_but_self_attention", "all_but_cross_attention", "all", "none"]

OWN_PARTS: dict[Share, tuple[str, ...]] = {  # modules of a layer that the decoder has for itself
    "all_but_self_attention": ("attn", "norm1"),
    "all_but_cross_attention": ("cross", "norm_cross"),
    "all": (),
    "none": ("attn", "norm1", "cross", "norm_cross", "mlp", "norm2"),
}


@dataclass(frozen=True)
class BlipConfig(AlignedConfig):
    """Sizes and objectives; the defaults are the published model (ViT-B/16 at 224 px, BERT-base).

    vocab_size: with [DEC] and [ENC], which are its last two tokens; share: what encoder and decoder have in common
    (table 3 of the paper compares these four; "none" has embeddings of its own too); lm: whether language modelling is
    trained; smoothing: of its labels; prompt: text that captions begin with in training and in writing ("a picture
    of "), and prompt_tokens, its length, whose words are given and not predicted; both empty in pre-training. The rest:
    see :class:`AlignedConfig`.
    """

    vocab_size: int = 30524
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(queue_size=57600, ramp_epochs=2))
    share: Share = "all_but_self_attention"
    lm: bool = True
    smoothing: float = 0.1
    prompt: str = ""
    prompt_tokens: int = 0

    family: ClassVar[str] = "blip"
    special_tokens: ClassVar[tuple[str, ...]] = ("[DEC]", "[ENC]")
    closing_token: ClassVar[bool] = True  # a text without [SEP] would teach the decoder to go on for ever

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}, a share of 0 or more and below 1")

    @property
    def decode_id(self) -> int:
        """[DEC], which opens a text that is written."""
        return self.vocab_size - 2

    @property
    def encode_id(self) -> int:
        """[ENC], which opens a text that is matched."""
        return self.vocab_size - 1

    def build(self) -> Blip:
        return Blip(self)


@dataclass(frozen=True)
class _Towers:
    """What the fusion needs of one batch: pictures, and the input rows of the clean (then swapped) texts."""

    tokens: Tensor
    rows: Tensor
    segments: Segments


class Blip(AlignedFusion):
    """Encodes pictures and texts, matches pairs, writes captions; ``losses`` is one training step."""

    family = "blip"
    config: BlipConfig

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = config.vision.build()
        self.embedding = self._new_embedding()
        self.layers = nn.ModuleList(config.text_block(cross=True) for _ in range(config.depth))
        self.decoder = nn.ModuleList(self._own_parts(config.text_block(cross=True)) for _ in range(config.depth))
        self.decoder_embedding = self._new_embedding() if config.share == "none" else None
        self.lm_head = MlmHead(config.width, config.vocab_size, config.norm_eps)
        self.image_proj = nn.Linear(config.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.width, config.embed_dim)
        self.itm_head = nn.Linear(config.width, 2)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        init_all(self)

    def _new_embedding(self) -> BertEmbedding:
        c = self.config
        return BertEmbedding(c.vocab_size, c.max_length, c.width, c.norm_eps, c.dropout, types=0)

    def _own_parts(self, block: Block) -> nn.ModuleDict:
        return nn.ModuleDict({name: getattr(block, name) for name in OWN_PARTS[self.config.share]})

    def make_teacher(self) -> MomentumTeacher[Self] | None:
        """The momentum copy of the two towers, with the queue; none where there is no contrast to teach."""
        if not self.config.itc:
            return None
        towers = copy.deepcopy(self)
        del towers.decoder, towers.decoder_embedding, towers.lm_head, towers.itm_head
        for layer in towers.layers:
            del layer.norm_cross
            layer.register_module("cross", None)
        return MomentumTeacher(self, self.config.teacher, self.config.embed_dim, towers)

    # ---- the three modes ------------------------------------------------------------------------------------------

    def encode_texts(self, texts: TextBatch) -> EncodedTexts:
        """Packed texts -> features ``(N, E)`` (unimodal), and input rows ``(T, D)`` of the grounded encoder: [CLS]
        gives way to [ENC]."""
        cls = self._unimodal(texts, Rows.first(texts.segments, texts.ids.device))
        return EncodedTexts(self._text_features(cls), texts.segments, self.grounded_input(texts))

    def _unimodal(self, texts: TextBatch, read: Rows | None = None) -> Tensor:
        rows = self.embedding(texts)
        for layer in self.layers[:-1]:
            rows = layer(rows, texts.segments)
        states: Tensor = self.layers[-1](rows, texts.segments, read=read)
        return states

    def grounded_input(self, texts: TextBatch) -> Tensor:
        """Input rows ``(T, D)`` of the grounded encoder: [CLS] gives way to [ENC]."""
        rows: Tensor = self.embedding(_opened_by(self.config.encode_id, texts))
        return rows

    def fusing(self) -> Iterable[nn.Module]:
        return self.layers

    def decoding(self) -> list[Block]:
        """The layers of the grounded decoder: those of the encoder with the decoder's own parts."""
        made = []
        for layer, own in zip(self.layers, self.decoder, strict=True):
            assert isinstance(layer, Block)
            assert isinstance(own, nn.ModuleDict)
            made.append(layer.with_parts(dict(own.items())))
        return made

    def decode(self, texts: TextBatch, memory: ImageMemory) -> Tensor:
        """Grounded decoder over ``texts`` that begin with [DEC], text b looking at picture b: states ``(T, D)``."""
        rows = self._decoder_embedding(texts)
        return look(self.decoding(), rows, texts.segments, memory, Segments.equal(texts.segments.count, 1), causal=True)

    def next_logits(self, states: Tensor) -> Tensor:
        """Logits ``(M, V)`` of the token after each of the decoder's ``states (M, D)``."""
        logits: Tensor = self.lm_head(states, self._decoder_embedding.words.weight)
        return logits

    @property
    def _decoder_embedding(self) -> BertEmbedding:
        return self.embedding if self.decoder_embedding is None else self.decoder_embedding

    def _decoder_memory(self, tokens: Tensor, encoder: ImageMemory | None = None) -> ImageMemory:
        """Keys and values for the decoder: the encoder's, where they share cross-attention."""
        if encoder is not None and "cross" not in OWN_PARTS[self.config.share]:
            return encoder
        return project(self.decoding(), tokens)

    # ---- captions -------------------------------------------------------------------------------------------------

    def caption_form(self) -> CaptionForm:
        return CaptionForm(start=self.config.decode_id, prompt=self.config.prompt, longest=self.config.max_length)

    def start_captions(self, images: EncodedImages, room: int) -> CaptionState:
        if not isinstance(images.tokens, Tensor):
            raise ValueError("captions need images.tokens: encode the pictures with this model")
        return CaptionState.begin(self._decoder_memory(images.tokens), self.config.depth, room)

    def continue_captions(self, state: CaptionState, texts: TextBatch) -> Tensor:
        step = state.cache.extend(texts.segments, state.device)
        rows = self._decoder_embedding(texts, step.positions)
        for layer, memory, cache in zip(self.decoding(), state.memories(), step.layers, strict=True):
            rows = layer(rows, texts.segments, memory, cache=cache)
        return self.next_logits(rows[texts.segments.ends(rows.device)])

    # ---- training -------------------------------------------------------------------------------------------------

    def embed(self, batch: Batch, teacher: MomentumTeacher[Self] | None = None) -> Embedded:
        """Towers of student and teacher: features for the contrast, and what the fusion starts from."""
        count, everything = len(batch), all_texts(batch, masked=False)
        wrong = batch.swapped is not None and self.config.itc_swapped
        contrasted = everything if wrong else batch.texts
        tokens = self.vision(batch.squares)
        cls = self._unimodal(contrasted, Rows.first(contrasted.segments, tokens.device))
        image_m = text_m = None
        if self.config.itc:
            theirs = self._needed(teacher).model
            with torch.no_grad():
                image_m = theirs._image_features(theirs.vision(batch.squares, class_only=True))
                text_m = theirs._text_features(
                    theirs._unimodal(batch.texts, Rows.first(batch.texts.segments, tokens.device))
                )
        return Embedded(
            image=self._image_features(tokens[:, 0]),
            text=self._text_features(cls[:count]),
            image_ids=batch.image_ids,
            image_m=image_m,
            text_m=text_m,
            swapped=self._text_features(cls[count:]) if wrong else None,
            towers=_Towers(tokens, self.grounded_input(everything), everything.segments),
        )

    def losses(
        self, batch: Batch, teacher: MomentumTeacher[Self] | None = None, feature_grads: Embedded | None = None
    ) -> dict[str, Tensor]:
        """One training step: ITC, ITM and LM (section 3.2), the picture and its keys and values computed once for all.

        The decoder works while the numbers of the hard negatives reach the host; positive, swapped and negative pairs
        then pass the grounded encoder together. ``feature_grads``: gradients with respect to the features, in place of
        the contrastive loss.
        """
        if not (self.config.itc or self.config.itm):  # captioning alone needs no towers
            return self._lm(batch, self._decoder_memory(self.vision(batch.squares)))
        embedded = self.embed(batch, teacher)
        losses = self.contrast(embedded, teacher) if feature_grads is None else embedded.surrogate(feature_grads)
        towers: _Towers = embedded.towers
        negatives = self._draw(embedded, batch.draws) if self.config.itm else None
        memory = self.project_images(towers.tokens) if self.config.itm else None
        if self.config.lm:
            losses |= self._lm(batch, self._decoder_memory(towers.tokens, memory))
        if negatives is not None and memory is not None:
            logits = self._match_negatives(negatives, memory, towers.tokens, towers.rows, towers.segments, known=True)
            losses |= itm_losses(logits, negatives)
        return losses

    def _lm(self, batch: Batch, memory: ImageMemory) -> dict[str, Tensor]:
        """Every word of a text, and its end, from the words before it and the picture."""
        texts, prompt = batch.texts, self.config.prompt_tokens
        given, _ = lm_rows(texts.segments)  # the last token of a text predicts nothing, so it is left out
        rows, targets = lm_rows(texts.segments, prompt)
        opened = _opened_by(self.config.decode_id, texts).ids
        device = opened.device
        shorter = Segments.of(max(n - 1, 0) for n in texts.segments.lengths)
        states = self.decode(TextBatch(opened[upload_index(given, device)], shorter), memory)
        logits = self.next_logits(states[upload_index(np.searchsorted(given, rows), device)])
        count = batch.mean(lambda b: len(lm_rows(b.texts.segments, prompt)[1]))
        return {"lm": lm_loss(logits, texts.ids[upload_index(targets, device)], self.config.smoothing, count)}


def _opened_by(token: int, texts: TextBatch) -> TextBatch:
    """``texts`` with ``token`` in place of their first one."""
    return TextBatch(texts.ids.index_fill(0, texts.segments.starts(texts.ids.device), token), texts.segments)


def blip_base() -> BlipConfig:
    """The published model: 252.4 M parameters."""
    return BlipConfig()


def blip_large() -> BlipConfig:
    """The published model with ViT-L/16: 474.7 M parameters."""
    return BlipConfig(vision=VitConfig(width=1024, depth=24, heads=16))


def blip_small() -> BlipConfig:
    """5.0 M parameters (4,000 words), for thousands of real photographs and CPUs."""
    return BlipConfig(
        vision=VitConfig(image=ImageInput(80), patch=16, width=192, depth=4, heads=3),
        vocab_size=4002,
        max_length=64,
        width=192,
        depth=3,
        heads=3,
        hidden=768,
        dropout=0.0,
        embed_dim=128,
        teacher=TeacherConfig(queue_size=1024, ramp_epochs=2),
    )


def blip_tiny() -> BlipConfig:
    """For tests: seconds on one core."""
    return BlipConfig(
        vision=VitConfig(image=ImageInput(48), patch=8, width=64, depth=3, heads=4),
        vocab_size=502,
        max_length=48,
        width=64,
        depth=3,
        heads=4,
        hidden=256,
        dropout=0.0,
        embed_dim=64,
        teacher=TeacherConfig(queue_size=1024, ramp_epochs=2),
    )


CONFIGS = {"blip-base": blip_base, "blip-large": blip_large, "blip-small": blip_small, "blip-tiny": blip_tiny}
