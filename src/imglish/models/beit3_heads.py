"""The released fine-tuning heads of BEiT-3 for questions, pairs of pictures and classes (their ``modeling_finetune``).

Retrieval and captioning are objectives of :class:`imglish.models.beit3.Beit3` itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import TextBatch
from imglish.models.beit_heads import class_layer
from imglish.models.multiway import Multiway, init_multiway
from imglish.nn.packing import Packing
from imglish.nn.segments import Segments


class Beit3Vqa(nn.Module):
    """Visual question answering as a choice among frequent answers: the class token of the pair, pooled, then an MLP.

    The body has no final norm, the pooler one of its own.
    """

    def __init__(self, body: Multiway, answers: int = 3129) -> None:
        super().__init__()
        width = body.config.width
        self.body = body
        self.pool_norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, width)
        self.hidden = nn.Linear(width, 2 * width)
        self.hidden_norm = nn.LayerNorm(2 * width)
        self.answer = nn.Linear(2 * width, answers)
        for layer in (self.pool, self.hidden, self.answer):
            init_multiway(layer, width)

    def pooled(self, images: Tensor, questions: TextBatch) -> Tensor:
        """Question b about picture b -> ``(B, D)``."""
        states = self.body.pairs(self.body.picture_rows(images), self.body.text_rows(questions), questions.segments)
        return torch.tanh(self.pool(self.pool_norm(states[:, 0])))

    def forward(self, images: Tensor, questions: TextBatch) -> Tensor:
        """Logits ``(B, answers)``, each a yes or no of its own."""
        logits: Tensor = self.answer(F.gelu(self.hidden_norm(self.hidden(self.pooled(images, questions)))))
        return logits

    def loss(self, images: Tensor, questions: TextBatch, scores: Tensor) -> Tensor:
        """Binary cross-entropy against the answers' soft ``scores (B, answers)``, summed over answers."""
        logits = self(images, questions).float()
        return F.binary_cross_entropy_with_logits(logits, scores) * scores.shape[1]


class Beit3Nlvr2(nn.Module):
    """Is a statement true of two (or more) pictures? Each is read beside the statement; an MLP looks at all."""

    def __init__(self, body: Multiway, classes: int = 2, pictures: int = 2) -> None:
        super().__init__()
        width = body.config.width
        self.body = body
        self.norm1 = nn.LayerNorm(2 * pictures * width)
        self.dense1 = nn.Linear(2 * pictures * width, 2 * width)
        self.norm2 = nn.LayerNorm(2 * width)
        self.dense2 = nn.Linear(2 * width, classes)
        for layer in (self.dense1, self.dense2):
            init_multiway(layer, width)
            with torch.no_grad():
                layer.weight.mul_(0.001)

    def forward(self, images: Sequence[Tensor], statements: TextBatch) -> Tensor:
        """Statement b about pictures ``images[0][b]``, ``images[1][b]``, ... -> logits ``(B, classes)``; all pairs of a
        statement pass the body together, the statement is embedded once."""
        segments, times = statements.segments, len(images)
        pictures = self.body.picture_rows(torch.cat(list(images)))
        rows = self.body.text_rows(statements)
        states = self.body.pairs(pictures, rows.repeat(times, 1), Segments(segments.lengths * times))  # (n B, 2, D)
        x = torch.cat([part.flatten(1) for part in states.split(len(statements))], dim=1)
        logits: Tensor = self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(x)))))
        return logits

    def loss(self, images: Sequence[Tensor], statements: TextBatch, labels: Tensor) -> Tensor:
        """Cross-entropy against ``labels (B,)``, mean."""
        return F.cross_entropy(self(images, statements).float(), labels)


class Beit3Classifier(nn.Module):
    """Classes of pictures: the mean of the patches, a norm, a linear layer (ImageNet). The body has no final norm."""

    def __init__(self, body: Multiway, classes: int = 1000) -> None:
        super().__init__()
        self.body = body
        self.norm = nn.LayerNorm(body.config.width)
        self.head = class_layer(body.config.width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> logits ``(B, classes)``."""
        pictures = self.body.picture_rows(images)
        segments = Segments.equal(*pictures.shape[:2])
        states = self.body.transform(pictures.flatten(0, 1), Packing(image=segments)).unflatten(0, (len(images), -1))
        logits: Tensor = self.head(self.norm(states[:, 1:].mean(1)))
        return logits
