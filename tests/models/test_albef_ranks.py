"""ALBEF's losses and gradients do not depend on how many processes share the batch (2 real gloo processes)."""

from __future__ import annotations

import torch
from torch import Tensor

from imglish.models.albef import albef_tiny
from imglish.training.step import split
from tests.models.test_albef import make_batch, trained_pair
from tests.ranks import run_ranks

LENGTHS = [9, 3, 12, 5, 7, 4]


def step(rank: int, parts: int) -> tuple[dict[str, float], dict[str, Tensor], Tensor]:
    """Losses, gradients and the queue of the part of the batch that belongs to ``rank``."""
    model, teacher = trained_pair(albef_tiny())
    with torch.no_grad():
        teacher.model.text_proj.weight.mul_(0.9)
    batch = split(make_batch(model.config, LENGTHS, swapped=True), parts)[rank]
    losses = {k: v for k, v in model.losses(batch, teacher).items() if not k.startswith("metric/")}
    sum(losses.values()).backward()
    teacher.enqueue()
    assert teacher.queue is not None
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {k: float(v.detach()) for k, v in losses.items()}, gradients, teacher.queue.content()[0].clone()


def test_two_processes_equal_one() -> None:
    alone_losses, alone, alone_queue = step(0, 1)
    results = run_ranks(2, step, 2)
    for name, value in alone_losses.items():
        mean = sum(losses[name] for losses, _, _ in results) / 2
        assert abs(mean - value) < 1e-5 * max(1.0, abs(value)), name
    for _, _, queue in results:
        torch.testing.assert_close(queue, alone_queue)
    for name, gradient in alone.items():
        mean_gradient = torch.stack([gradients[name] for _, gradients, _ in results]).mean(0)
        scale = float(gradient.abs().max())
        torch.testing.assert_close(mean_gradient, gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)
