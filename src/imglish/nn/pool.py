"""Pooling of token sequences by attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.nn.blocks import Activation, Mlp


class LatentPool(nn.Module):
    """A learned query attends to all tokens, then a residual feed-forward ("MAP head" of Zhai et al. 2022, SigLIP).

    ``(B, L, D)`` -> ``(B, D)``.
    """

    def __init__(self, width: int, heads: int, hidden: int, norm_eps: float, activation: Activation = "gelu") -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.randn(width) * width**-0.5)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, hidden, activation)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        q = self.q(self.latent).expand(tokens_BLD.shape[0], 1, -1).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens_BLD).unflatten(2, (2, self.heads, -1)).transpose(1, 3).unbind(2)
        x = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))
        pooled: Tensor = x + self.mlp(self.norm(x))
        return pooled
