"""Transformer blocks with experts: every row is transformed by the expert that its kind of token is routed to.

A block has one route for attention and one for the feed-forward (:mod:`imglish.nn.packing`)::

    together = Block(attention=SHARED, feed_forward=SHARED)          one Transformer for everything (BEiT)
    lower    = Block(attention=SHARED, feed_forward=BY_MODALITY)     VLMo below, and the BEiT-3 of the paper
    upper    = Block(attention=SHARED, feed_forward=FUSED_APART)     VLMo on top, and the BEiT-3 of the paper
    released = Block(attention=BY_MODALITY, feed_forward=BY_MODALITY, sub_norm=True)    BEiT-3 as released
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.nn.attention import attend
from imglish.nn.blocks import ACTIVATIONS, Activation, LayerScale
from imglish.nn.packing import BY_MODALITY, SHARED, Groups, Packing, Read, Route


class Experts(nn.ModuleDict):
    """One module for each expert of a route; rows are given to the one that their kind of token is routed to."""

    def __init__(self, route: Route, make: Callable[[], nn.Module]) -> None:
        super().__init__({name: make() for name in route.names})
        self.route = route

    def forward(
        self, x: Tensor, packing: Packing, call: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)
    ) -> Tensor:
        """``(T, ...)`` rows of ``packing`` -> ``(T, ...)``; ``call(expert, rows)``: what is done with an expert."""
        spans = packing.spans(self.route)
        if len(spans) <= 1:  # also no row at all
            return call(self[spans[0][0] if spans else self.route.image], x)
        pieces = x.split([size for _, size in spans])
        return torch.cat([call(self[name], piece) for (name, _), piece in zip(spans, pieces, strict=True)])


@dataclass(frozen=True)
class ExpertBlockConfig:
    """One pre-norm Transformer block whose experts are chosen by routes.

    attention: route of the first norm and of the attention's projections; feed_forward: of the second norm and of the
    feed-forward; qkv_bias: "qv" leaves the keys without bias (BEiT, VLMo); sub_norm: further norms in front of the
    attention's output projection and of the feed-forward's second matrix (Magneto, Wang et al. 2022); layer_scale:
    initial LayerScale, shared by the experts, or None; drop_path: share of sequences that skip a branch in training.
    """

    width: int
    heads: int
    hidden: int
    attention: Route = SHARED
    feed_forward: Route = BY_MODALITY
    norm_eps: float = 1e-6
    activation: Activation = "gelu"
    qkv_bias: Literal["all", "qv"] = "all"
    sub_norm: bool = False
    layer_scale: float | None = None
    drop_path: float = 0.0

    def build(self) -> ExpertBlock:
        return ExpertBlock(self)


class FusedQkv(nn.Module):
    """Queries, keys and values of one expert by one matrix; with ``bias="qv"`` keys have no bias."""

    def __init__(self, width: int, bias: Literal["all", "qv"]) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.bias = nn.Parameter(torch.zeros(3 * width if bias == "all" else 2 * width))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``(T, D)`` -> ``(T, 3 D)``."""
        return F.linear(x, self.weight, self._bias())

    def queries(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[: self.width], self.bias[: self.width])

    def keys_values(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[self.width :], self._bias()[self.width :])

    def _bias(self) -> Tensor:
        width = self.width
        if self.bias.shape[0] == 3 * width:
            return self.bias
        return torch.cat([self.bias[:width], torch.zeros_like(self.bias[:width]), self.bias[width:]])


class ExpertFeedForward(nn.Module):
    """Norm, two matrices and an activation between; ``(T, D)`` -> ``(T, D)``."""

    def __init__(self, config: ExpertBlockConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.sub_norm = nn.LayerNorm(config.hidden, eps=config.norm_eps) if config.sub_norm else nn.Identity()
        self.fc2 = nn.Linear(config.hidden, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.sub_norm(self.activation(self.fc1(self.norm(x)))))
        return out


class ExpertAttention(nn.Module):
    """Self-attention within each sequence; norm and projections are those of the row's expert."""

    def __init__(self, config: ExpertBlockConfig) -> None:
        super().__init__()
        width, route = config.width, config.attention
        if width % config.heads:
            raise ValueError(f"width {width} is not a multiple of {config.heads} heads")
        self.heads = config.heads
        self.norm = Experts(route, lambda: nn.LayerNorm(width, eps=config.norm_eps))
        self.qkv = Experts(route, lambda: FusedQkv(width, config.qkv_bias))
        self.sub_norm = Experts(route, lambda: nn.LayerNorm(width, eps=config.norm_eps)) if config.sub_norm else None
        self.out = Experts(route, lambda: nn.Linear(width, width))

    def project(self, x_TD: Tensor, packing: Packing, read: Read | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``(M, heads, head_dim)`` of the read rows (all T without ``read``), keys and values ``(T, ...)``."""
        normed = self.norm(x_TD, packing)
        if read is None:
            q, k, v = self.qkv(normed, packing).unflatten(1, (3, self.heads, -1)).unbind(1)
            return q, k, v
        q = self.qkv(normed[read.index], read.packing, lambda expert, x: cast(FusedQkv, expert).queries(x))
        kv = self.qkv(normed, packing, lambda expert, x: cast(FusedQkv, expert).keys_values(x))
        k, v = kv.unflatten(1, (2, self.heads, -1)).unbind(1)
        return q.unflatten(1, (self.heads, -1)), k, v

    def merge(self, x_THd: Tensor, packing: Packing) -> Tensor:
        """The heads' results ``(T, heads, head_dim)`` -> ``(T, D)``."""
        x = x_THd.flatten(1)
        if self.sub_norm is not None:
            x = self.sub_norm(x, packing)
        out: Tensor = self.out(x, packing)
        return out

    def forward(
        self, x_TD: Tensor, packing: Packing, bias: Sequence[Tensor] | None = None, read: Read | None = None
    ) -> Tensor:
        """``(T, D)`` -> ``(T, D)``, or ``(M, D)`` for ``read``. ``bias``: see :class:`ExpertBlock`."""
        q, k, v = self.project(x_TD, packing, read)
        mixed = attend_groups(q, k, v, packing, bias, read)
        return self.merge(mixed, packing if read is None else read.packing)


def attend_groups(
    q_MHd: Tensor,
    k_THd: Tensor,
    v_THd: Tensor,
    packing: Packing,
    bias: Sequence[Tensor] | None = None,
    read: Read | None = None,
) -> Tensor:
    """Attention of each sequence over itself, one call for each group of ``packing``; ``(M, heads, head_dim)``.

    bias: one ``(heads or 1, L, L)`` for each group, added to the scores; L is the group's longest sequence, the picture
    first (all pictures of a group must then have one length). read: which rows the queries are (None: all).
    """
    groups = packing.groups
    keys, values = groups.gather(k_THd), groups.gather(v_THd)
    asking, spots = groups, None
    if read is not None:
        asking = Groups(read.packing, [group.sequences for group in groups.list])
        spots = None if bias is None else asking.gather(packing.positions(q_MHd.device)[read.index])
    out = [
        attend(
            q,
            keys[i],
            values[i],
            asking.list[i].segments,
            groups.list[i].segments,
            bias=None if bias is None else bias[i],
            q_positions=None if spots is None else spots[i],
        )
        for i, q in enumerate(asking.gather(q_MHd))
    ]
    return asking.scatter(out)


def prefix_causal(packing: Packing, device: torch.device) -> list[Tensor]:
    """A bias for each group, float32 ``(1, L, L)``: picture tokens see the picture, text tokens also the text up to
    themselves (captioning with bidirectional pictures, as BEiT-3 does). Pictures of a group have one length."""
    made = []
    for group in packing.groups.list:
        places = torch.arange(group.image + group.text, device=device)
        seen = (places[None, :] <= places[:, None]) | (places[None, :] < group.image)
        made.append(torch.zeros(1, *seen.shape, device=device).masked_fill(~seen[None], -math.inf))
    return made


class ExpertBlock(nn.Module):
    """Attention and feed-forward with residuals; norms and matrices are those of each row's expert."""

    def __init__(self, config: ExpertBlockConfig) -> None:
        super().__init__()
        self.config = config
        self.attn = ExpertAttention(config)
        self.ffn = Experts(config.feed_forward, lambda: ExpertFeedForward(config))
        scale = config.layer_scale
        self.scale1 = nn.Identity() if scale is None else LayerScale(config.width, scale)
        self.scale2 = nn.Identity() if scale is None else LayerScale(config.width, scale)

    def forward(
        self, x_TD: Tensor, packing: Packing, bias: Sequence[Tensor] | None = None, read: Read | None = None
    ) -> Tensor:
        """``(T, D)`` -> ``(T, D)``; with ``read``, only its M rows are carried on: ``(M, D)`` of ``read.packing``.

        bias: added to the attention's scores, one ``(heads or 1, L, L)`` for each of ``packing.groups``, see
        :func:`attend_groups`: relative positions (:mod:`imglish.nn.relative`), or a mask (:func:`prefix_causal`).
        """
        q, k, v = self.attn.project(x_TD, packing, read)
        return self.finish(x_TD, attend_groups(q, k, v, packing, bias, read), packing, read)

    def finish(self, x_TD: Tensor, mixed_MHd: Tensor, packing: Packing, read: Read | None = None) -> Tensor:
        """What comes after the attention: ``mixed (M, heads, head_dim)``, attended to by the caller from the queries,
        keys and values of ``attn.project`` (captioning, whose texts share the picture), -> ``(M, D)``."""
        kept, after = (x_TD, packing) if read is None else (x_TD[read.index], read.packing)
        x = kept + self._drop(self.scale1(self.attn.merge(mixed_MHd, after)), after)
        return x + self._drop(self.scale2(self.ffn(x, after)), after)

    def _drop(self, branch: Tensor, packing: Packing) -> Tensor:
        """Stochastic depth (Huang et al. 2016): whole sequences skip the branch."""
        share = self.config.drop_path
        if not self.training or share == 0:
            return branch
        kept = torch.rand(packing.count, device=branch.device) >= share
        factor = kept.to(branch.dtype) / (1 - share)
        return branch * factor[packing.sequence_numbers(branch.device)][:, None]
