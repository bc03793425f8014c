"""Hard negatives of models that read pairs from the first layer on (VLMo, BEiT-3), over the batch of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from imglish.data.batch import Batch, TextBatch
from imglish.models.capabilities import EncodedTexts, ImageMemory
from imglish.models.pairing import Negatives
from imglish.nn.segments import HostCopy, upload_index
from imglish.objectives.exchange import exchange_samples, gather_rows
from imglish.objectives.gather import gather, rank, world_size
from imglish.objectives.itm import draw_negatives, has_negative, negative_weights


class ReadsPairs(Protocol):
    """What is asked of the Transformer."""

    def picture_rows(self, images: Tensor) -> Tensor: ...

    def text_rows(self, texts: TextBatch) -> Tensor: ...

    def project_images(self, tokens: Tensor) -> ImageMemory: ...

    def pooled(
        self, memory: ImageMemory, texts: EncodedTexts, image_index: Sequence[int], text_index: Sequence[int]
    ) -> Tensor: ...


@torch.no_grad()
def draw_pairs(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor, draws: Tensor, share: float = 1.0) -> Negatives:
    """One hard negative text a picture and picture a text, over the batch of all ranks, by similarity.

    image, text: ``(B, E)`` unit features; scale: of the similarities; ids: ``(B,)``; draws: ``(B, 2)``; share of the
    negatives drawn by similarity, the others are drawn evenly (0: features are not looked at). The numbers of all
    ranks travel to the host, ``(W, 2, B)``: each rank learns what the others want of it.
    """
    everyone = gather(ids)
    nothing = torch.zeros(ids.shape[0], everyone.shape[0], device=ids.device)
    texts = pictures = negative_weights(nothing, ids, everyone)
    if share > 0:
        image, text = image.detach(), text.detach()
        texts = texts.lerp(negative_weights(scale * image @ gather(text).T, ids, everyone), share)
        pictures = pictures.lerp(negative_weights(scale * text @ gather(image).T, ids, everyone), share)
    chosen = torch.stack([draw_negatives(pictures, draws[:, 0]), draw_negatives(texts, draws[:, 1])])
    exist = torch.cat([has_negative(pictures), has_negative(texts)])
    return Negatives(HostCopy(gather(chosen[None])), exist)


def pooled_negatives(body: ReadsPairs, negatives: Negatives, batch: Batch, tokens: Tensor, rows: Tensor) -> Tensor:
    """What ``body.pooled`` gives for B texts with their negative picture, then B pictures with their negative text.

    tokens ``(B, L, D)``, rows ``(T, D)``: input rows of this rank's pictures and texts. What lies on other ranks comes
    as pixels and token ids and is embedded here, so gradients need no way back.
    """
    chosen, count, mine = negatives.chosen.numpy(), len(batch), np.arange(len(batch))
    segments = batch.texts.segments
    pictures, captions = chosen[rank()]
    if world_size() > 1:
        first = rank() * count
        foreign = [np.setdiff1d(wanted, r * count + mine) for r, wanted in enumerate(chosen[:, 0])]
        tokens = torch.cat([tokens, body.picture_rows(exchange_samples(batch.squares, foreign))])
        place = {int(n): count + i for i, n in enumerate(foreign[rank()])} | {first + i: i for i in range(count)}
        pictures = np.array([place[int(n)] for n in pictures])
        ids, everyone = gather_rows(batch.texts.ids[:, None], segments)
        wanted = TextBatch(ids[upload_index(everyone.rows_of(captions), ids.device), 0], everyone.select(captions))
        rows, segments = torch.cat([rows, body.text_rows(wanted)]), segments + wanted.segments
        captions = count + mine
    texts = EncodedTexts(rows[:0], segments, rows)
    both = [*pictures.tolist(), *mine.tolist()], [*mine.tolist(), *captions.tolist()]
    return body.pooled(body.project_images(tokens), texts, *both)
