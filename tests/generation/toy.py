"""A small captioner on the real blocks, and what it computes without any cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from imglish.data.batch import TextBatch
from imglish.models.capabilities import EncodedImages, ImageMemory
from imglish.models.captioning import CaptionForm, CaptionState
from imglish.nn.attention import CrossAttention, Memory
from imglish.nn.blocks import BlockConfig
from imglish.nn.embed import BertEmbedding
from imglish.nn.segments import Segments

WIDTH = 16


class ToyCaptioner(nn.Module):
    """One self-attending layer without pictures (as in CoCa's lower half), two with; pictures are their own tokens."""

    def __init__(self, vocab_size: int = 11, longest: int = 24, seed: int = 0, sharpness: float = 4.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.longest = longest
        self.steps: list[int] = []
        self.embedding = BertEmbedding(vocab_size, longest, WIDTH, 1e-6, 0.0, types=0)
        self.lower = BlockConfig(WIDTH, 2, 32).build()
        self.layers = nn.ModuleList(BlockConfig(WIDTH, 2, 32, cross_width=WIDTH).build() for _ in range(2))
        self.head = nn.Linear(WIDTH, vocab_size)
        with torch.no_grad():
            self.head.weight.mul_(sharpness)
        self.eval()

    def encode_images(self, images: Tensor) -> EncodedImages:
        return EncodedImages(images[:, 0], images)

    def caption_form(self) -> CaptionForm:
        return CaptionForm(longest=self.longest)

    def project(self, tokens: Tensor) -> ImageMemory:
        crosses = [cast(CrossAttention, layer.cross) for layer in self.layers]
        segments = Segments.equal(tokens.shape[0], tokens.shape[1])
        return ImageMemory(tuple(cross.project(tokens.flatten(0, 1)) for cross in crosses), segments)

    def start_captions(self, images: EncodedImages, room: int) -> CaptionState:
        return CaptionState.begin(self.project(cast(Tensor, images.tokens)), 1 + len(self.layers), room)

    def continue_captions(self, state: CaptionState, texts: TextBatch) -> Tensor:
        self.steps.append(len(texts.ids))
        step = state.cache.extend(texts.segments, state.device)
        first, *caches = step.layers
        rows = self.lower(self.embedding(texts, step.positions), texts.segments, cache=first)
        for layer, memory, cache in zip(self.layers, state.memories(), caches, strict=True):
            rows = layer(rows, texts.segments, memory, cache=cache)
        logits: Tensor = self.head(rows[texts.segments.ends(rows.device)])
        return logits

    @torch.no_grad()
    def whole(self, image: Tensor, ids: Sequence[int]) -> Tensor:
        """Logits ``(V,)`` after ``ids`` about one picture ``(L, D)``, everything computed anew."""
        texts = TextBatch.of([ids])
        memory = self.project(image[None])
        rows = self.lower(self.embedding(texts), texts.segments, causal=True)
        for layer, (keys, values) in zip(self.layers, memory.layers, strict=True):
            seen = Memory(keys, values, memory.segments, Segments.equal(1, 1))
            rows = layer(rows, texts.segments, seen, causal=True)
        logits: Tensor = self.head(rows[-1])
        return logits


def pictures(count: int, seed: int = 1) -> Tensor:
    """``(count, 5, WIDTH)``."""
    return torch.randn(count, 5, WIDTH, generator=torch.Generator().manual_seed(seed)) * 2
