"""Attention over packed rows: whoever asks names the query sequences and the key sequences."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.nn.cache import LayerCache
from imglish.nn.segments import Rows, Segments


def attend(
    q_THd: Tensor,
    k_SHd: Tensor,
    v_SHd: Tensor,
    q_segments: Segments,
    k_segments: Segments,
    causal: bool = False,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    q_positions: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention of query sequence n over key sequence n, for every n.

    q: ``(T, heads, head_dim)`` rows of ``q_segments``; k, v: ``(S, heads, head_dim)`` rows of ``k_segments``, which
    has as many sequences; ``causal`` needs equal lengths of both. Returns ``(T, heads, head_dim)``. Sequences of one
    length are a free view; otherwise half precision on CUDA uses the variable-length kernel, and everything else
    a padded view that exists inside this call only. A query sequence with rows needs a key sequence with rows.

    bias: ``(heads or 1, L, L)``, added to the scores of the query and the key at these positions of their sequence, for
    the longest key sequence L; q_positions: int64 ``(T,)``, which of the key positions each query row is (None: the
    query sequences are the key sequences). A bias keeps the variable-length kernel from being used.
    """
    if q_segments.count != k_segments.count:
        raise ValueError(f"{q_segments.count} query sequences meet {k_segments.count} key sequences")
    if causal and q_segments != k_segments:
        raise ValueError("causal attention needs queries and keys of the same lengths")
    if q_segments.total == 0:
        return q_THd
    device = q_THd.device
    ragged = not (q_segments.uniform and k_segments.uniform) and bias is None
    if ragged and device.type == "cuda" and q_THd.dtype in (torch.float16, torch.bfloat16) and not dropout:
        from torch.nn.attention.varlen import varlen_attn  # a second of imports that only this branch needs

        out = varlen_attn(
            q_THd,
            k_SHd,
            v_SHd,
            q_segments.offsets(device),
            k_segments.offsets(device),
            q_segments.longest,
            k_segments.longest,
            window_size=(-1, 0) if causal else (-1, -1),
        )
        assert isinstance(out, Tensor)
        return out
    mask = None
    if k_segments.filled:
        mask = k_segments.valid(device)[:, None, None, :]
        if causal:
            mask = mask & torch.ones(k_segments.longest, k_segments.longest, device=device).tril().bool()
    if bias is not None:
        mask = _biased(bias, mask, q_segments, q_positions)
    dtype = q_THd.dtype
    single = device.type == "cpu" and dtype in (torch.float16, torch.bfloat16)
    if single:  # the CPU kernel's backward pass is several times slower in half precision than in float32
        q_THd, k_SHd, v_SHd = q_THd.float(), k_SHd.float(), v_SHd.float()
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q_THd.dtype)
    with torch.autocast(device.type, enabled=False) if single else nullcontext():
        out_NHLd = F.scaled_dot_product_attention(
            _sequences(q_THd, q_segments),
            _sequences(k_SHd, k_segments),
            _sequences(v_SHd, k_segments),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
        )
    out_NLHd = out_NHLd.transpose(1, 2).to(dtype)
    if q_segments.uniform:
        return out_NLHd.reshape(q_THd.shape)
    return out_NLHd.flatten(0, 1)[q_segments.slots(device)]


def attention_weights(
    q_THd: Tensor, k_SHd: Tensor, q_segments: Segments, k_segments: Segments, bias: Tensor | None = None
) -> Tensor:
    """The weights by which :func:`attend` mixes, for whoever wants to see them: ``(N, heads, Q, K)`` for the longest
    query and key sequence, zero for keys that are not there (queries that are not there look at all keys alike)."""
    mask = k_segments.valid(q_THd.device)[:, None, None, :] if k_segments.filled else None
    scores = _sequences(q_THd, q_segments) @ _sequences(k_SHd, k_segments).transpose(2, 3) / math.sqrt(q_THd.shape[2])
    if bias is not None:
        scores = scores + bias[None]
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(3)


def mix(weights_NHQK: Tensor, v_SHd: Tensor, q_segments: Segments, k_segments: Segments) -> Tensor:
    """What :func:`attend` gives for these weights: ``(T, heads, head_dim)`` rows of ``q_segments``."""
    out = (weights_NHQK @ _sequences(v_SHd, k_segments)).transpose(1, 2).flatten(0, 1)
    return out if q_segments.uniform else out[q_segments.slots(out.device)]


def _biased(bias: Tensor, mask: Tensor | None, q_segments: Segments, q_positions: Tensor | None) -> Tensor:
    """Scores to add: ``bias`` at the rows of the queries, minus infinity where ``mask`` says that no key is."""
    scores = bias[None]
    if q_positions is not None:
        scores = _sequences(bias.transpose(0, 1)[q_positions], q_segments)  # (N, L, heads, K) seen as (N, heads, L, K)
    return scores if mask is None else scores.masked_fill(~mask, -math.inf)


def _sequences(x_THd: Tensor, segments: Segments) -> Tensor:
    """``(T, heads, head_dim)`` rows as ``(N, heads, longest, head_dim)``: a view where all lengths are equal."""
    if segments.uniform:
        padded = x_THd
    else:
        padded = x_THd.new_zeros(segments.count * segments.longest, *x_THd.shape[1:])
        padded = padded.index_copy(0, segments.slots(x_THd.device), x_THd)
    return padded.unflatten(0, (segments.count, segments.longest)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) with one fused query-key-value projection."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x_TD: Tensor,
        segments: Segments,
        causal: bool = False,
        read: Rows | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """``(T, D)`` -> ``(T, D)``, or ``(M, D)`` for the M rows of ``read`` (then keys and values see all T).

        With ``cache`` the rows are the newest of their sequences: they see what is kept of these, then are kept too.
        """
        dropout = self.dropout if self.training else 0.0
        if read is None:
            q, k, v = self.qkv(x_TD).unflatten(1, (3, self.heads, -1)).unbind(1)
            if cache is not None:
                return self._merge(cache.attend(q, k, v))
            return self._merge(attend(q, k, v, segments, segments, causal, dropout))
        if causal and read.segments != Segments.equal(segments.count, 1):
            raise ValueError("causal attention can read all rows or the last row of each sequence")
        width = x_TD.shape[1]
        q = F.linear(x_TD[read.index], self.qkv.weight[:width], self.qkv.bias[:width])
        kv = F.linear(x_TD, self.qkv.weight[width:], self.qkv.bias[width:])
        k, v = kv.unflatten(1, (2, self.heads, -1)).unbind(1)
        return self._merge(attend(q.unflatten(1, (self.heads, -1)), k, v, read.segments, segments, dropout=dropout))

    def _merge(self, x_THd: Tensor) -> Tensor:
        merged: Tensor = self.out(x_THd.flatten(1))
        return merged


@dataclass(frozen=True)
class Memory:
    """What the queries of one cross-attention call look at: pictures whose keys and values are projected already.

    keys, values: ``(S, heads, head_dim)`` rows of ``segments`` (one sequence a picture); texts: how many consecutive
    texts belong to each picture. All texts of a picture are one query sequence, so nothing is copied for them.
    projected: False where both are the tokens of the pictures as they are, ``(S, memory_width)``, all pictures of one
    length; see :meth:`CrossAttention.rather_reads`.
    """

    keys: Tensor
    values: Tensor
    segments: Segments
    texts: Segments
    projected: bool = True

    def queries(self, rows: Segments) -> Segments:
        """Rows a text, ``rows``, added up to rows a picture."""
        if self.texts.uniform and self.texts.longest == 1:
            return rows
        bounds = self.texts.bounds
        ends = rows.bounds[bounds]
        return Segments.of(ends[1:] - ends[:-1])


class CrossAttention(nn.Module):
    """Attention of text rows over the tokens of a picture, whose keys and values :meth:`project` makes once."""

    def __init__(self, width: int, heads: int, memory_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.out = nn.Linear(width, width)

    def project(self, memory_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each ``(S, heads, head_dim)``, of the rows ``(S, memory_width)``."""
        k, v = self.kv(memory_SD).unflatten(1, (2, self.heads, -1)).unbind(1)
        return k, v

    def forward(self, x_TD: Tensor, rows: Segments, memory: Memory) -> Tensor:
        """``(T, D)`` rows, ``rows`` of each text, texts in the order of their pictures -> ``(T, D)``."""
        q = self.q(x_TD).unflatten(1, (self.heads, -1))
        dropout = self.dropout if self.training else 0.0
        if memory.projected:
            merged = attend(q, memory.keys, memory.values, memory.queries(rows), memory.segments, dropout=dropout)
        else:
            merged = self._read(q, memory.keys, memory.queries(rows), memory.segments)
        out: Tensor = self.out(merged.flatten(1))
        return out

    def rather_reads(self, rows: int, segments: Segments) -> bool:
        """Whether ``rows`` text rows cost less than half by reading the tokens of all pictures themselves.

        A score is q . (W_k x) = (W_k^T q) . x, and a mixture of values is W_v of the mixture of tokens: what is done to
        every token of a picture may as well be done to every row of the text. That is less work for few rows, and more
        of it for many, because a carried-over row has the width of a token in each head.
        """
        of_rows = rows * (self.heads * segments.longest + self.q.in_features)
        return segments.uniform and 2 * of_rows < segments.total * self.q.in_features

    def _read(self, q_THd: Tensor, tokens_SD: Tensor, q_segments: Segments, k_segments: Segments) -> Tensor:
        """Attention over tokens that are not projected, ``(T, heads, head_dim)``. A bias of the keys adds the same to
        all scores of a row, so it has no effect."""
        width = self.q.out_features
        to_keys, to_values = self.kv.weight.unflatten(0, (2, self.heads, -1)).to(q_THd.dtype).unbind(0)
        pictures = tokens_SD.to(q_THd.dtype).unflatten(0, (k_segments.count, -1))
        carried = torch.einsum("thd,hdm->thm", q_THd * q_THd.shape[2] ** -0.5, to_keys)
        scores = _sequences(carried, q_segments).flatten(1, 2) @ pictures.transpose(1, 2)
        read = (scores.softmax(2).to(pictures.dtype) @ pictures).unflatten(1, (self.heads, -1)).transpose(1, 2)
        read = read.flatten(0, 1)
        if not q_segments.uniform:
            read = read[q_segments.slots(q_THd.device)]
        values = torch.einsum("thm,hdm->thd", read, to_values)
        return values + self.kv.bias[width:].unflatten(0, (self.heads, -1))
