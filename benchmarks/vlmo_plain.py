"""VLMo's training step in the official order of work: one forward an objective, texts padded, every row computed.

On the weights of our model, so that it is a peer of the packed step (and a check of it) that differs in nothing else.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.data.batch import Batch, MaskedTexts, TextBatch
from imglish.models.aligned import itm_losses
from imglish.models.capabilities import Embedded
from imglish.models.pairing import Negatives
from imglish.models.vlmo import Vlmo
from imglish.nn.experts import ExpertBlock
from imglish.nn.packing import Packing
from imglish.nn.segments import Segments
from imglish.objectives.mlm import mlm_loss


class Padded:
    """Texts in ``slots`` places each: ids int64 ``(N, slots)`` and which places hold a token, bool ``(N, slots)``."""

    def __init__(self, texts: TextBatch, slots: int) -> None:
        device, count = texts.ids.device, len(texts)
        where = torch.from_numpy(texts.segments.bounds[:-1].repeat(texts.segments.lengths)).to(device)
        place = torch.arange(len(texts.ids), device=device) - where
        number = torch.from_numpy(np.repeat(np.arange(count), texts.segments.lengths)).to(device)
        self.slots = number * slots + place
        self.ids = torch.zeros(count * slots, dtype=torch.int64, device=device).index_copy(0, self.slots, texts.ids)
        taken = torch.zeros(count * slots, device=device).index_fill(0, self.slots, 1.0)
        self.valid = taken.bool().unflatten(0, (count, slots))
        self.segments = Segments.equal(count, slots)

    def batch(self) -> TextBatch:
        return TextBatch(self.ids, self.segments)


class PlainVlmo:
    """The losses of ``model``, whose drop-path rate has to be zero."""

    def __init__(self, model: Vlmo, slots: int = 40) -> None:
        self.model, self.slots = model, slots

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """ITC, MLM and ITM of a batch with masked texts, as ``model.losses`` names them."""
        model, count = self.model, len(batch)
        clean = Padded(batch.texts, self.slots)
        embedded = self._towers(batch, clean)
        found = model.contrast(embedded)
        assert batch.masked is not None
        masked = Padded(TextBatch(batch.masked.ids, batch.texts.segments), self.slots)
        pictures = np.arange(count)
        logits = model._mlm_logits(self._pairs(batch.squares, masked, pictures, pictures)[0].flatten(0, 1))
        found["mlm"] = model.config.mlm_weight * mlm_loss(logits[masked.slots[batch.masked.rows]], batch.masked.labels)
        negatives = model._draw(embedded, batch.draws)
        return found | self._match(batch, clean, negatives)

    def _match(self, batch: Batch, clean: Padded, negatives: Negatives) -> dict[str, Tensor]:
        """Three forwards: the pairs, the drawn pictures for the texts, the drawn texts for the pictures."""
        own = np.arange(len(batch))
        pictures, texts = negatives.chosen.numpy()[0]
        pairs = ((own, own), (pictures, own), (own, texts))
        cls = [self._pairs(batch.squares, clean, *pair)[0][:, 0] for pair in pairs]
        return itm_losses(self.model._itm_logits(torch.cat(cls)), negatives)

    def _towers(self, batch: Batch, clean: Padded) -> Embedded:
        model = self.model
        pictures = model.picture_rows(batch.squares)
        count, length = pictures.shape[:2]
        image = self._alone(pictures.flatten(0, 1), Packing(image=Segments.equal(count, length)), None)
        text = self._alone(model.text_rows(clean.batch()), Packing(text=clean.segments), clean.valid)
        projections = [model.image_proj, model.image_proj_fused], [model.text_proj, model.text_proj_fused]
        features = [
            torch.cat([F.normalize(head(cls).float(), dim=-1) for head, cls in zip(heads, forms, strict=True)], dim=1)
            for heads, forms in zip(projections, (image, text), strict=True)
        ]
        return Embedded(features[0], features[1], batch.image_ids)

    def _alone(self, rows: Tensor, packing: Packing, valid: Tensor | None) -> list[Tensor]:
        """[CLS] by the experts of the modality, and with the VL experts on top."""
        model, bias = self.model, self.model._bias(packing)
        below = model.config.depth - model.config.fused_layers
        for layer in range(below):
            rows = _layer(model.blocks[layer], rows, packing, bias[layer], valid)
        if packing.image.count:
            fused = Packing(fused_image=packing.image, fused_text=Segments.equal(packing.image.count, 0))
        else:
            fused = Packing(fused_image=Segments.equal(packing.text.count, 0), fused_text=packing.text)
        found = []
        for form in (packing, fused):
            states = rows
            for layer in range(below, model.config.depth):
                states = _layer(model.blocks[layer], states, form, bias[layer], valid)
            found.append(model.norm(states).unflatten(0, (packing.count, -1))[:, 0])
        return found

    def _pairs(
        self, images: Tensor, texts: Padded, pictures: np.ndarray, captions: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """All states of pairs, text and picture: ``(P, slots, D)`` and ``(P, L, D)``; pictures are embedded anew."""
        model, device, count = self.model, images.device, len(pictures)
        tokens = model.picture_rows(images[torch.from_numpy(pictures).to(device)])
        chosen = torch.from_numpy(captions).to(device)
        ids, valid = texts.ids.unflatten(0, (-1, self.slots))[chosen], texts.valid[chosen]
        words = Segments.equal(count, self.slots)
        rows = torch.cat([tokens.flatten(0, 1), model.text_rows(TextBatch(ids.flatten(), words))])
        packing = Packing(fused_image=Segments.equal(count, tokens.shape[1]), fused_text=words)
        keys = torch.cat([torch.ones(count, tokens.shape[1], dtype=torch.bool, device=device), valid], dim=1)
        bias = model._bias(packing)
        for layer, block in enumerate(model.blocks):
            rows = _layer(block, rows, packing, bias[layer], keys)
        image, text = model.norm(rows).split([packing.fused_image.total, words.total])
        return text.unflatten(0, (count, self.slots)), image.unflatten(0, (count, -1))


def _layer(
    block: ExpertBlock, rows: Tensor, packing: Packing, bias: list[Tensor] | None, valid: Tensor | None
) -> Tensor:
    """A block over sequences of one length, some of whose keys (``valid (N, L)``) are padding."""
    q, k, v = (
        packing.groups.gather(x)[0].unflatten(0, (packing.count, -1)).transpose(1, 2)
        for x in block.attn.project(rows, packing)
    )
    mask = None if bias is None else bias[0][None].to(q.dtype)
    if valid is not None:
        keys = torch.zeros(valid.shape, dtype=q.dtype, device=q.device).masked_fill(~valid, -math.inf)[:, None, None]
        mask = keys if mask is None else mask + keys
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)
    x = rows + block.scale1(block.attn.merge(packing.groups.scatter([mixed]), packing))
    out: Tensor = x + block.scale2(block.ffn(x, packing))
    return out


def make_batch(size: int, lengths: list[int], vocab_size: int, seed: int = 0) -> Batch:
    """Random pictures of ``size`` pixels and texts of these lengths, about every sixth token masked."""
    generator = torch.Generator().manual_seed(seed)
    texts = TextBatch.of([torch.randint(5, vocab_size, (n,), generator=generator).tolist() for n in lengths])
    counts = tuple(max(1, round((n - 1) / 6)) for n in lengths)
    rows = [int(start) + 1 + k for start, c in zip(texts.segments.bounds[:-1], counts) for k in range(c)]
    at, ids = torch.tensor(rows), texts.ids.clone()
    labels, ids[at] = ids[at], 4
    return Batch(
        images=torch.randint(0, 256, (len(lengths), 3, size, size), generator=generator, dtype=torch.uint8),
        texts=texts,
        image_ids=torch.arange(len(lengths)),
        draws=torch.rand(len(lengths), 2, generator=generator),
        masked=MaskedTexts(ids, at, labels, counts),
    )
