"""Keys and values of the tokens that sequences have so far: the next token costs one row and not the whole text.

The cache is one buffer a layer, with a slot of ``room`` rows a sequence. New rows are written where the sequence ends;
attention reads a view of the buffer. Sequences may have different lengths; the lengths live on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.nn.segments import Segments, upload_index


class SequenceCache:
    """Self-attention keys and values of N sequences in every layer.

    layers: how many self-attention layers keep something; sequences: N at the start; room: rows that a sequence may
    reach. ``segments``: rows that each sequence holds now. For inference only: it keeps no gradients.
    """

    def __init__(self, layers: int, sequences: int, room: int) -> None:
        self.segments = Segments.equal(sequences, 0)
        self.room = room
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def extend(self, new: Segments, device: torch.device) -> Extension:
        """Take ``new.lengths[n]`` (at least one) further rows into sequence n; the layers fill them in.

        Call it once a step; :attr:`Extension.layers` are then handed to the layers, :attr:`Extension.positions` to the
        position embedding. Raises ``ValueError`` where a sequence would outgrow the room.
        """
        before = self.segments
        if new.count != before.count:
            raise ValueError(f"{new.count} sequences are to be added to {before.count}")
        if min(new.lengths, default=1) < 1:
            raise ValueError("every sequence needs at least one new row")
        after = Segments.of(old + more for old, more in zip(before.lengths, new.lengths))
        if after.longest > self.room:
            raise ValueError(f"a sequence would have {after.longest} rows, there is room for {self.room}")
        self.segments = after
        return Extension(self, before, new, after, device)

    def select(self, order: Sequence[int], device: torch.device) -> None:
        """Sequence i becomes what sequence ``order[i]`` was; one may be left out, or occur many times.

        Only sequences that change their place are copied, and of them only the rows that they hold.
        """
        held, count = self.segments.longest, len(order)
        moved = [(i, old) for i, old in enumerate(order) if i != old]
        self.segments = self.segments.select(order)
        if not moved or not held:
            return
        to, source = (upload_index(np.array(side), device) for side in zip(*moved))
        everyone = upload_index(np.array(order), device)
        for layer, pair in enumerate(self._buffers):
            if pair is None:
                continue
            if count <= pair[0].shape[0]:
                for buffer in pair:
                    rows = buffer[:, :held]
                    rows.index_copy_(0, to, rows.index_select(0, source))
            else:
                self._buffers[layer] = (_widened(pair[0], everyone, held), _widened(pair[1], everyone, held))

    def forget(self, rows: int) -> None:
        """Drop the last ``rows`` rows of every sequence.

        For masked decoding (BEiT-3): a step appends the last token and a [MASK], reads the logits of the [MASK], and
        then forgets its row.
        """
        if min(self.segments.lengths, default=rows) < rows:
            raise ValueError(f"a sequence has fewer than {rows} rows")
        self.segments = Segments.of(n - rows for n in self.segments.lengths)

    def write(self, layer: int, keys: Tensor, values: Tensor, extension: Extension) -> tuple[Tensor, Tensor]:
        """Put new rows ``(T, heads, head_dim)`` behind their sequences; returns views ``(N, longest, heads, ...)``."""
        pair = self._buffers[layer]
        if pair is None:
            shape = (self.segments.count, self.room, *keys.shape[1:])
            # zeros, for what a mask hides must still be a number
            pair = self._buffers[layer] = (keys.new_zeros(shape), values.new_zeros(shape))
        count, longest = extension.after.count, extension.after.longest
        for buffer, rows in zip(pair, (keys, values)):
            if extension.even:
                start = extension.before.longest
                buffer[:count, start:longest] = rows.unflatten(0, (count, longest - start))
            else:
                buffer.flatten(0, 1).index_copy_(0, extension.slots, rows)
        return pair[0][:count, :longest], pair[1][:count, :longest]


def _widened(buffer: Tensor, order: Tensor, held: int) -> Tensor:
    """A buffer with a slot for each of ``order``, holding what was in the slots of these numbers."""
    wider = buffer.new_zeros(len(order), *buffer.shape[1:])
    wider[:, :held] = buffer[:, :held].index_select(0, order)
    return wider


@dataclass
class Extension:
    """One step of a :class:`SequenceCache`: where its new rows stand and what they see; shared by all layers."""

    cache: SequenceCache
    before: Segments
    new: Segments
    after: Segments
    device: torch.device
    even: bool = field(init=False)
    slots: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    mask: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        """even: all sequences grow alike, so writing is a slice; positions: int64 ``(T,)`` of the new rows within their
        sequences; mask: which keys each new row sees, bool ``(N or 1, 1, longest new, longest)``; None: all."""
        before, new, after = self.before, self.new, self.after
        self.even = before.uniform and new.uniform
        within = np.arange(new.total) - np.repeat(new.bounds[:-1], new.lengths)
        places = within + np.repeat(np.asarray(before.lengths, dtype=np.int64), new.lengths)
        self.positions = upload_index(places, self.device)
        self.mask = None
        if not self.even:
            self.slots = upload_index(
                places + np.repeat(np.arange(new.count) * self.cache.room, new.lengths), self.device
            )
        if not self.even or new.longest > 1:
            sequences = before.lengths[:1] if self.even else before.lengths
            rows = np.asarray(sequences)[:, None] + np.arange(new.longest)
            sees = np.arange(after.longest) <= rows[..., None]
            self.mask = upload_index(sees[:, None], self.device).bool()

    @property
    def layers(self) -> tuple[LayerCache, ...]:
        """What the self-attention of each layer is given as ``cache``."""
        return tuple(LayerCache(self, i) for i in range(len(self.cache._buffers)))


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer in one step."""

    extension: Extension
    layer: int

    def attend(self, q_THd: Tensor, k_THd: Tensor, v_THd: Tensor) -> Tensor:
        """Append keys and values of the new rows, then let each new row see its sequence up to itself.

        All ``(T, heads, head_dim)``, rows of the step's new segments; returns the same shape. Causal by construction.
        """
        step = self.extension
        keys, values = step.cache.write(self.layer, k_THd, v_THd, step)
        new = step.new
        if new.uniform:
            q_NLHd = q_THd.unflatten(0, (new.count, new.longest))
        else:
            padded = q_THd.new_zeros(new.count * new.longest, *q_THd.shape[1:])
            q_NLHd = padded.index_copy_(0, new.slots(q_THd.device), q_THd).unflatten(0, (new.count, new.longest))
        out_NHLd = F.scaled_dot_product_attention(
            q_NLHd.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=step.mask
        )
        out = out_NHLd.transpose(1, 2).flatten(0, 1)
        return out if new.uniform else out[new.slots(q_THd.device)]
