"""Image-text matching: hard negatives drawn from the contrastive similarities, and the loss (ALBEF, section 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def negative_weights(similarity: Tensor, query_ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """Probability that candidate n is drawn as the hard negative of query b.

    similarity: ``(B, N)`` logits; query_ids ``(B,)`` and candidate_ids ``(N,)``: equal ids are one picture and never
    negatives. Returns float32 ``(B, N)``, rows summing to one; a row without any candidate is zero.
    """
    same = query_ids[:, None] == candidate_ids[None, :]
    weights = torch.softmax(similarity.detach().float().masked_fill(same, -math.inf), dim=1)
    return weights.masked_fill(same, 0.0)


def draw_negatives(weights: Tensor, draws: Tensor) -> Tensor:
    """One candidate a row by the inverse of the cumulative distribution, all rows in one call.

    weights: ``(B, N)`` non-negative; draws: ``(B,)`` uniform in [0, 1), part of the batch, so that the choice depends
    on the sample and not on the device, the rank or what was drawn before. Returns int64 ``(B,)``: a candidate of
    positive weight, or N - 1 for a row without any (see :func:`has_negative`).
    """
    cumulative = weights.double().cumsum(dim=1)
    target = draws.double()[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return chosen.clamp(max=weights.shape[1] - 1)


def has_negative(weights: Tensor) -> Tensor:
    """Which rows of ``weights (B, N)`` have a candidate at all, bool ``(B,)``: none where all pictures are one."""
    return weights.sum(dim=1) > 0


def itm_loss(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Mean cross-entropy of ``logits (P, 2)`` against ``labels (P,)`` (1 = matched) over the ``counted`` pairs.

    counted: bool ``(P,)``; pairs that could not be built (no negative exists) stay out of the mean.
    """
    each = F.cross_entropy(logits.float(), labels, reduction="none")
    return (each * counted).sum() / counted.sum().clamp(min=1)


def itm_prior_entropy(negatives: float, positives: float = 1) -> float:
    """Loss (nats) of a matcher that has learned nothing but the share of positives: 0.6365 at one to two.

    A loss that stays there is the classic failure of ITM training.
    """
    p = positives / (positives + negatives)
    return -(p * math.log(p) + (1 - p) * math.log(1 - p)) if 0 < p < 1 else 0.0
