"""The training objective on held-out data, for stages whose models are not yet of use in retrieval: a visual tokenizer,
masked pictures, masked texts, masked pictures and texts together.

Everything is the same at every validation: the pictures are whole, masks are drawn from the number of the item.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imglish.data.batch import Batch
from imglish.data.dataset import PairDataset, collate
from imglish.data.errors import Errors
from imglish.models.visual_codes import CodeTeacher, TokenizesImages

BLOCK = 64  # items computed at a time, whatever the batch of the training is


@dataclass(frozen=True)
class HeldOut:
    """losses, metrics: means over the held-out items, named as in training; and measured over all of them together:

    ``code_usage`` of a visual tokenizer, and ``code_usage_by_place``, which leaves out what codes only say about the
    place in the picture; ``mim_by_place`` and ``mlm_by_frequency`` of masked objectives: what the loss is of a model
    that knows how frequent each code is at each place, or each token, among these very items, and nothing else. A model
    that has learned more is below. (Codes are counted: with fewer pictures than codes both values come out too small.)
    """

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
    codes: list[Tensor] = []  # of whole pictures, (B, places) each
    words: list[Tensor] = []
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
                if (tokenize := _tokenizer(model, teacher)) is not None:
                    grid: int = model.config.grid  # type: ignore[union-attr,assignment]
                    codes.append(tokenize(batch.squares, (grid, grid)).cpu())
                if batch.masked is not None:
                    words.append(batch.masked.labels.cpu())
    finally:
        model.train(was_training)
    means = {name: value / len(dataset) for name, value in sums.items()}
    metrics = {name.removeprefix("metric/"): mean for name, mean in means.items() if name.startswith("metric/")}
    if isinstance(model, TokenizesImages):
        metrics["code_usage"] = math.exp(_entropy(torch.cat(codes))) / model.codes
        metrics["code_usage_by_place"] = math.exp(_by_place(torch.cat(codes))) / model.codes
    elif codes:
        metrics["mim_by_place"] = _by_place(torch.cat(codes))
    if words:
        metrics["mlm_by_frequency"] = _entropy(torch.cat(words))
    return HeldOut({name: mean for name, mean in means.items() if not name.startswith("metric/")}, metrics)


def _tokenizer(model: nn.Module, teacher: Any) -> Callable[[Tensor, tuple[int, int]], Tensor] | None:
    """What gives the codes of pictures: the model, or the visual tokenizer whose codes it fills in."""
    if isinstance(model, TokenizesImages):
        return model.tokenize
    return teacher.codes if isinstance(teacher, CodeTeacher) else None


def _blocks(dataset: PairDataset, errors: Errors) -> Iterator[Batch]:
    for first in range(0, len(dataset), BLOCK):
        samples = [dataset.sample(0, 0, item) for item in range(first, min(first + BLOCK, len(dataset)))]
        errors.extend(problem for sample in samples for problem in sample.unreadable)
        yield collate(samples)


def _by_place(codes: Tensor) -> float:
    """Mean over places of the entropy of ``codes (N, places)`` at each, in nats."""
    return sum(_entropy(column) for column in codes.T) / codes.shape[1]


def _entropy(numbers: Tensor) -> float:
    """Of how often each number comes, in nats; 0 of none."""
    counts = torch.bincount(numbers.flatten()).double()
    return float(torch.special.entr(counts / counts.sum().clamp(min=1)).sum())
