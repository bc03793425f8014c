"""The training objective on held-out data, for stages whose models are not yet of use in retrieval: a visual tokenizer,
masked pictures, masked texts, masked pictures and texts together.

Everything is the same at every validation: the pictures are whole, masks are drawn from the number of the item.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imglish.data.batch import Batch
from imglish.data.dataset import PairDataset, collate
from imglish.data.errors import Errors
from imglish.models.visual_codes import CodeTeacher, TokenizesImages
from imglish.objectives.codes import code_usage

BLOCK = 64  # items computed at a time, whatever the batch of the training is


@dataclass(frozen=True)
class HeldOut:
    """losses, metrics: means over the held-out items, named as in training. Among the metrics are, of a visual
    tokenizer, ``code_usage`` over all held-out pictures together, and of masked objectives ``mim_by_frequency`` and
    ``mlm_by_frequency``: what the loss is of a model that knows nothing but how frequent each code or token is among
    these targets. A model that has learned something is below."""

    losses: dict[str, float]
    metrics: dict[str, float]

    @property
    def total(self) -> float:
        """What training lowers."""
        return sum(self.losses.values())

    def text(self) -> str:
        """Losses and metrics in one line."""
        return ", ".join(f"{name} {value:.3f}" for name, value in {**self.losses, **self.metrics}.items())


def held_out(model: nn.Module, teacher: Any, dataset: PairDataset, autocast: bool, errors: Errors) -> HeldOut:
    """``model.losses`` over all items of ``dataset``, without gradient.

    Every process computes all of it: losses are means over the batches of all processes, which are then the same one.
    errors: takes pictures that cannot be read, for which the next one stands in. teacher: as in training.
    """
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    codes = _Frequencies()
    targets = {"mim_by_frequency": _Frequencies(), "mlm_by_frequency": _Frequencies()}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in _blocks(dataset, errors):
                batch = batch.to(device)
                torch.manual_seed(0)
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    found: dict[str, Tensor] = model.losses(batch, teacher)  # type: ignore[operator]
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * len(batch)
                if isinstance(model, TokenizesImages):
                    grid: int = model.config.grid  # type: ignore[union-attr,assignment]
                    codes.add(model.tokenize(batch.squares, (grid, grid)))
                if isinstance(teacher, CodeTeacher) and batch.patches is not None:
                    grid = model.config.grid  # type: ignore[union-attr,assignment]
                    of_patches = teacher.codes(batch.squares, (grid, grid)).flatten()
                    targets["mim_by_frequency"].add(of_patches[batch.patches.rows])
                if batch.masked is not None:
                    targets["mlm_by_frequency"].add(batch.masked.labels)
    finally:
        model.train(was_training)
    means = {name: value / len(dataset) for name, value in sums.items()}
    metrics = {name.removeprefix("metric/"): mean for name, mean in means.items() if name.startswith("metric/")}
    if isinstance(model, TokenizesImages):
        metrics["code_usage"] = float(code_usage(codes.all(), model.codes))
    metrics |= {name: values.entropy() for name, values in targets.items() if values.parts}
    return HeldOut({name: mean for name, mean in means.items() if not name.startswith("metric/")}, metrics)


def _blocks(dataset: PairDataset, errors: Errors) -> Iterator[Batch]:
    for first in range(0, len(dataset), BLOCK):
        samples = [dataset.sample(0, 0, item) for item in range(first, min(first + BLOCK, len(dataset)))]
        errors.extend(problem for sample in samples for problem in sample.unreadable)
        yield collate(samples)


class _Frequencies:
    """Which numbers came how often."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, numbers: Tensor) -> None:
        self.parts.append(numbers.flatten().cpu())

    def all(self) -> Tensor:
        return torch.cat(self.parts)

    def entropy(self) -> float:
        """Of the frequencies, in nats."""
        counts = torch.bincount(self.all()).double()
        share = counts / counts.sum()
        return float(torch.special.entr(share).sum()) if len(self.all()) else math.nan
