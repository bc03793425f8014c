"""Gradients of one training step: one backward pass, or several parts that give the contrastive gradient of the whole.

A contrastive loss compares all pairs of the batch, so summing gradients of small batches would train something else.
With accumulation the features of all parts are computed first (no gradient), the loss and its gradient with respect
to the features follow, and each part is then computed again and back-propagated from its slice of that gradient
(cached features; Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup").
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from imglish.data.batch import Batch, MaskedTexts, PatchMasks, TextBatch, Unpaired
from imglish.data.tasks.batch import TaskBatch
from imglish.models.capabilities import Contrastive, Embedded, Trainable, require
from imglish.nn.segments import Segments
from imglish.objectives.gather import rank, world_size

Losses = dict[str, Tensor]
SURROGATE = "itc"  # name under which `Embedded.surrogate` stands among the losses, whatever the contrast is called


def split(batch: Batch | TaskBatch, parts: int) -> list[Batch | TaskBatch]:
    """``batch`` (on the host or a device) as ``parts`` batches of equal size; packed rows are cut as views.

    Every part knows the whole, so that means over words and patches are those of the whole (:meth:`Batch.mean`).
    """
    if parts == 1:
        return [batch]
    size, rest = divmod(len(batch), parts)
    if rest:
        raise ValueError(f"a batch of {len(batch)} does not divide into {parts} parts")
    return [_part(batch, slice(i * size, (i + 1) * size)) for i in range(parts)]


def _part(batch: Batch | TaskBatch, pairs: slice) -> Batch | TaskBatch:
    if isinstance(batch, TaskBatch):
        return batch.part(pairs)
    texts = slice(pairs.start * batch.captions, pairs.stop * batch.captions)
    return replace(
        batch,
        images=batch.images[pairs],
        texts=_texts(batch.texts, texts),
        image_ids=batch.image_ids[pairs],
        draws=batch.draws[pairs],
        masked=_masked(batch.masked, batch.texts.segments, texts) if batch.masked is not None else None,
        swapped=_texts(batch.swapped, pairs) if batch.swapped is not None else None,
        patches=_patches(batch.patches, pairs) if batch.patches is not None else None,
        unpaired=_unpaired(batch.unpaired, pairs, len(batch)) if batch.unpaired is not None else None,
        keys=batch.keys[pairs],
        whole=batch,
    )


def _masked(masked: MaskedTexts, segments: Segments, texts: slice) -> MaskedTexts:
    rows, some = _rows(segments, texts), _counted(masked.counts, texts)
    return MaskedTexts(masked.ids[rows], masked.rows[some] - rows.start, masked.labels[some], masked.counts[texts])


def _patches(masks: PatchMasks, pictures: slice) -> PatchMasks:
    rows = masks.rows[_counted(masks.counts, pictures)] - pictures.start * masks.patches
    return PatchMasks(rows, masks.counts[pictures], masks.patches)


def _unpaired(unpaired: Unpaired, pairs: slice, of: int) -> Unpaired:
    """As large a share of the pictures and of the texts as ``pairs`` is of the ``of`` pairs."""
    pictures, texts = (slice(pairs.start * n // of, pairs.stop * n // of) for n in unpaired.sizes)
    return Unpaired(
        unpaired.images[pictures],
        _patches(unpaired.patches, pictures),
        _texts(unpaired.texts, texts),
        _masked(unpaired.masked, unpaired.texts.segments, texts),
    )


def _counted(counts: tuple[int, ...], part: slice) -> slice:
    return slice(sum(counts[: part.start]), sum(counts[: part.stop]))


def _rows(segments: Segments, pairs: slice) -> slice:
    return slice(int(segments.bounds[pairs.start]), int(segments.bounds[pairs.stop]))


def _texts(texts: TextBatch, pairs: slice) -> TextBatch:
    return TextBatch(texts.ids[_rows(texts.segments, pairs)], Segments(texts.segments.lengths[pairs]))


class _Summed(nn.Module):
    """What data-parallel training wraps: the model's losses with their weighted sum.

    ``also``: parameters whose gradient was made outside of this pass (the temperature, by the contrastive loss over
    cached features); they take part with zero weight, so that their gradient is averaged over processes with the rest.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: Any, teacher: Any, feature_grads: Embedded | None, share: float, also: Sequence[nn.Parameter]
    ) -> tuple[Tensor, Losses]:
        losses: Losses = self.model(batch, teacher, feature_grads)
        terms = [
            value if name == SURROGATE and feature_grads is not None else value * share
            for name, value in losses.items()
            if not name.startswith("metric/")
        ]
        if not terms:
            raise RuntimeError("the model has no loss to train: every objective is switched off")
        terms += [0.0 * parameter.sum() for parameter in also]
        return torch.stack([term.float() for term in terms]).sum(), losses


@dataclass(frozen=True)
class StepSettings:
    """parts: of each rank's batch; seed: of dropout; autocast: bf16 matrix products."""

    parts: int
    seed: int
    autocast: bool


class Stepper:
    """Computes losses and leaves gradients in the parameters; knows accumulation and processes, no optimiser.

    ``probe``: a batch of this rank, needed with several processes only: parameters that no loss reaches are found by
    it and frozen (data-parallel training waits for the gradient of every parameter). Their names are in ``idle``.
    """

    def __init__(self, model: nn.Module, teacher: Any, settings: StepSettings, probe: Any = None) -> None:
        self.model, self.teacher, self.settings = model, teacher, settings
        self.device = next(model.parameters()).device
        require(model, Trainable, "training")
        self._contrastive: Any = model if isinstance(model, Contrastive) else None
        self._summed: nn.Module = _Summed(model)
        self.idle: list[str] = []
        if world_size() > 1:
            if probe is None:
                raise ValueError("several processes need a probe batch")
            self.idle = self._freeze_idle(split(probe, settings.parts)[0].to(self.device))
            names = inspect.signature(DistributedDataParallel).parameters  # renamed in torch 2.13
            unsynced = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
            keywords: dict[str, Any] = {unsynced: False}
            self._summed = DistributedDataParallel(self._summed, **keywords)

    def __call__(self, batch: Any, step: int) -> Losses:
        """Gradients of the mean over the global batch, from this rank's ``batch``; returns the losses, detached."""
        parts = split(batch, self.settings.parts)
        moved = [part.to(self.device, non_blocking=True).blended() for part in parts]
        if len(moved) == 1:
            self._seed(step, 0)
            with self._autocast():
                total, losses = self._summed(moved[0], self.teacher, None, 1.0, [])
            total.backward()
            return {name: value.detach() for name, value in losses.items()}
        return self._accumulate(moved, step)

    def _accumulate(self, parts: list[Any], step: int) -> Losses:
        if self._contrastive is None:
            return self._add_up(parts, step)
        cached: list[Embedded] = []
        for i, part in enumerate(parts):
            self._seed(step, i)
            with torch.no_grad(), self._autocast():
                cached.append(replace(self._contrastive.embed(part, self.teacher), towers=None))
        leaves = _concatenate(cached)
        with self._autocast():
            contrast = self._contrastive.contrast(leaves, self.teacher)
        terms = [value.float() for name, value in contrast.items() if not name.startswith("metric/")]
        if terms:
            torch.stack(terms).sum().backward()
        also = [p for p in self.model.parameters() if p.grad is not None]
        sums: Losses = {name: value.detach() for name, value in contrast.items()}
        size = len(parts[0])
        slices = [_gradients(leaves, slice(i * size, (i + 1) * size)) if terms else None for i in range(len(parts))]
        for name, value in self._add_up(parts, step, slices, also).items():
            if name not in contrast and (not terms or name != SURROGATE):
                sums[name] = value
        return sums

    def _add_up(
        self,
        parts: list[Any],
        step: int,
        grads: Sequence[Embedded | None] | None = None,
        also: Sequence[nn.Parameter] = (),
    ) -> Losses:
        """Gradients of the mean over the parts, one backward pass each; returns the means of their losses."""
        sums: Losses = {}
        for i, part in enumerate(parts):
            with self._unsynchronised(i < len(parts) - 1):
                self._seed(step, i)
                with self._autocast():
                    feature_grads = None if grads is None else grads[i]
                    total, losses = self._summed(part, self.teacher, feature_grads, 1 / len(parts), also)
                total.backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / len(parts)
        return sums

    def _freeze_idle(self, batch: Any) -> list[str]:
        """Switch off the gradient of parameters that no loss reaches; weights, buffers and queue stay as they are."""
        teacher = copy.deepcopy(self.teacher)  # the run's own must not remember this batch
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self._seed(0, 0)
        with self._autocast():
            total, _ = self._summed(batch, teacher, None, 1.0, [])
        total.backward()
        idle = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            if name in idle:
                parameter.requires_grad_(False)
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        return idle

    def _seed(self, step: int, part: int) -> None:
        """Dropout is drawn from (seed, step, part, rank): twice alike for a part, and the same after a resume."""
        name = f"{self.settings.seed} {step} {part} {rank()}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.autocast)

    def _unsynchronised(self, wanted: bool) -> AbstractContextManager[Any]:
        if wanted and isinstance(self._summed, DistributedDataParallel):
            return self._summed.no_sync()
        return nullcontext()


_FEATURES = ("image", "text", "swapped")


def _concatenate(parts: list[Embedded]) -> Embedded:
    """The features of all parts, as leaves that collect a gradient where the student made them."""
    joined: dict[str, Tensor | None] = {}
    for field in fields(Embedded):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            joined[field.name] = torch.cat(values)
            if field.name in _FEATURES:
                joined[field.name] = torch.cat(values).detach().requires_grad_(True)
    return Embedded(**joined)  # type: ignore[arg-type]


def _gradients(leaves: Embedded, pairs: slice) -> Embedded:
    def slice_of(name: str) -> Tensor | None:
        leaf: Tensor | None = getattr(leaves, name)
        if leaf is None:
            return None
        captions = leaf.shape[0] // leaves.image.shape[0]
        rows = slice(pairs.start * captions, pairs.stop * captions)
        return torch.zeros_like(leaf[rows]) if leaf.grad is None else leaf.grad[rows]

    image, text = slice_of("image"), slice_of("text")
    assert image is not None
    assert text is not None
    return Embedded(image, text, leaves.image_ids[pairs], swapped=slice_of("swapped"))
