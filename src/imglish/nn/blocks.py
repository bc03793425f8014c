"""Transformer blocks on packed rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.nn.attention import CrossAttention, Memory, SelfAttention
from imglish.nn.cache import LayerCache
from imglish.nn.segments import Rows, Segments

Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with.

    Written as silu(1.702 x) / 1.702: one tensor kept for the backward pass instead of two, one temporary without it.
    """
    scaled = x * 1.702
    return F.silu(scaled, inplace=not scaled.requires_grad).mul_(1 / 1.702)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, the one of BERT's and SigLIP's original code."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": gelu_tanh,
}


class Mlp(nn.Module):
    """Two linear layers with an activation between; ``(T, D)`` -> ``(T, D)``."""

    def __init__(self, width: int, hidden: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@dataclass(frozen=True)
class BlockConfig:
    """One Transformer block.

    norm: "pre" (ViT, CLIP) or "post" (BERT) normalisation; cross_width: width of the picture tokens that the block
    cross-attends to, or None; layer_scale: initial LayerScale, or None; dropout: on attention and residual branches.
    """

    width: int
    heads: int
    hidden: int
    norm: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-6
    activation: Activation = "gelu"
    cross_width: int | None = None
    layer_scale: float | None = None
    dropout: float = 0.0

    def build(self) -> Block:
        return Block(self)


class Block(nn.Module):
    """Self-attention, optionally cross-attention to a picture, feed-forward: each with residual and LayerNorm."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        width = config.width
        self.pre_norm = config.norm == "pre"
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = SelfAttention(width, config.heads, config.dropout)
        self.cross: CrossAttention | None = None
        if config.cross_width is not None:
            self.norm_cross = nn.LayerNorm(width, eps=config.norm_eps)
            self.cross = CrossAttention(width, config.heads, config.cross_width, config.dropout)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, config.hidden, config.activation)
        scaled = config.layer_scale is not None
        self.scale1 = LayerScale(width, config.layer_scale or 0.0) if scaled else nn.Identity()
        self.scale2 = LayerScale(width, config.layer_scale or 0.0) if scaled else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_TD: Tensor,
        segments: Segments,
        memory: Memory | None = None,
        causal: bool = False,
        read: Rows | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """``(T, D)`` -> ``(T, D)``; with ``read``, only its M rows are carried on: ``(M, D)``.

        ``cache``: the rows are the newest of their sequences, whose earlier rows it keeps (causal decoding, token by
        token; not together with ``read``).

        ``memory`` is needed by a block with cross-attention, unless the text is to be encoded on its own
        (BLIP's mode "text"), where the cross-attention is left out.
        """

        kept = x_TD if read is None else x_TD[read.index]
        h = self.attn(self.norm1(x_TD) if self.pre_norm else x_TD, segments, causal, read, cache)
        x = self._add(kept, self.scale1(h), self.norm1)
        if self.cross is not None and memory is not None:
            rows = segments if read is None else read.segments
            h = self.cross(self.norm_cross(x) if self.pre_norm else x, rows, memory)
            x = self._add(x, h, self.norm_cross)
        h = self.mlp(self.norm2(x) if self.pre_norm else x)
        return self._add(x, self.scale2(h), self.norm2)

    def with_parts(self, parts: Mapping[str, nn.Module]) -> Block:
        """A block of these submodules (``attn``, ``norm1``, ``cross``, ...) and all others of this one, shared by both.

        It owns nothing and is made where it is called: parameters are found where the parts are registered.
        """
        other = copy.copy(self)
        other._modules = {**self._modules, **parts}
        return other

    def _add(self, x: Tensor, branch: Tensor, norm: nn.Module) -> Tensor:
        """The residual; a post-norm block normalises the sum, a pre-norm block has normalised before."""
        x = x + self.dropout(branch)
        out: Tensor = x if self.pre_norm else norm(x)
        return out
