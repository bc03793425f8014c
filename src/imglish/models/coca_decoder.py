"""The two halves of CoCa's decoder (Yu et al. 2022, section 3.2): without the picture, and with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from imglish.data.batch import TextBatch
from imglish.nn.attention import CrossAttention, Memory, attend
from imglish.nn.blocks import Block, Mlp
from imglish.nn.cache import LayerCache
from imglish.nn.segments import Rows, Segments, upload_index

if TYPE_CHECKING:
    from imglish.models.coca import CocaConfig

PAD = 0  # the filling of texts in open_clip, which its released weights have learned to read


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
