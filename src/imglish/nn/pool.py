"""Pooling of token sequences by attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.nn.attention import attend
from imglish.nn.blocks import Activation, Mlp
from imglish.nn.segments import Segments


class LatentPool(nn.Module):
    """A learned query attends to all tokens, then a residual feed-forward ("MAP head" of Zhai et al. 2022, SigLIP).

    ``(B, L, D)`` -> ``(B, D)``.
    """

    def __init__(self, width: int, heads: int, hidden: int, norm_eps: float, activation: Activation = "gelu") -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(width).normal_(std=width**-0.5))
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


class QueryPool(nn.Module):
    """Learned queries attend to all tokens of a picture: CoCa's attentional pooling (Yu et al. 2022, section 3.2).

    ``(B, L, memory_width)`` -> ``(B, queries, width)``. Queries and tokens are normalised first and the result last;
    there is neither a residual nor a feed-forward. The queries are projected once a call, not once a picture.
    """

    def __init__(self, queries: int, width: int, heads: int, memory_width: int, norm_eps: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.queries = nn.Parameter(torch.empty(queries, width).normal_())
        self.norm_queries = nn.LayerNorm(width, eps=norm_eps)
        self.norm_tokens = nn.LayerNorm(memory_width, eps=norm_eps)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        count, length = tokens_BLD.shape[:2]
        q = self.q(self.norm_queries(self.queries)).unflatten(1, (self.heads, -1))
        q = q.expand(count, *q.shape).flatten(0, 1)
        k, v = self.kv(self.norm_tokens(tokens_BLD)).flatten(0, 1).unflatten(1, (2, self.heads, -1)).unbind(1)
        asked = Segments.equal(count, self.queries.shape[0])
        read = attend(q, k, v, asked, Segments.equal(count, length))
        pooled: Tensor = self.norm(self.out(read.flatten(1)))
        return pooled.unflatten(0, (count, -1))
