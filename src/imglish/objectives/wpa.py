"""Word-patch (or word-region) alignment: the cost of moving a text's words onto its picture (UNITER, eq. 3-5; ViLT).

The transport plan comes from IPOT (Xie et al. 2019, "A fast proximal point method for computing exact Wasserstein
distance"): each step scales the kernel exp(-cost / beta), multiplied by the plan so far, to the two marginals once.
All pairs of a batch are one padded call; the pads carry no mass, so they change nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.nn.segments import Segments


def alignment_distance(
    words: Tensor,
    word_segments: Segments,
    patches: Tensor,
    patch_segments: Segments,
    beta: float = 0.5,
    iterations: int = 50,
) -> Tensor:
    """Transport cost of each pair of word rows and patch rows under cosine costs, float32 ``(N,)``.

    words ``(T, D)``, patches ``(S, D)``: packed rows; pair n takes the n-th sequence of both. All rows of a sequence
    weigh alike. The plan is found without gradient; the cost under it has one. A pair without words or patches: 0.
    """
    with torch.autocast(words.device.type, enabled=False):
        cost, valid = cosine_cost(words, word_segments, patches, patch_segments)
        plan = transport_plan(cost.detach(), valid, beta, iterations)
        return (cost * plan).sum(dim=(1, 2))


def cosine_cost(
    words: Tensor, word_segments: Segments, patches: Tensor, patch_segments: Segments
) -> tuple[Tensor, Tensor]:
    """1 - cosine of every word and every patch of a pair, float32 ``(N, M, P)`` padded to the longest; and bool of the
    same shape, where there is both a word and a patch (elsewhere the cost is 0)."""
    device = words.device
    padded = [
        F.normalize(_padded(rows.float(), segments), dim=-1, eps=1e-5)
        for rows, segments in ((words, word_segments), (patches, patch_segments))
    ]
    valid = word_segments.valid(device)[:, :, None] & patch_segments.valid(device)[:, None, :]
    return (1 - padded[0] @ padded[1].mT) * valid, valid


def transport_plan(cost: Tensor, valid: Tensor, beta: float = 0.5, iterations: int = 50) -> Tensor:
    """IPOT's plan ``(N, M, P)`` of uniform marginals: rows (words) sum to 1 / words, columns to 1 / patches.

    cost, valid: as :func:`cosine_cost` gives them. After each step the words' marginal is exact and the other one
    nearly; with many iterations the plan becomes optimal, with 50 it is within a few per cent.
    """
    words, patches = valid.any(2), valid.any(1)  # (N, M), (N, P)
    n_words, n_patches = (side.sum(1, keepdim=True).clamp(min=1) for side in (words, patches))
    kernel = torch.exp(-cost / beta) * valid
    plan = valid.to(cost.dtype)
    by_word = words / n_words
    for _ in range(iterations):
        scaled = kernel * plan
        by_patch = _inverse(n_patches * (by_word[:, None] @ scaled)[:, 0], patches)
        by_word = _inverse(n_words * (scaled @ by_patch[:, :, None])[:, :, 0], words)
        plan = by_word[:, :, None] * scaled * by_patch[:, None]
    return plan


def _inverse(x: Tensor, where: Tensor) -> Tensor:
    """1 / x where there is a word or patch, 0 at pads."""
    return torch.where(where, 1 / torch.where(where, x, 1.0), 0.0)


def _padded(rows: Tensor, segments: Segments) -> Tensor:
    """``(T, D)`` rows as ``(N, longest, D)``, zeros behind the end."""
    if segments.uniform:
        return rows.unflatten(0, (segments.count, segments.longest))
    padded = rows.new_zeros(segments.count * segments.longest, rows.shape[1])
    return padded.index_copy(0, segments.slots(rows.device), rows).unflatten(0, (segments.count, segments.longest))


def wpa_loss(distance: Tensor, matched: Tensor) -> Tensor:
    """Mean over pairs of the distance of matched pairs minus that of the others; ViLT weighs it by 0.1.

    distance: ``(N,)``; matched: bool or int ``(N,)``.
    """
    return torch.where(matched.bool(), distance, -distance).mean()
