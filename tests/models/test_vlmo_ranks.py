"""VLMo's losses and gradients do not depend on how many processes share the batch (2 real gloo processes)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from imglish.models.vlmo import vlmo_tiny
from imglish.objectives.exchange import exchange_samples
from imglish.training.step import split
from tests.models.test_vlmo import LENGTHS, batch_for, trained
from tests.ranks import run_ranks


def step(rank: int, parts: int, official: bool = False) -> tuple[dict[str, float], dict[str, Tensor], list[list[int]]]:
    """Losses, gradients and drawn negatives of the part of the batch that belongs to ``rank``."""
    model = trained(replace(vlmo_tiny(), own_features_only=official))
    batch = split(batch_for(model.config, LENGTHS), parts)[rank]
    losses = {k: v for k, v in model.losses(batch).items() if not k.startswith("metric/")}
    torch.stack(list(losses.values())).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    drawn = model._draw(model.embed(batch), batch.draws).chosen.numpy()
    return {k: float(v.detach()) for k, v in losses.items()}, gradients, drawn.tolist()


def test_two_processes_equal_one() -> None:
    alone_losses, alone, alone_drawn = step(0, 1)
    results = run_ranks(2, step, 2)
    drawn = np.concatenate(results[0][2], axis=1)
    assert drawn.tolist() == alone_drawn[0]
    count = len(LENGTHS) // 2
    assert (drawn[:, :count] >= count).any(), "no negative comes from the other process"
    for name, value in alone_losses.items():
        mean = sum(losses[name] for losses, _, _ in results) / 2
        assert abs(mean - value) < 1e-5 * max(1.0, abs(value)), name
    for name, gradient in alone.items():
        mean_gradient = torch.stack([gradients[name] for _, gradients, _ in results]).mean(0)
        scale = float(gradient.abs().max())
        torch.testing.assert_close(mean_gradient, gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


def test_official_contrast_loses_strength_with_ranks() -> None:
    """The defect that ``own_features_only`` reproduces: with two ranks half of the gradient of the projections."""
    _, alone, _ = step(0, 1, True)
    results = run_ranks(2, step, 2, True)
    gradient = torch.stack([gradients["image_proj.weight"] for _, gradients, _ in results]).mean(0)
    torch.testing.assert_close(gradient, alone["image_proj.weight"] / 2, rtol=1e-3, atol=1e-7)


def exchange(rank: int) -> Tensor:
    mine = torch.arange(3)[:, None, None] + 10 * rank + torch.zeros(3, 2, 2, dtype=torch.int64)
    return exchange_samples(mine, [np.array([4, 3, 5, 3]), np.array([], dtype=np.int64)])


def test_only_samples_that_are_asked_for_travel() -> None:
    found = run_ranks(2, exchange)
    assert found[0][:, 0, 0].tolist() == [11, 10, 12, 10]
    assert found[0].shape == (4, 2, 2)
    assert found[1].shape == (0, 2, 2)
    assert exchange_samples(torch.arange(4), [np.array([2, 0])]).tolist() == [2, 0]
