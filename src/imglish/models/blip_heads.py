"""BLIP's model for NLVR2 (Li et al. 2022, section 5.4): every layer looks at both pictures at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from imglish.data.batch import TextBatch
from imglish.models.answering import AnswerDecoder
from imglish.models.blip import Blip
from imglish.nn.attention import CrossAttention, Memory
from imglish.nn.blocks import Block
from imglish.nn.segments import Ragged, Rows, Segments


class _Looks(nn.Module):
    """One cross-attention a picture in place of one: their mean, or a linear layer over all."""

    def __init__(self, looks: Sequence[nn.Module], merge: nn.Module | None, memories: Sequence[Memory]) -> None:
        super().__init__()
        self.looks, self.merge, self.memories = nn.ModuleList(looks), merge, memories

    def forward(self, x_TD: Tensor, rows: Segments, memory: Memory) -> Tensor:
        found = [look(x_TD, rows, seen) for look, seen in zip(self.looks, (memory, *self.memories), strict=True)]
        if self.merge is None:
            return cast(Tensor, sum(found) / len(found))
        return cast(Tensor, self.merge(torch.cat(found, dim=1)))


class BlipClassifier(nn.Module):
    """Classes of a text with its picture, read from [ENC]: the head of NLVR2 over the grounded encoder as it is."""

    def __init__(self, blip: Blip, classes: int) -> None:
        super().__init__()
        width = blip.config.width
        self.blip = blip
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, images: Tensor, texts: TextBatch) -> Tensor:
        """Logits ``(B, classes)``."""
        memory = self.blip.project_images(self.blip.vision(images))
        read = Rows.first(texts.segments, texts.ids.device)
        rows = self.blip.grounded_input(texts)
        states = self.blip.fuse(rows, texts.segments, memory, Segments.equal(len(texts), 1), read)
        return cast(Tensor, self.head(states))


class BlipVqa(nn.Module):
    """Open answers: a decoder over the states of [ENC] question; it begins as the pre-trained decoder, and shares
    nothing with the encoder any more."""

    def __init__(self, blip: Blip, depth: int | None = None) -> None:
        super().__init__()
        self.blip = blip
        layers = blip.decoding()
        start = blip.config.decode_id
        self.decoder = AnswerDecoder(blip.config, len(layers) if depth is None else depth, start, types=0)
        if depth is None:
            self.decoder.begin_as(blip.decoder_embedding or blip.embedding, layers, blip.lm_head)

    def questions(self, images: Tensor, texts: TextBatch) -> Ragged:
        """States of question b about picture b."""
        memory = self.blip.project_images(self.blip.vision(images))
        rows = self.blip.grounded_input(texts)
        states = self.blip.fuse(rows, texts.segments, memory, Segments.equal(len(texts), 1))
        return Ragged(states, texts.segments)


class BlipReasoning(nn.Module):
    """NLVR2: is the sentence true of both pictures (or of more)?

    Each layer of ``blip`` gets a second cross-attention (and further ones), equal to its first one at the start. The
    layers from ``merged`` on join what they found by a linear layer, those before take the mean.
    """

    def __init__(self, blip: Blip, classes: int = 2, merged: int = 6, pictures: int = 2) -> None:
        super().__init__()
        width = blip.config.width
        self.blip = blip
        self.merged = merged
        self.pictures = pictures
        crosses = [cast(CrossAttention, layer.cross) for layer in blip.layers]
        self.second = nn.ModuleList(copy.deepcopy(cross) for cross in crosses for _ in range(1, pictures))
        joined = range(max(0, len(blip.layers) - merged))
        self.merge = nn.ModuleList(nn.Linear(pictures * width, width) for _ in joined)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))

    def states(self, images: Sequence[Tensor], texts: TextBatch, read: Rows | None = None) -> Tensor:
        """Grounded states ``(T, D)``; ``images[n]`` ``(B, 3, H, W)``: the n-th picture of each text."""
        if len(images) != self.pictures or any(len(each) != len(texts) for each in images):
            sizes = [len(each) for each in images]
            raise ValueError(f"{len(texts)} texts with {self.pictures} pictures each, but there are {sizes} pictures")
        rows = self.blip.grounded_input(texts)
        first, *others = self.blip.vision(torch.cat(list(images))).split(len(texts))
        each, pictures = Segments.equal(len(texts), 1), Segments.equal(*first.shape[:2])
        memory = self.blip.project_images(first)
        for number, layer in enumerate(self.blip.layers):
            block = cast(Block, layer)
            place = number * len(others)
            looks = [cast(CrossAttention, look) for look in self.second[place : place + len(others)]]
            merge = self.merge[number - self.merged] if number >= self.merged else None
            seen = [
                Memory(*look.project(other.flatten(0, 1)), pictures, each)
                for look, other in zip(looks, others, strict=True)
            ]
            assert block.cross is not None
            all_of_them = block.with_parts({"cross": _Looks([block.cross, *looks], merge, seen)})
            keys, values = memory.layers[number]
            last = number == len(self.blip.layers) - 1
            mine = Memory(keys, values, memory.segments, each)
            rows = all_of_them(rows, texts.segments, memory=mine, read=read if last else None)
        return rows

    def forward(self, images: Sequence[Tensor], texts: TextBatch) -> Tensor:
        """Logits ``(B, classes)``, column 1 = true."""
        return cast(Tensor, self.head(self.states(images, texts, Rows.first(texts.segments, texts.ids.device))))
