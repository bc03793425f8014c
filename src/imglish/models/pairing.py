"""Which texts meet which pictures in a training step of a fusion model, laid out so that nothing is computed twice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imglish.data.batch import Batch, MaskedTexts, TextBatch
from imglish.models.capabilities import ImageMemory
from imglish.nn.segments import HostCopy, Segments, upload_index


def all_texts(batch: Batch, masked: bool) -> TextBatch:
    """The clean texts, then the masked ones (if asked for and there), then the swapped ones: one packed batch."""
    ids, segments = [batch.texts.ids], batch.texts.segments
    if masked and batch.masked is not None:
        ids.append(batch.masked.ids)
        segments = segments + batch.texts.segments
    if batch.swapped is not None:
        ids.append(batch.swapped.ids)
        segments = segments + batch.swapped.segments
    return TextBatch(torch.cat(ids), segments)


@dataclass(frozen=True)
class Layout:
    """The pairs of a step that are known beforehand, in the order of their pictures.

    At picture b stand its text, its masked text and its swapped text. rows: host row numbers that bring the states of
    :func:`all_texts` into this order; segments: their lengths; texts: how many texts each picture has; read: rows that
    heads read of each text ([CLS], or the masked positions); matched: which of the read rows are [CLS], first of all
    clean texts and then of all swapped ones; masked: which are masked positions, in the order of the batch.
    """

    rows: np.ndarray
    segments: Segments
    texts: Segments
    read: Segments
    matched: np.ndarray
    masked: np.ndarray
    _base: np.ndarray

    def read_index(self, masked: MaskedTexts | None, device: torch.device) -> Tensor:
        """Row numbers (in this order) of the read rows, on ``device``; the masked positions are known there only."""
        index = upload_index(self._base, device)
        if masked is None or not len(self.masked):
            return index
        return index.index_add(0, upload_index(self.masked, device), masked.rows)


def lay_out(batch: Batch, matches: bool, fills: bool) -> Layout:
    """Plan the first fusion pass of ``batch`` for a step with ITM (``matches``) and/or MLM (``fills``)."""
    count, clean = len(batch), batch.texts.segments
    kinds = ["clean"] + ["masked"] * (fills and batch.masked is not None) + ["swapped"] * (batch.swapped is not None)
    everyone = Segments(
        clean.lengths * (1 + ("masked" in kinds)) + (batch.swapped.segments.lengths if batch.swapped else ())
    )
    used = [k for k in range(len(kinds)) if kinds[k] == "masked" or matches]
    order = [k * count + b for b in range(count) for k in used]
    segments = everyone.select(order)
    one = (1,) * count
    counts = {"clean": one, "swapped": one, "masked": batch.masked.counts if batch.masked is not None else ()}
    read = Segments.of(counts[kinds[k]][b] for b in range(count) for k in used)
    base = np.repeat(segments.bounds[:-1], read.lengths)
    places = {kinds[k]: read.rows_of(range(i, len(order), len(used))) for i, k in enumerate(used)}
    none = np.zeros(0, dtype=np.int64)
    masked = places.get("masked", none)
    if len(masked):  # the batch counts masked rows from the start of all clean texts, this order from each text's own
        base[masked] -= np.repeat(clean.bounds[:-1], counts["masked"])
    matched = np.concatenate([places.get("clean", none), places.get("swapped", none)])
    return Layout(everyone.rows_of(order), segments, Segments.equal(count, len(used)), read, matched, masked, base)


@dataclass(frozen=True)
class Negatives:
    """chosen: on its way to the host, int64 ``(2, B)``: the picture drawn for each text, the text for each picture;
    exist: bool ``(2B,)`` on the device, which of them are real (a batch of one picture has no negatives)."""

    chosen: HostCopy
    exist: Tensor


def join_memories(first: ImageMemory, second: ImageMemory) -> ImageMemory:
    """The pictures of ``first``, then those of ``second``."""
    layers = tuple(
        tuple(torch.cat(pair) for pair in zip(mine, others, strict=True))
        for mine, others in zip(first.layers, second.layers, strict=True)
    )
    return ImageMemory(layers, first.segments + second.segments)
