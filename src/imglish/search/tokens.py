"""Image tokens as bytes, to be kept in an index: bfloat16, or int8 with a scale for each token."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from imglish.nn.segments import Ragged, Segments

FORMS = ("bfloat16", "int8")
_HEADER = struct.Struct("<4sHHI")  # magic, form, ragged, number of tokens
_MAGIC = b"imgt"


def pack(tokens: Tensor | Ragged, form: str) -> list[bytes]:
    """The tokens of each picture. tokens: ``(B, L, D)``, or ragged rows of B pictures; form: of :data:`FORMS`."""
    if form not in FORMS:
        raise ValueError(f"tokens kept as {form!r}: choose {' or '.join(FORMS)}")
    ragged = isinstance(tokens, Ragged)
    if isinstance(tokens, Ragged):
        parts = tokens.rows.detach().float().cpu().split(list(tokens.segments.lengths))
    else:
        parts = tuple(tokens.detach().float().cpu())
    return [_HEADER.pack(_MAGIC, FORMS.index(form), ragged, len(part)) + _body(part, form) for part in parts]


def _body(rows: Tensor, form: str) -> bytes:
    if form == "bfloat16":
        return rows.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
    scale = (rows.abs().amax(dim=1) / 127).clamp_min(1e-30)
    whole = (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return scale.numpy().astype("<f4").tobytes() + whole.contiguous().numpy().tobytes()


def unpack(kept: Sequence[bytes]) -> Tensor | Ragged:
    """The tokens of B pictures, float32, in the form that the model gave them. Raises ``ValueError`` for damage."""
    parts, ragged = [], False
    for data in kept:
        if len(data) < _HEADER.size:
            raise ValueError("kept image tokens are cut off")
        magic, form, many, length = _HEADER.unpack_from(data)
        if magic != _MAGIC or form >= len(FORMS) or length == 0:
            raise ValueError("these are no kept image tokens")
        ragged = ragged or bool(many)
        parts.append(_rows(data, FORMS[form], length))
    if ragged:
        return Ragged(torch.cat(parts), Segments.of(len(part) for part in parts))
    return torch.stack(parts)


def _rows(data: bytes, form: str, length: int) -> Tensor:
    start = _HEADER.size
    if form == "bfloat16":
        halves = torch.from_numpy(np.frombuffer(data, dtype="<i2", offset=start).copy())
        return halves.view(torch.bfloat16).float().reshape(length, -1)
    scale = torch.from_numpy(np.frombuffer(data, dtype="<f4", count=length, offset=start).copy())
    whole = torch.from_numpy(np.frombuffer(data, dtype=np.int8, offset=start + 4 * length).copy())
    return whole.reshape(length, -1).float() * scale[:, None]
