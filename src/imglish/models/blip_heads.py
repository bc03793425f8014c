"""BLIP's model for NLVR2 (Li et al. 2022, section 5.4): every layer looks at both pictures at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from imglish.data.batch import TextBatch
from imglish.models.blip import Blip
from imglish.nn.attention import CrossAttention, Memory
from imglish.nn.blocks import Block
from imglish.nn.segments import Rows, Segments


class _Looks(nn.Module):
    """Two cross-attentions in place of one: their mean, or a linear layer over both."""

    def __init__(self, first: nn.Module, second: nn.Module, merge: nn.Module | None, memory: Memory) -> None:
        super().__init__()
        self.first, self.second, self.merge, self.memory = first, second, merge, memory

    def forward(self, x_TD: Tensor, rows: Segments, memory: Memory) -> Tensor:
        one, other = self.first(x_TD, rows, memory), self.second(x_TD, rows, self.memory)
        if self.merge is None:
            return cast(Tensor, (one + other) / 2)
        return cast(Tensor, self.merge(torch.cat([one, other], dim=1)))


class BlipReasoning(nn.Module):
    """NLVR2: is the sentence true of both pictures?

    Each layer of ``blip`` gets a second cross-attention, equal to its first one at the start. The layers from
    ``merged`` on join what both found by a linear layer, those before take the mean.
    """

    def __init__(self, blip: Blip, classes: int = 2, merged: int = 6) -> None:
        super().__init__()
        width = blip.config.width
        self.blip = blip
        self.merged = merged
        self.second = nn.ModuleList(copy.deepcopy(cast(CrossAttention, layer.cross)) for layer in blip.layers)
        self.merge = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(max(0, len(blip.layers) - merged)))
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))

    def states(self, images: Sequence[Tensor], texts: TextBatch, read: Rows | None = None) -> Tensor:
        """Grounded states ``(T, D)``; ``images``: the first and the second picture ``(B, 3, H, W)`` of each text."""
        first, second = images
        if not len(first) == len(second) == len(texts):
            raise ValueError(f"{len(texts)} texts, {len(first)} and {len(second)} pictures")
        rows = self.blip.grounded_input(texts)
        one, other = self.blip.vision(torch.cat([first, second])).split(len(texts))
        each = Segments.equal(len(texts), 1)
        memory, pictures = self.blip.project_images(one), Segments.equal(*other.shape[:2])
        for number, layer in enumerate(self.blip.layers):
            block, cross = cast(Block, layer), cast(CrossAttention, self.second[number])
            merge = self.merge[number - self.merged] if number >= self.merged else None
            seen = Memory(*cross.project(other.flatten(0, 1)), pictures, each)
            assert block.cross is not None
            both = block.with_parts({"cross": _Looks(block.cross, cross, merge, seen)})
            keys, values = memory.layers[number]
            last = number == len(self.blip.layers) - 1
            mine = Memory(keys, values, memory.segments, each)
            rows = both(rows, texts.segments, memory=mine, read=read if last else None)
        return rows

    def forward(self, images: Sequence[Tensor], texts: TextBatch) -> Tensor:
        """Logits ``(B, 2)``, column 1 = true."""
        return cast(Tensor, self.head(self.states(images, texts, Rows.first(texts.segments, texts.ids.device))))
