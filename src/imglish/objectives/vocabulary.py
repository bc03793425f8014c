"""Cross-entropy over a large vocabulary without the logits of all positions at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.objectives.gather import global_mean


def vocabulary_loss(
    rows: Tensor, weight: Tensor, targets: Tensor, count: float | None = None, chunk: int | None = 1024
) -> Tensor:
    """Mean cross-entropy of the logits ``rows @ weight.T`` against ``targets``, 0-D float32.

    rows: ``(M, D)``; weight: ``(V, D)``, an output matrix without bias; targets: int64 ``(M,)``. The mean is over the
    targets of all ranks; where this is one of several parts of a batch, ``count`` is the number of targets of a part on
    average (else M), as in :func:`imglish.objectives.lm.lm_loss`. chunk: rows whose logits exist at a time; the
    gradient is made along with the value, so memory is O(chunk * V) and no product is computed twice. None: all rows
    at once, by autograd.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, it must be at least 1")
    if chunk is None or not torch.is_grad_enabled():
        parts = zip(rows.split(chunk or max(1, len(rows))), targets.split(chunk or max(1, len(rows))), strict=True)
        sums = [F.cross_entropy(F.linear(x, weight).float(), wanted, reduction="sum") for x, wanted in parts]
        total = torch.stack(sums).sum()
    else:
        total = _chunked(rows, weight, targets, chunk)
    return global_mean(total, targets.shape[0] if count is None else count)


class _Chunked(torch.autograd.Function):
    """The sum of the losses; softmax - target of each chunk goes into both gradients at once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        total = torch.zeros((), device=rows.device)
        grad_rows, grad_weight = torch.empty_like(rows), torch.zeros_like(weight)
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = F.linear(rows[part], weight).float()
            wanted = targets[part, None]
            largest = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (largest - logits.gather(1, wanted)).sum()
            error = logits.sub_(largest).exp_().scatter_add_(1, wanted, -torch.ones_like(largest))
            grad_rows[part] = (error @ weight).to(rows.dtype)
            grad_weight += (error.T @ rows[part]).to(weight.dtype)
        ctx.save_for_backward(grad_rows, grad_weight)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_weight = ctx.saved_tensors
        return grad_rows * upstream.to(grad_rows.dtype), grad_weight * upstream.to(grad_weight.dtype), None, None


_chunked: Callable[[Tensor, Tensor, Tensor, int], Tensor] = _Chunked.apply
