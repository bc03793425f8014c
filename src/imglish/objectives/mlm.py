"""Masked language modelling on masked positions only (BERT; with soft targets of a momentum teacher: ALBEF, eq. 7)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.objectives.gather import global_mean


def mlm_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    alpha: float = 0.0,
    count: float | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """(1 - alpha) cross-entropy + alpha soft cross-entropy to the teacher, both means over masked positions.

    logits, teacher_logits: ``(M, V)``; labels: int64 ``(M,)``; count: what to divide by (default M; for one of several
    parts of a batch, the mean of their M); smoothing: share of each label that is spread over all V. The mean is over
    the masked positions of all ranks, so that gradients do not depend on how the batch is divided. M may be zero.
    """
    logits = logits.float()
    total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    if teacher_logits is not None and alpha > 0:
        soft = torch.softmax(teacher_logits.float(), dim=1)
        total = (1 - alpha) * total - alpha * (F.log_softmax(logits, dim=1) * soft).sum()
    return global_mean(total, labels.shape[0] if count is None else count)


def smoothed_mlm_loss(
    logits: Tensor, labels: Tensor, smoothing: float, drop_worst: float = 0.0, count: float | None = None
) -> Tensor:
    """Divergence from targets of which ``smoothing`` is spread over the other words, mean over masked positions.

    logits: ``(M, V)``; labels: int64 ``(M,)``. Zero is a perfect prediction of these targets: their entropy is taken
    off, as BEiT-3's captioning does. drop_worst: leave out this share of the positions, those of largest loss (of this
    rank and part of a batch), which are often wrong captions. The mean is over the positions of all ranks; count: as in
    :func:`mlm_loss`, without ``drop_worst``.
    """
    others = logits.shape[1] - 1
    log_p = F.log_softmax(logits.float(), dim=1)
    right = log_p.gather(1, labels[:, None])[:, 0]
    each = -(1 - smoothing) * right
    if smoothing > 0:
        each = each - smoothing / others * (log_p.sum(1) - right)
        each = each + (1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(smoothing / others)
    if drop_worst > 0:
        each = each.topk(int(labels.shape[0] * (1 - drop_worst)), largest=False).values
        count = None
    return global_mean(each.sum(), each.shape[0] if count is None else count)
