"""The attention of a model made visible while it works: forward hooks that compute its weights a second time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from imglish.nn.attention import CrossAttention, SelfAttention, attention_weights, mix
from imglish.nn.experts import ExpertBlock


@contextmanager
def watch_looks(model: nn.Module) -> Iterator[list[Tensor]]:
    """The weights ``(N, heads, text rows, picture tokens)`` of each cross-attention that runs inside, in their order.

    What comes out of a layer is computed from these very tensors, so that scores have gradients with respect to them
    (under ``torch.enable_grad``), also where no parameter of the model wants one. N: pictures.
    """
    found: list[Tensor] = []

    def see(layer: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
        assert isinstance(layer, CrossAttention)
        x, rows, memory = given
        queries = memory.queries(rows)
        keys, values = memory.keys, memory.values
        if not memory.projected:
            keys, values = layer.project(keys)
        q = layer.q(x).unflatten(1, (layer.heads, -1))
        weights = _wanted(attention_weights(q, keys, queries, memory.segments))
        found.append(weights)
        made: Tensor = layer.out(mix(weights, values, queries, memory.segments).flatten(1))
        return made

    with _hooked(model, (CrossAttention,), see):
        yield found


@contextmanager
def watch_self(model: nn.Module) -> Iterator[list[Tensor]]:
    """As :func:`watch_looks` for self-attention, ``(N, heads, L or read rows, L)``; layers of experts are left out."""
    found: list[Tensor] = []

    def see(layer: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
        assert isinstance(layer, SelfAttention)
        x, segments, _, read, cache = given
        if cache is not None:
            raise ValueError("tokens are being written one by one: their attention cannot be watched")
        q, k, v = layer.qkv(x).unflatten(1, (3, layer.heads, -1)).unbind(1)
        asking = segments if read is None else read.segments
        weights = _wanted(attention_weights(q if read is None else q[read.index], k, asking, segments))
        found.append(weights)
        made: Tensor = layer.out(mix(weights, v, asking, segments).flatten(1))
        return made

    with _hooked(model, (SelfAttention,), see):
        yield found


@dataclass
class PairLayers:
    """weights: ``(N, L, L)`` of each layer, the mean of its heads; picture_first: whether a pair begins with it."""

    weights: list[Tensor] = field(default_factory=list)
    picture_first: bool = False


@contextmanager
def watch_pairs(model: nn.Module) -> Iterator[PairLayers]:
    """The weights of each layer of a single Transformer that reads N pairs inside, those of all rows also where the
    last layer computes a few; the model's own results stay as they are."""
    found = PairLayers()

    def see(layer: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        """Hook of one layer: its weights, made once more from what it was given."""
        with torch.no_grad():
            if isinstance(layer, SelfAttention):
                x, segments = given[:2]
                q, k, _ = layer.qkv(x).unflatten(1, (3, layer.heads, -1)).unbind(1)
                found.weights.append(attention_weights(q, k, segments, segments).mean(1))
                return
            assert isinstance(layer, ExpertBlock)
            x, packing, bias = given[:3]
            (group,) = packing.groups.list
            q, k, _ = (packing.groups.gather(part)[0] for part in layer.attn.project(x, packing))
            weights = attention_weights(q, k, group.segments, group.segments, None if bias is None else bias[0])
            found.weights.append(weights.mean(1))
            found.picture_first = True

    with _hooked(model, (SelfAttention, ExpertBlock), see):
        yield found


def _wanted(weights: Tensor) -> Tensor:
    return weights if weights.requires_grad else weights.requires_grad_(torch.is_grad_enabled())


@contextmanager
def _hooked(model: nn.Module, kinds: tuple[type, ...], see: Any) -> Iterator[None]:
    handles = [part.register_forward_hook(see) for part in model.modules() if isinstance(part, kinds)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
