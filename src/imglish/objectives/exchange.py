"""Packed rows of all ranks, and samples that other ranks ask for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from imglish.nn.segments import Segments, upload_index
from imglish.objectives.gather import gather, gather_with_grad, rank, world_size


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


@torch.no_grad()
def exchange_samples(x: Tensor, wanted: Sequence[np.ndarray]) -> Tensor:
    """Samples that lie on other ranks, without gradient: only what is asked for travels, once.

    x: ``(B, ...)`` of this rank, sample number ``rank * B + b``; wanted: for each rank the numbers that it asks for,
    the same list on all ranks (host). Returns this rank's, ``(len(wanted[rank]), ...)``, in the order asked for.
    """
    mine, size, world = rank(), x.shape[0], world_size()
    asked = [np.asarray(numbers, dtype=np.int64) for numbers in wanted]
    sent = [numbers[numbers // size == mine] - mine * size for numbers in asked]
    owner = asked[mine] // size
    order = np.argsort(owner, kind="stable")  # what arrives lies in the order of its owners
    flat = x.reshape(size, -1)
    received = flat.new_empty(len(order), flat.shape[1])
    if world == 1:
        received = flat[upload_index(asked[0], x.device)]
    else:
        parcels = flat[upload_index(np.concatenate(sent), x.device)]
        counts = np.bincount(owner, minlength=world).tolist()
        dist.all_to_all_single(received, parcels, counts, [len(numbers) for numbers in sent])
        received = received[upload_index(np.argsort(order, kind="stable"), x.device)]
    return received.reshape(-1, *x.shape[1:])
