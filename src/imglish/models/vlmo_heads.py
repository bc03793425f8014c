"""VLMo's task models (section 3.4): a head reads the pooled [CLS] of pairs. Retrieval needs none: it is ITC alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from imglish.data.batch import TextBatch
from imglish.models.capabilities import EncodedTexts
from imglish.models.vilt_heads import two_layers
from imglish.models.vlmo import Vlmo
from imglish.models.vlmo_body import IMAGE


class _Task(nn.Module):
    """A VLMo whose pairs a head reads; the pooler is that of the ITM where the model has one."""

    def __init__(self, vlmo: Vlmo) -> None:
        super().__init__()
        width = vlmo.config.width
        self.vlmo = vlmo
        self.pooler = vlmo.pooler if vlmo.config.itm else nn.Linear(width, width)

    def pooled(self, images: Tensor, texts: TextBatch, kind: int = IMAGE) -> Tensor:
        """Text b with picture b: pooled ``(B, D)``. kind: token type of the pictures."""
        if len(images) != len(texts):
            raise ValueError(f"{len(texts)} texts do not go with {len(images)} pictures one to one")
        rows, own = self.vlmo.text_rows(texts), range(len(texts))
        memory = self.vlmo.project_images(self.vlmo.picture_rows(images, kind))
        return torch.tanh(self.pooler(self.vlmo.pooled(memory, EncodedTexts(rows[:0], texts.segments, rows), own, own)))


class VlmoAnswers(_Task):
    """Visual question answering as classification (VQAv2: 3129 answers)."""

    def __init__(self, vlmo: Vlmo, answers: int = 3129) -> None:
        super().__init__(vlmo)
        width = vlmo.config.width
        self.head = two_layers(width, 2 * width, answers)

    def forward(self, images: Tensor, questions: TextBatch) -> Tensor:
        """Logits ``(B, answers)``."""
        return cast(Tensor, self.head(self.pooled(images, questions)))


class VlmoReasoning(_Task):
    """NLVR2: is the sentence true of the pictures? The text is read with each of them."""

    def __init__(self, vlmo: Vlmo, pictures: int = 2, classes: int = 2) -> None:
        super().__init__(vlmo)
        if vlmo.config.types < 1 + pictures:
            raise ValueError(f"{pictures} pictures need a token type each: set types={1 + pictures}")
        width = vlmo.config.width
        self.head = two_layers(pictures * width, 2 * width, classes)

    def forward(self, images: Sequence[Tensor], texts: TextBatch) -> Tensor:
        """Logits ``(N, classes)``, column 1 = true; ``images[n]``: the n-th picture of each text."""
        pooled = [self.pooled(pictures, texts, kind) for kind, pictures in enumerate(images, IMAGE)]
        return cast(Tensor, self.head(torch.cat(pooled, dim=1)))
