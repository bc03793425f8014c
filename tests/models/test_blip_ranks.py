"""BLIP's losses and gradients do not depend on how many processes share the batch (2 real gloo processes)."""

from __future__ import annotations

import torch
from torch import Tensor

from imglish.models.blip import blip_tiny
from imglish.training.step import split
from tests.models.test_albef import make_batch
from tests.models.test_blip import assert_close, losses_and_gradients, trained_pair
from tests.ranks import run_ranks

LENGTHS = [9, 3, 12, 5, 7, 4]


def step(rank: int, parts: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Losses, gradients and the queue of the part of the batch that belongs to ``rank``."""
    model, teacher = trained_pair(blip_tiny())
    with torch.no_grad():
        teacher.model.text_proj.weight.mul_(0.9)
    whole = make_batch(model.config, LENGTHS, swapped=True)
    part = split(whole, parts)[rank]
    losses, gradients = losses_and_gradients(model, model.losses(part, teacher))
    teacher.enqueue()
    assert teacher.queue is not None
    detached = {name: value.detach() for name, value in losses.items()}
    return detached, gradients, teacher.queue.content()[0].clone()


def test_two_processes_equal_one() -> None:
    losses, gradients, queue = step(0, 1)
    results = run_ranks(2, step, 2)
    for _, _, other in results:
        torch.testing.assert_close(other, queue)
    for number, expected in ((0, losses), (1, gradients)):
        found = {name: (results[0][number][name] + results[1][number][name]) / 2 for name in expected}
        assert_close(found, expected)
