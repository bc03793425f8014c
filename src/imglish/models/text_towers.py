"""Text towers of dual encoders: CLIP's Transformer, a BERT (ALIGN, WenLan) and a recurrent network (VSE++)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from imglish.data.batch import TextBatch
from imglish.nn.blocks import Activation, BlockConfig
from imglish.nn.embed import BertEmbedding
from imglish.nn.segments import Rows, Segments, upload_index

Projection = Literal["linear", "bias", "none"]


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text Transformer, pre-norm.

    causal: tokens see only what is before them. pool: the row that becomes the text's vector, "end" (the last token
    given, CLIP's end token), "first", or "last" (the last row after filling). padded: texts are filled up to the
    model's ``max_length`` with ``pad_id``, which is read like a word (SigLIP); otherwise no padding is computed.
    projection: to the joint space, without or with bias, or none.
    """

    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-5
    activation: Activation = "quick_gelu"
    layer_scale: float | None = None
    causal: bool = True
    pool: Literal["end", "first", "last"] = "end"
    padded: bool = False
    pad_id: int = 0
    projection: Projection = "linear"

    def build(self, vocab_size: int, max_length: int) -> TextTower:
        return TextTower(self, vocab_size, max_length)


class TextTower(nn.Module):
    """Packed token ids to packed states, or to the one row of each text that is read."""

    def __init__(self, config: TextConfig, vocab_size: int, max_length: int) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(vocab_size, config.width)
        self.positions = nn.Parameter(torch.zeros(max_length, config.width))
        block = BlockConfig(
            width=config.width,
            heads=config.heads,
            hidden=int(config.width * config.mlp_ratio),
            norm_eps=config.norm_eps,
            activation=config.activation,
            layer_scale=config.layer_scale,
        )
        self.blocks = nn.ModuleList(block.build() for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, texts: TextBatch) -> Tensor:
        """``(T,)`` ids -> ``(T, D)`` states of all tokens, as they are given (nothing is filled up)."""
        rows = self.embed(texts)
        for block in self.blocks:
            rows = block(rows, texts.segments, causal=self.config.causal)
        states: Tensor = self.norm(rows)
        return states

    def pooled(self, texts: TextBatch) -> Tensor:
        """The vector of each text, ``(N, D)``; the last block computes the N rows that are read."""
        device, given, causal = texts.ids.device, texts.segments, self.config.causal
        if self.config.padded:
            texts = self._filled(texts)
        segments, rows = texts.segments, self.embed(texts)
        for block in self.blocks[:-1]:
            rows = block(rows, segments, causal=causal)
        read_last = self.config.pool == "last" or (self.config.pool == "end" and not self.config.padded)
        if read_last:
            index = segments.ends(device)
        else:
            index = segments.starts(device)
            if self.config.pool == "end":  # the end token stands in front of the filling
                index = index + given.ends(device) - given.starts(device)
        if causal and not read_last:  # what is read does not see all keys: compute the whole block
            rows = self.blocks[-1](rows, segments, causal=True)[index]
        else:
            read = Rows(index, Segments.equal(segments.count, 1))
            rows = self.blocks[-1](rows, segments, causal=causal, read=read)
        states: Tensor = self.norm(rows)
        return states

    def embed(self, texts: TextBatch) -> Tensor:
        if texts.segments.longest > self.positions.shape[0]:
            raise ValueError(
                f"a text has {texts.segments.longest} tokens, the model takes {self.positions.shape[0]}: "
                "tokenize with a smaller max_length"
            )
        rows: Tensor = self.words(texts.ids) + self.positions[texts.segments.positions(texts.ids.device)]
        return rows

    def _filled(self, texts: TextBatch) -> TextBatch:
        device, length = texts.ids.device, self.positions.shape[0]
        segments = texts.segments
        if segments.longest > length:
            raise ValueError(f"a text has {segments.longest} tokens, the model takes {length}")
        ids = texts.ids.new_full((segments.count * length,), self.config.pad_id)
        place = segments.indices(device) * length + segments.positions(device)
        return TextBatch(ids.index_copy(0, place, texts.ids), Segments.equal(segments.count, length))


@dataclass(frozen=True)
class BertConfig:
    """A bidirectional post-norm Transformer whose first token is the text's vector; the defaults are BERT-base.

    token_types: rows of the token-type table, of which texts use the first; projection: as in :class:`TextConfig`.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    norm_eps: float = 1e-12
    dropout: float = 0.1
    token_types: int = 2
    projection: Projection = "bias"

    def build(self, vocab_size: int, max_length: int) -> BertTower:
        return BertTower(self, vocab_size, max_length)


class BertTower(nn.Module):
    """Packed token ids to the state of the first token of each text."""

    def __init__(self, config: BertConfig, vocab_size: int, max_length: int) -> None:
        super().__init__()
        self.embedding = BertEmbedding(
            vocab_size, max_length, config.width, config.norm_eps, config.dropout, config.token_types
        )
        block = BlockConfig(config.width, config.heads, config.hidden, "post", config.norm_eps, dropout=config.dropout)
        self.blocks = nn.ModuleList(block.build() for _ in range(config.depth))
        std = 0.02 * math.sqrt(768 / config.width)  # BERT's at its own width, activations of the same size at others
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=std)
                nn.init.zeros_(part.bias)
            elif isinstance(part, nn.Embedding):
                nn.init.trunc_normal_(part.weight, std=0.02)

    def pooled(self, texts: TextBatch) -> Tensor:
        """``(N, D)``; the last block computes the N rows that are read."""
        rows = self.embedding(texts)
        for block in self.blocks[:-1]:
            rows = block(rows, texts.segments)
        first: Tensor = self.blocks[-1](rows, texts.segments, read=Rows.first(texts.segments, rows.device))
        return first


@dataclass(frozen=True)
class GruConfig:
    """Word vectors of ``word_width`` and one recurrent layer, whose last state is the text's vector (VSE++)."""

    word_width: int = 300
    width: int = 1024
    projection: Projection = "none"

    def build(self, vocab_size: int, max_length: int) -> GruTower:
        return GruTower(self, vocab_size)


class GruTower(nn.Module):
    """A gated recurrent network over packed tokens (Faghri et al. 2018, section 4.1)."""

    def __init__(self, config: GruConfig, vocab_size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, config.word_width)
        self.gru = nn.GRU(config.word_width, config.width)
        nn.init.uniform_(self.words.weight, -0.1, 0.1)

    def pooled(self, texts: TextBatch) -> Tensor:
        """The state after the last token of each text, ``(N, D)``; a text of no token is an error."""
        _, last = self.gru(steps(self.words(texts.ids), texts.segments))
        states: Tensor = last[0]
        return states


def steps(rows_TD: Tensor, segments: Segments) -> PackedSequence:
    """Packed rows in the order of a recurrent network: all first tokens, all second ones ..., longest text first."""
    lengths = np.asarray(segments.lengths)
    if not lengths.all():
        raise ValueError("a recurrent network needs at least one token in every text")
    order = np.argsort(-lengths, kind="stable")
    alive = (lengths[None, :] > np.arange(segments.longest)[:, None])[:, order]  # step, text
    step, text = np.nonzero(alive)
    device = rows_TD.device
    return PackedSequence(
        rows_TD[upload_index(segments.bounds[:-1][order][text] + step, device)],
        torch.from_numpy(alive.sum(1)),
        upload_index(order, device),
        upload_index(np.argsort(order), device),
    )
