"""Attention of text that comes after a picture: each text sees the whole picture and its own tokens up to each.

Several texts of one picture (captions in training, beams in decoding) look at the same keys, which are never copied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imglish.nn.attention import Memory
from imglish.nn.segments import Segments


def attend_after(
    q_THd: Tensor, segments: Segments, picture: Memory, keys_NKHd: Tensor, values_NKHd: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention over the keys of a sequence's picture and of the sequence itself, as one softmax.

    q: ``(T, heads, head_dim)`` rows of N sequences, ``segments`` of each, in the order of their pictures; picture: keys
    and values of pictures of one length, ``picture.texts`` sequences each; keys, values: ``(N, K, heads, head_dim)`` of
    the sequences' own tokens; mask: bool, broadcast to ``(N, 1, longest, K)``, which of these each row sees (None:
    all). Returns ``(T, heads, head_dim)``.
    """
    if not picture.segments.uniform:
        raise ValueError("pictures of one length are expected")
    rows, length = picture.queries(segments), picture.segments.longest
    image_keys, image_values = (x.unflatten(0, (-1, length)) for x in (picture.keys, picture.values))
    scale = 1 / math.sqrt(q_THd.shape[2])
    q_THd = q_THd * scale
    on_image = _packed(_scores(_padded(q_THd, rows), image_keys), rows)
    on_text = _scores(_padded(q_THd, segments), keys_NKHd)
    if mask is not None:
        on_text = on_text.masked_fill(~mask.transpose(1, 2), -math.inf)
    weights = torch.cat([on_image, _packed(on_text, segments)], dim=2).softmax(2, dtype=torch.float32)
    of_image, of_text = weights.to(q_THd.dtype).split([length, keys_NKHd.shape[1]], dim=2)
    out = _packed(_mixed(_padded(of_image, rows), image_values), rows)
    return out + _packed(_mixed(_padded(of_text, segments), values_NKHd), segments)


def own_keys(x_THd: Tensor, segments: Segments) -> Tensor:
    """Keys or values of texts as :func:`attend_after` takes them, ``(N, longest, heads, head_dim)``."""
    return _padded(x_THd, segments)


def causal_mask(
    segments: Segments, device: torch.device, read: Segments | None = None, index: Tensor | None = None
) -> Tensor:
    """Each token of a text sees itself and what is before it: bool ``(1 or N, 1, longest, longest)``.

    read, index: only some rows ask, ``read`` of each text with numbers ``index (M,)`` among all rows; then
    ``(N, 1, most read rows, longest)``.
    """
    places = torch.arange(segments.longest, device=device)
    if read is None or index is None:
        return (places[None, :] <= places[:, None])[None, None]
    where = segments.positions(device)[index]
    return (places <= _padded(where, read)[..., None])[:, None]


def _scores(q_NQHd: Tensor, k_NKHd: Tensor) -> Tensor:
    """``(N, Q, heads, K)``."""
    return torch.einsum("nqhd,nkhd->nqhk", q_NQHd, k_NKHd)


def _mixed(weights_NQHK: Tensor, v_NKHd: Tensor) -> Tensor:
    """``(N, Q, heads, head_dim)``."""
    return torch.einsum("nqhk,nkhd->nqhd", weights_NQHK, v_NKHd)


def _padded(x: Tensor, segments: Segments) -> Tensor:
    """Rows ``(T, ...)`` as ``(N, longest, ...)``: a view where all sequences have one length."""
    if not segments.uniform:
        empty = x.new_zeros(segments.count * segments.longest, *x.shape[1:])
        x = empty.index_copy(0, segments.slots(x.device), x)
    return x.unflatten(0, (segments.count, segments.longest))


def _packed(x: Tensor, segments: Segments) -> Tensor:
    """The inverse of :func:`_padded`."""
    flat = x.flatten(0, 1)
    return flat if segments.uniform else flat[segments.slots(x.device)]
