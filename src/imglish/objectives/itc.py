"""Contrastive losses between the pictures and the texts of a batch: InfoNCE (CLIP), sigmoid (SigLIP), hinges (VSE++).

All of them compare the rows of this rank with the columns of all ranks, and return the mean over this rank's rows.
A picture may stand beside several captions at once: then there are n texts a picture, one behind the other.
Suffixes: B pictures and M = n * B texts of this rank, N columns of all ranks, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from imglish.objectives.gather import gather, gather_with_grad, rank, world_size


def itc_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, ids: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021, figure 3), in float32, gathered over ranks with gradient; 0-D.

    image: ``(B, E)``, text: ``(n * B, E)``, L2-normalised, the n captions of picture b one behind the other;
    logit_scale: 0-D factor (1 / temperature, not its logarithm). ids: int64 ``(B,)``: pictures and texts of equal ids
    are positives of each other, their targets uniform (as in ALBEF's fine-tuning); None: every picture is its own.
    chunk: compute that many rows of the similarity matrix at a time, memory O(chunk * N) in place of O(B * N); value
    and gradient are the same. No similarity is kept for the backward pass in any case.
    """
    _check_chunk(chunk)
    with _full_precision(image):
        image, text = _as_float(image), _as_float(text)
        image_ids, text_ids = _ids(image, text, ids)
        chunk = image.shape[0] if chunk is None else chunk
        if world_size() == 1:  # one matrix serves both directions
            return _nce(image, text, logit_scale, image_ids, text_ids, chunk, True) / 2
        i2t = _nce(image, gather_with_grad(text), logit_scale, image_ids, gather(text_ids), chunk, False)
        t2i = _nce(text, gather_with_grad(image), logit_scale, text_ids, gather(image_ids), chunk, False)
        return (i2t + t2i) / 2


def itc_loss_of_own_features(image: Tensor, text: Tensor, logit_scale: Tensor, ids: Tensor) -> Tensor:
    """InfoNCE as VLMo's official code computes it: other ranks' features take part without their gradient.

    Arguments as in :func:`itc_loss`. Each rank computes the loss of the whole batch; averaged over W ranks the features
    receive 1 / W of its gradient, so the loss weighs the less the more ranks there are. For comparison only.
    """
    with _full_precision(image):
        image, text = (_own_among_all(_as_float(x)) for x in (image, text))
        everyone = gather(ids)
        targets = (everyone[:, None] == everyone[None, :]).float()
        targets /= targets.sum(1, keepdim=True)
        logits = logit_scale * image @ text.T
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def _own_among_all(x: Tensor) -> Tensor:
    """``(B, E)`` of every rank in rank order, ``(N, E)``; a gradient comes back for the rows of this rank only."""
    everyone, first = gather(x), rank() * x.shape[0]
    return torch.cat([everyone[:first], x, everyone[first + x.shape[0] :]])


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    ids: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sigmoid loss (Zhai et al. 2023, equation 1): every pair a binary question; sum over pairs, mean over pictures.

    Arguments as in :func:`itc_loss`; logit_bias: 0-D, added to the scaled similarities, or None. With ``ids``
    pairs of equal ids are positives. ``chunk`` recomputes ``chunk`` rows at a time in the backward pass.
    """
    _check_chunk(chunk)
    with _full_precision(image):
        image, text = _as_float(image), _as_float(text)
        row_ids, text_ids = _ids(image, text, ids)
        text, column_ids = gather_with_grad(text), gather(text_ids)
        bias = logit_scale.new_zeros(()) if logit_bias is None else logit_bias

        def pairs(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, wanted: Tensor) -> Tensor:
            logits = rows @ columns.T * scale + bias
            positive = wanted[:, None] == column_ids[None, :]
            return -F.logsigmoid(torch.where(positive, logits, -logits)).sum()

        if chunk is None:
            return pairs(image, text, logit_scale, bias, row_ids) / image.shape[0]
        total = image.new_zeros(())
        for rows, wanted in zip(image.split(chunk), row_ids.split(chunk), strict=True):
            part = checkpoint(
                pairs, rows, text, logit_scale, bias, wanted, use_reentrant=False, preserve_rng_state=False
            )
            total = total + part
        return total / image.shape[0]


def hinge_loss(
    image: Tensor, text: Tensor, margin: float = 0.2, hardest: float = 1.0, ids: Tensor | None = None
) -> Tensor:
    """Ranking loss of VSE++ (Faghri et al. 2018, equation 6): max(0, margin + s(negative) - s(positive)), both ways.

    image: ``(B, E)``, text: ``(n * B, E)`` L2-normalised: n * B pairs, the picture is repeated for its n captions.
    hardest: share of the nearest negative of each row alone (max of hinges); the rest of the loss is the sum over all
    negatives (their equation 5). Pairs of equal ``ids`` are never negatives. The paper sums over the pairs; this is
    their mean, so that the learning rate does not depend on the batch size.
    """
    with _full_precision(image):
        image, text = _as_float(image), _as_float(text)
        _, row_ids = _ids(image, text, ids)
        column_ids = gather(row_ids)
        image = image.repeat_interleave(text.shape[0] // image.shape[0], dim=0)
        positive = (image * text).sum(dim=1, keepdim=True)
        known = row_ids[:, None] == column_ids[None, :]

        def direction(rows: Tensor, columns: Tensor) -> Tensor:
            cost = (margin + rows @ columns.T - positive).clamp(min=0).masked_fill(known, 0.0)
            if hardest == 1:
                return cost.amax(dim=1).mean()
            return torch.lerp(cost.sum(dim=1), cost.amax(dim=1), hardest).mean()

        return direction(image, gather_with_grad(text)) + direction(text, gather_with_grad(image))


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, it must be at least 1")


def _full_precision(x: Tensor) -> torch.autocast:
    """Similarities times a scale of up to 100 need float32 products: no autocast inside a contrastive loss."""
    kind = x.device.type
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)  # "meta" has none


def _as_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _ids(image: Tensor, text: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids of this rank's pictures ``(B,)`` and texts ``(n * B,)``; without ids every picture is its own."""
    count = image.shape[0]
    captions, rest = divmod(text.shape[0], count)
    if rest:
        raise ValueError(f"{text.shape[0]} texts cannot be divided among {count} pictures")
    if ids is None:
        ids = torch.arange(count, device=image.device) + rank() * count
    return ids, ids if captions == 1 else ids.repeat_interleave(captions)


class _Nce(torch.autograd.Function):
    """InfoNCE of rows against columns, and with ``both`` of columns against rows too, ``chunk`` rows at a time.

    The value is the mean over the rows, with ``both`` plus the mean over the columns. Forward keeps the log-sum-exp of
    each row (and of each column, accumulated over the chunks: the online form of Milakov & Gimelshein 2018); backward
    computes the similarities again, by the same operations, and turns them into softmax - target: exactly zero where
    single positives are told apart.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        row_ids: Tensor,
        column_ids: Tensor,
        chunk: int,
        both: bool,
    ) -> Tensor:
        counts = _occurrences(row_ids, column_ids)
        row_lse, positive = rows.new_empty(2, rows.shape[0])
        column_lse = rows.new_full((columns.shape[0],), -math.inf) if both else None
        column_positive = rows.new_zeros(columns.shape[0])
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (rows[part] @ columns.T).mul_(scale)
            row_lse[part] = torch.logsumexp(logits, dim=1)
            if column_lse is not None:
                torch.logaddexp(column_lse, torch.logsumexp(logits, dim=0), out=column_lse)
            logits.mul_(row_ids[part, None] == column_ids)
            positive[part] = logits.sum(dim=1) / counts[part]
            column_positive += logits.sum(dim=0)
        total = (row_lse - positive).mean()
        column_counts = None
        if column_lse is not None:
            column_counts = _occurrences(column_ids, row_ids)
            total = total + (column_lse - column_positive / column_counts).mean()
        ctx.save_for_backward(rows, columns, scale, row_ids, column_ids, counts, row_lse, column_counts, column_lse)
        ctx.chunk = chunk
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, row_ids, column_ids, counts, row_lse, column_counts, column_lse = ctx.saved_tensors
        target = 1 / counts[:, None].to(rows.dtype)
        ratio = rows.shape[0] / columns.shape[0]  # of the means' denominators: a row counts 1, a column so much
        if column_counts is not None:
            column_target = ratio / column_counts.to(rows.dtype)
        grad_rows, grad_columns = torch.empty_like(rows), torch.zeros_like(columns)
        grad_scale = rows.new_zeros(())
        for start in range(0, rows.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            similarity = rows[part] @ columns.T
            logits = similarity * scale
            grad = torch.exp(logits - row_lse[part, None])
            wanted = target[part]
            if column_lse is not None:
                grad += logits.sub_(column_lse).exp_().mul_(ratio)
                wanted = wanted + column_target
            grad -= (row_ids[part, None] == column_ids) * wanted
            torch.mm(grad, columns, out=grad_rows[part])
            grad_columns.addmm_(grad.T, rows[part])
            grad_scale += similarity.mul_(grad).sum()
        factor = upstream / rows.shape[0]
        grads = (grad_rows.mul_(scale * factor), grad_columns.mul_(scale * factor), grad_scale * factor)
        return *grads, None, None, None, None


def _occurrences(ids: Tensor, among: Tensor) -> Tensor:
    """How often each of ``ids (B,)`` occurs in ``among (N,)``, without a matrix of B x N."""
    ordered = among.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


_nce: Callable[..., Tensor] = _Nce.apply
