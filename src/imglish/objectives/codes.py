"""Objectives around discrete visual codes: masked image modelling on them, and what trains the tokenizers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.objectives.gather import gather_with_grad, global_mean, world_size

PIXEL_MARGIN = 0.1  # DALL-E keeps pixels this far from 0 and 1, where the logit is infinite


def mim_loss(logits: Tensor, codes: Tensor, count: float | None = None) -> Tensor:
    """Masked image modelling (BEiT, equation 1): cross-entropy of masked patches' codes, mean over those of all ranks.

    logits: ``(M, K)``; codes: int64 ``(M,)``, what a visual tokenizer makes of the patches; count: what to divide by
    (default M; for one of several parts of a batch, the mean of their M). M may be zero.
    """
    total = F.cross_entropy(logits.float(), codes, reduction="sum")
    return global_mean(total, codes.shape[0] if count is None else count)


def map_pixels(pixels: Tensor) -> Tensor:
    """Pixels in 0..1 to 0.1..0.9 (Ramesh et al. 2021, appendix A.3)."""
    return (1 - 2 * PIXEL_MARGIN) * pixels + PIXEL_MARGIN


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of :func:`map_pixels`, kept within 0..1."""
    return ((mapped - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)).clamp(0, 1)


def logit_laplace(pixels: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Negative log-likelihood of ``pixels`` in (0, 1) under a logit-Laplace distribution, mean over all values.

    mean, log_scale: of the logit of the pixel, of one shape with ``pixels`` (Ramesh et al. 2021, appendix A.3).
    """
    distance = (torch.logit(pixels) - mean).abs() * torch.exp(-log_scale)
    return (distance + log_scale + math.log(2) + torch.log(pixels * (1 - pixels))).mean()


def kl_to_uniform(logits: Tensor) -> Tensor:
    """Divergence of softmax(``logits (B, K, ...)``) over dimension 1 from the uniform distribution, mean over cells."""
    log_q = F.log_softmax(logits, dim=1)
    return math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(1).mean()


def untold(logits: Tensor) -> Tensor:
    """How much less than log K nats codes tell about pictures, 0-D in 0..log K, with gradient.

    logits: ``(B, K, ...)``, codes at the places of B pictures. What a code tells is the mutual information of picture
    and code at its place, mean over places: the entropy of the mean of softmax(logits) over the pictures of all ranks,
    less the mean of their entropies; at most log B. Nothing is told where all pictures have one code, nothing where
    every one has all codes alike, and nothing by codes that only name their place, which convolutions know from the
    border and which would otherwise be the easiest thing to tell.
    """
    log_p = F.log_softmax(logits, dim=1)
    p = log_p.exp()
    mean = gather_with_grad(p.mean(0, keepdim=True)).mean(0)
    told = (p * log_p).sum(1).mean() - (mean * mean.clamp(min=1e-12).log()).sum(0).mean()
    return math.log(logits.shape[1]) - told


def cosine_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of rows ``(..., D)`` and their targets, mean over rows (BEiT v2, equation 3)."""
    return (1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1)).mean()


@torch.no_grad()
def code_usage(chosen: Tensor, codes: int) -> Tensor:
    """How much of the codebook a batch uses, 0-D in 1/K..1: perplexity of the ``chosen`` codes (int64), over K.

    A collapsed codebook uses a few codes for everything: 1 / K.
    """
    counts = torch.bincount(chosen.flatten(), minlength=codes).float()
    if world_size() > 1:
        torch.distributed.all_reduce(counts)
    share = counts / counts.sum().clamp(min=1)
    return torch.exp(torch.special.entr(share).sum()) / codes
