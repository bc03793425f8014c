"""CoCa's losses and gradients do not depend on how many processes share the batch (2 real gloo processes)."""

from __future__ import annotations

import torch
from torch import Tensor

from imglish.models.coca import coca_tiny
from imglish.training.step import split
from tests.models.test_coca import LENGTHS, make_batch, trained
from tests.ranks import run_ranks


def step(rank: int, parts: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of the part of the batch that belongs to ``rank``; two captions a picture."""
    model = trained(coca_tiny())
    batch = split(make_batch(model.config, sorted(LENGTHS), captions=2), parts)[rank]
    losses = {k: v for k, v in model.losses(batch).items() if not k.startswith("metric/")}
    sum(losses.values()).backward()
    return {k: float(v.detach()) for k, v in losses.items()}, {n: p.grad for n, p in model.named_parameters()}


def test_two_processes_equal_one() -> None:
    (alone_losses, alone), results = step(0, 1), run_ranks(2, step, 2)
    for name, value in alone_losses.items():
        mean = sum(losses[name] for losses, _ in results) / 2
        assert abs(mean - value) < 1e-5 * max(1.0, abs(value)), name
    for name, gradient in alone.items():
        mean_gradient = torch.stack([gradients[name] for _, gradients in results]).mean(0)
        scale = float(gradient.abs().max())
        torch.testing.assert_close(mean_gradient, gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)
