"""ALBEF's task models (Li et al. 2021, section 5): a head reads the [CLS] of the fused text.

Visual entailment: does the picture entail, contradict, or leave open what the text says? NLVR2: is the sentence true of
several pictures? The fusion layers are there once a picture, one after the other, with shared keys and values.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import Batch, TextBatch
from imglish.models.albef import Albef
from imglish.models.aligned import project
from imglish.models.answering import AnswerDecoder
from imglish.nn.attention import Memory
from imglish.nn.blocks import Block
from imglish.nn.segments import Ragged, Rows, Segments
from imglish.objectives.gather import gather, gather_with_grad, rank
from imglish.objectives.itm import draw_negatives, has_negative, negative_weights
from imglish.objectives.mlm import mlm_loss


class _Task(nn.Module):
    """An ALBEF and two linear layers that read the fused [CLS]."""

    def __init__(self, albef: Albef, classes: int) -> None:
        super().__init__()
        width = albef.config.width
        self.albef = albef
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))

    def classify(self, cls: Tensor) -> Tensor:
        return cast(Tensor, self.head(cls))

    @staticmethod
    def loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float = 0.0) -> Tensor:
        """Cross-entropy of ``logits (B, C)`` with ``labels (B,)``; a share ``alpha`` of it with what the momentum copy
        says in place of the labels (section 3.3, applied to the task)."""
        return mlm_loss(logits, labels, teacher_logits, alpha)


class AlbefEntailment(_Task):
    """Visual entailment (SNLI-VE: 3 classes), or any other classification of a picture with a text."""

    def __init__(self, albef: Albef, classes: int = 3) -> None:
        super().__init__(albef, classes)

    def states(self, images: Tensor, texts: TextBatch, read: Rows | None = None) -> Tensor:
        """Fused states ``(T, D)`` of text b with picture b, or the rows of ``read``."""
        if len(images) != len(texts):
            raise ValueError(f"{len(texts)} texts do not go with {len(images)} pictures one to one")
        rows = self.albef.encode_texts(texts).rows
        assert rows is not None
        memory = self.albef.project_images(self.albef.vision(images))
        return self.albef.fuse(rows, texts.segments, memory, Segments.equal(len(texts), 1), read)

    def forward(self, images: Tensor, texts: TextBatch) -> Tensor:
        """Logits ``(B, classes)``."""
        return self.classify(self.states(images, texts, Rows.first(texts.segments, texts.ids.device)))


class AlbefVqa(nn.Module):
    """Open answers: a decoder over the fused states of the question; it begins as the fusion layers."""

    def __init__(self, albef: Albef, start: int, depth: int | None = None) -> None:
        super().__init__()
        self.albef = albef
        layers = list(albef.fusion_layers)
        self.decoder = AnswerDecoder(albef.config, len(layers) if depth is None else depth, start, types=2)
        if depth is None:
            self.decoder.begin_as(albef.embedding, layers, albef.mlm_head)

    def questions(self, images: Tensor, texts: TextBatch) -> Ragged:
        """Fused states of question b about picture b."""
        rows = self.albef.encode_texts(texts).rows
        assert rows is not None
        memory = self.albef.project_images(self.albef.vision(images))
        states = self.albef.fuse(rows, texts.segments, memory, Segments.equal(len(texts), 1))
        return Ragged(states, texts.segments)


class AlbefReasoning(_Task):
    """NLVR2, and more than two pictures to a sentence: layer by layer the text looks at each of them in turn.

    Takes over ``albef``: each of its fusion layers becomes one a picture, with equal weights at the start; they share
    the projections to keys and values for good, nothing else.
    """

    def __init__(self, albef: Albef, pictures: int = 2, classes: int = 2) -> None:
        super().__init__(albef, classes)
        if pictures < 1:
            raise ValueError(f"{pictures} pictures to a sentence")
        self.pictures = pictures
        layers = []
        for first in list(albef.fusion_layers):
            layers.append(first)
            for _ in range(1, pictures):
                layer = copy.deepcopy(cast(Block, first))
                assert layer.cross is not None
                layer.cross.kv = cast(Block, first).cross.kv  # type: ignore[union-attr]
                layers.append(layer)
        albef.fusion_layers = nn.ModuleList(layers)

    def states(self, images: Sequence[Tensor], texts: TextBatch, read: Rows | None = None) -> Tensor:
        """Fused states ``(T, D)``; ``images[n]`` ``(B, 3, H, W)``: the n-th picture of each text."""
        if len(images) != self.pictures:
            raise ValueError(f"{len(images)} pictures to a sentence, the model reads {self.pictures}")
        if any(len(each) != len(texts) for each in images):
            raise ValueError(f"{len(texts)} texts, {[len(each) for each in images]} pictures")
        return self.states_of(self.albef.vision(torch.cat(list(images))).split(len(texts)), texts, read)

    def states_of(self, tokens: Sequence[Tensor], texts: TextBatch, read: Rows | None = None) -> Tensor:
        """Fused states ``(T, D)`` from the pictures' tokens ``(B, L, D)``."""
        rows = self.albef.encode_texts(texts).rows
        assert rows is not None
        count = len(texts)
        layers = list(self.albef.fusion_layers)
        memories = [project(layers[n :: self.pictures], each) for n, each in enumerate(tokens)]
        for number, layer in enumerate(layers):
            turn, picture = divmod(number, self.pictures)
            memory = memories[picture]
            keys, values = memory.layers[turn]
            seen = Memory(keys, values, memory.segments, Segments.equal(count, 1))
            rows = layer(rows, texts.segments, memory=seen, read=read if number == len(layers) - 1 else None)
        return rows

    def forward(self, images: Sequence[Tensor], texts: TextBatch) -> Tensor:
        """Logits ``(B, 2)``, column 1 = true."""
        return self.classify(self.states(images, texts, Rows.first(texts.segments, texts.ids.device)))


class AlbefAssignment(nn.Module):
    """Pre-training for NLVR2 by text assignment (section 5, "NLVR2"): a caption with two pictures belongs to the first,
    to the second, or to neither of them, each in a third of the cases.

    The other pictures are drawn from the batch of all ranks, by likeness to the caption's own (hard negatives).
    """

    temperature = 0.07

    def __init__(self, albef: Albef) -> None:
        super().__init__()
        self.reasoning = AlbefReasoning(albef)
        self.head = nn.Linear(albef.config.width, 3)

    def assign(self, features: Tensor, ids: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """features: ``(B, E)`` of the pictures, normalised; ids: ``(B,)``; draws: ``(B, 2)`` uniform. Returns the first
        and the second picture of each caption, numbers int64 ``(B,)`` in the batch of all ranks, and the classes."""
        everyone = gather(ids)
        weights = negative_weights(features @ gather(features).T / self.temperature, ids, everyone)
        own = torch.arange(len(ids), device=ids.device) + rank() * len(ids)
        case, rest = (draws[:, 0] * 3).long().clamp(max=2), (draws[:, 0] * 3) % 1
        one = draw_negatives(weights, draws[:, 1])
        others = weights.scatter(1, one[:, None], 0.0)
        two = torch.where(has_negative(others), draw_negatives(others, rest), one)
        return torch.where(case == 0, own, one), torch.where(case == 1, own, torch.where(case == 0, one, two)), case

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``(B, 3)`` and classes ``(B,)``."""
        albef, texts = self.reasoning.albef, batch.texts
        tokens = albef.vision(batch.squares)
        with torch.no_grad():
            features = F.normalize(albef.image_proj(tokens[:, 0].detach()).float(), dim=-1)
            first, second, case = self.assign(features, batch.image_ids, batch.draws)
        pictures = gather_with_grad(tokens)
        read = Rows.first(texts.segments, texts.ids.device)
        cls = self.reasoning.states_of([pictures[first], pictures[second]], texts, read)
        return cast(Tensor, self.head(cls)), case
