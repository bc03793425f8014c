"""Masked language modelling on masked positions only (BERT; with soft targets of a momentum teacher: ALBEF, eq. 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.objectives.gather import global_mean


def mlm_loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """(1 - alpha) cross-entropy + alpha soft cross-entropy to the teacher, both means over masked positions.

    logits, teacher_logits: ``(M, V)``; labels: int64 ``(M,)``. The mean is over the masked positions of all ranks, so
    that gradients do not depend on how the batch is divided. M may be zero.
    """
    logits = logits.float()
    total = F.cross_entropy(logits, labels, reduction="sum")
    if teacher_logits is not None and alpha > 0:
        soft = torch.softmax(teacher_logits.float(), dim=1)
        total = (1 - alpha) * total - alpha * (F.log_softmax(logits, dim=1) * soft).sum()
    return global_mean(total, labels.shape[0])
