"""Language modelling: the next token, where there is one to be predicted (BLIP, section 3.2; CoCa, equation 5)."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from imglish.nn.segments import Segments
from imglish.objectives.gather import global_mean


def lm_rows(segments: Segments, prompt: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Which rows predict, and which rows they predict: int64 ``(M,)`` each, row numbers of ``segments``, ascending.

    Every token but the last of its text predicts its successor. The first ``prompt`` tokens behind the opening one are
    given, not predicted. M may be zero.
    """
    within = np.arange(segments.total) - np.repeat(segments.bounds[:-1], segments.lengths)
    targets = np.flatnonzero(within > prompt)
    return targets - 1, targets


def lm_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0, count: float | None = None) -> Tensor:
    """Mean cross-entropy of ``logits (M, V)`` against the next tokens ``targets (M,)``, 0-D.

    smoothing: share of the target's probability that is spread over the vocabulary (BLIP 0.1). Give it only positions
    with a target. The mean is over those of all ranks, so that gradients do not depend on how the batch is divided;
    where this is one of several parts of a batch, ``count`` is the number of targets of a part on average (else M).
    """
    total = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
    return global_mean(total, targets.shape[0] if count is None else count)
