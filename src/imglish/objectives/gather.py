"""Collectives over ranks for losses that look at the batch of all of them; with one process they do nothing.

The convention behind all of them: every rank computes the mean loss of its own rows, and data-parallel training
averages parameter gradients over ranks. :func:`gather_with_grad` returns to each rank the *sum* over ranks of what
their losses say about its rows, so the average is the gradient of one process on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """Number of this rank, 0 without a process group."""
    return dist.get_rank() if _initialised() else 0


def _all_gather(x: Tensor) -> Tensor:
    out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


_differentiable: Callable[[Tensor], Tensor] = _GatherWithGrad.apply


def gather_with_grad(x: Tensor) -> Tensor:
    """``(B, ...)`` of every rank, in rank order -> ``(W * B, ...)``; B is the same on all ranks.

    The gradient of rank r's rows is summed over the losses of all ranks, so all ranks must run the backward pass.
    """
    if world_size() == 1:
        return x
    return _differentiable(x)


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Like :func:`gather_with_grad` without a gradient (ids, features of a momentum teacher)."""
    return x.detach() if world_size() == 1 else _all_gather(x)


def global_mean(total: Tensor, count: float | Tensor) -> Tensor:
    """This rank's share of the mean over all ranks: ``total * W / (sum of counts)``, 0-D.

    total: 0-D sum over this rank's ``count`` items. For losses whose number of items differs between ranks (masked
    tokens): averaged over ranks, values and gradients are the mean over all items. No items at all give zero.
    """
    everywhere = count.detach() if isinstance(count, Tensor) else torch.full((), float(count), device=total.device)
    everywhere = everywhere.to(total.dtype, copy=True)
    if world_size() > 1:
        dist.all_reduce(everywhere)
    return total * world_size() / everywhere.clamp(min=1)
