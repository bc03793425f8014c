"""Packed rows of all ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from imglish.nn.segments import Segments, upload_index
from imglish.objectives.gather import gather, gather_with_grad


def gather_rows(rows_TD: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
    """The packed sequences of all ranks, in rank order, with gradient: rows ``(T_all, D)`` and their segments.

    Every rank holds equally many sequences. Lengths travel as a host tensor (so the device is not waited for; under
    CUDA the process group needs a CPU backend beside NCCL), rows in a padded view that lives in this call only.
    """
    everyone = Segments.of(gather(torch.tensor(segments.lengths)).tolist())
    padded = rows_TD.new_zeros(segments.count * everyone.longest, rows_TD.shape[1])
    within = np.arange(segments.total) - np.repeat(segments.bounds[:-1], segments.lengths)
    mine = np.repeat(np.arange(segments.count) * everyone.longest, segments.lengths) + within
    padded = padded.index_copy(0, upload_index(mine, rows_TD.device), rows_TD)
    gathered = gather_with_grad(padded.unflatten(0, (segments.count, everyone.longest)))
    return gathered.flatten(0, 1)[everyone.slots(rows_TD.device)], everyone
