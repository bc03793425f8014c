"""Captions on the Multiway Transformer: pictures see themselves, texts see the picture and what they have so far.

A caption is filled in where it is masked; its next word is the [MASK] behind its last one (BEiT-3, section 3.2).
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from imglish.data.batch import TextBatch
from imglish.models.capabilities import ImageMemory
from imglish.models.captioning import CaptionState
from imglish.models.multiway import Multiway
from imglish.nn.attention import Memory, attend
from imglish.nn.experts import ExpertBlock
from imglish.nn.packing import Packing, Read
from imglish.nn.prefix import attend_after, causal_mask, own_keys
from imglish.nn.segments import Segments, upload_index


def picture_memory(body: Multiway, tokens: Tensor) -> ImageMemory:
    """Keys and values of pictures in every layer, from their input rows ``(B, L, D)``."""
    segments = Segments.equal(tokens.shape[0], tokens.shape[1])
    packing = Packing(fused_image=segments, fused_text=Segments((0,) * segments.count))
    rows, layers = tokens.flatten(0, 1), []
    for block in _blocks(body):
        q, k, v = block.attn.project(rows, packing)
        layers.append((k, v))
        rows = block.finish(rows, attend(q, k, v, segments, segments), packing)
    return ImageMemory(tuple(layers), segments)


def next_states(body: Multiway, state: CaptionState, texts: TextBatch, mask_id: int) -> Tensor:
    """Append ``texts`` and a [MASK] to each of N sequences; the [MASK]s' states ``(N, D)``, which are forgotten."""
    device, given = texts.ids.device, texts.segments
    segments = Segments.of(length + 1 for length in given.lengths)
    place = np.arange(given.total) + np.repeat(np.arange(given.count), given.lengths)
    masked = texts.ids.new_full((segments.total,), mask_id)
    ids = masked.index_copy(0, upload_index(place, device), texts.ids)
    step = state.cache.extend(segments, device)
    none = Segments((0,) * segments.count)
    packing = Packing(fused_image=none, fused_text=segments)
    rows = body.text_rows(TextBatch(ids, segments), step.positions)
    for layer, (block, picture) in enumerate(zip(_blocks(body), state.memories(), strict=True)):
        q, k, v = block.attn.project(rows, packing)
        keys, values = step.cache.write(layer, k, v, step)
        rows = block.finish(rows, attend_after(q, segments, picture, keys, values, step.mask), packing)
    state.cache.forget(1)
    one = Packing(fused_image=none, fused_text=Segments.equal(segments.count, 1))
    return body.normed(rows[segments.ends(device)], one)


def masked_states(
    body: Multiway, pictures: Tensor, texts: TextBatch, index: Tensor, counts: tuple[int, ...], captions: int
) -> Tensor:
    """States ``(M, D)`` of the rows ``index`` of texts, ``counts`` of them in each; ``captions`` texts a picture.

    pictures: input rows ``(B, L, D)``, which pass the layers once for all their texts.
    """
    device, segments, many = pictures.device, texts.segments, Segments.equal(len(pictures), captions)
    image = Segments.equal(pictures.shape[0], pictures.shape[1])
    packing = Packing(fused_image=image, fused_text=_of_pictures(segments, captions))
    kept = Segments(counts)
    nothing = Segments((0,) * len(pictures))
    read = Read(index + image.total, Packing(fused_image=nothing, fused_text=_of_pictures(kept, captions)))
    rows = torch.cat([pictures.flatten(0, 1), body.text_rows(texts)])
    mask, blocks = causal_mask(segments, device), _blocks(body)
    for block in blocks[:-1]:
        q, k, v = block.attn.project(rows, packing)
        (q_i, q_t), (k_i, k_t), (v_i, v_t) = (x.split([image.total, segments.total]) for x in (q, k, v))
        seen = Memory(k_i, v_i, image, many)
        on_text = attend_after(q_t, segments, seen, own_keys(k_t, segments), own_keys(v_t, segments), mask)
        rows = block.finish(rows, torch.cat([attend(q_i, k_i, v_i, image, image), on_text]), packing)
    block = blocks[-1]
    q, k, v = block.attn.project(rows, packing, read)
    (k_i, k_t), (v_i, v_t) = (x.split([image.total, segments.total]) for x in (k, v))
    mask = causal_mask(segments, device, kept, index)
    seen = Memory(k_i, v_i, image, many)
    mixed = attend_after(q, kept, seen, own_keys(k_t, segments), own_keys(v_t, segments), mask)
    return body.normed(block.finish(rows, mixed, packing, read), read.packing)


def _of_pictures(texts: Segments, captions: int) -> Segments:
    """Rows a text, added up to rows a picture."""
    if captions == 1:
        return texts
    return Segments.of(np.asarray(texts.lengths, dtype=np.int64).reshape(-1, captions).sum(1))


def _blocks(body: Multiway) -> tuple[ExpertBlock, ...]:
    return cast(tuple[ExpertBlock, ...], tuple(body.blocks))
