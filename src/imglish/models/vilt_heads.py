"""ViLT's task models (section 4.3): one Transformer, and a head that reads the pooled [CLS] of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from imglish.data.batch import TextBatch
from imglish.data.pictures import Pictures
from imglish.models.vilt import Pairs, Vilt
from imglish.nn.segments import Ragged, Rows


def two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear, LayerNorm, GELU, linear."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outputs))


class _Task(nn.Module):
    """A ViLT whose pooled pairs a head reads."""

    def __init__(self, vilt: Vilt) -> None:
        super().__init__()
        self.vilt = vilt

    def pooled(self, images: Pictures, texts: TextBatch, kind: int = 1) -> Tensor:
        """Text t with picture ``t * pictures // texts`` (equally many texts a picture, one behind the other): pooled
        ``(N, D)``. kind: token type of the pictures."""
        pictures, words = self.vilt.embed_images(images, kind).tokens, self.vilt.embed_texts(texts)
        assert isinstance(pictures, Ragged)
        assert words.rows is not None
        each, rest = divmod(len(texts), len(pictures))
        if rest:
            raise ValueError(f"{len(texts)} texts are not equally many for each of {len(pictures)} pictures")
        number = np.arange(len(texts))
        pairs = Pairs.of(Ragged(words.rows, words.segments), pictures, number, number // each)
        first = Rows.first(pairs.segments, pairs.rows.device)
        return self.vilt.pool(self.vilt.read_pairs(pairs, first))


class ViltAnswers(_Task):
    """Visual question answering as classification (VQAv2: 3129 answers)."""

    def __init__(self, vilt: Vilt, answers: int = 3129) -> None:
        super().__init__(vilt)
        width = vilt.config.width
        self.head = two_layers(width, 2 * width, answers)

    def forward(self, images: Pictures, questions: TextBatch) -> Tensor:
        """Logits ``(N, answers)``."""
        return cast(Tensor, self.head(self.pooled(images, questions)))


class ViltReasoning(_Task):
    """NLVR2: is the sentence true of the pictures? The pair method: the text is read with each of them."""

    def __init__(self, vilt: Vilt, pictures: int = 2, classes: int = 2) -> None:
        super().__init__(vilt)
        if vilt.config.types < 1 + pictures:
            raise ValueError(f"{pictures} pictures need a token type each: set types={1 + pictures}")
        width = vilt.config.width
        self.head = two_layers(pictures * width, 2 * width, classes)

    def forward(self, images: Sequence[Pictures], texts: TextBatch) -> Tensor:
        """Logits ``(N, classes)``, column 1 = true; ``images[n]``: the n-th picture of each text."""
        pooled = [self.pooled(pictures, texts, kind) for kind, pictures in enumerate(images, 1)]
        return cast(Tensor, self.head(torch.cat(pooled, dim=1)))


class ViltRanking(_Task):
    """Retrieval fine-tuning: one score a pair; it starts as the "matched" row of the ITM head where there is one."""

    def __init__(self, vilt: Vilt) -> None:
        super().__init__(vilt)
        self.head = nn.Linear(vilt.config.width, 1)
        if vilt.itm_head is not None:
            with torch.no_grad():
                self.head.weight.copy_(vilt.itm_head.weight[1:])
                self.head.bias.copy_(vilt.itm_head.bias[1:])

    def forward(self, images: Pictures, texts: TextBatch) -> Tensor:
        """Scores ``(B, n)`` of the n texts of each picture; the loss is a cross-entropy among them."""
        return cast(Tensor, self.head(self.pooled(images, texts))).view(len(images), -1)
