"""BLIP's losses and gradients do not depend on how many processes share the batch (2 real gloo processes)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from imglish.models.blip import blip_tiny
from imglish.training.step import Stepper, StepSettings, split
from tests.models.test_albef import make_batch
from tests.models.test_blip import assert_close, losses_and_gradients, trained_pair
from tests.ranks import run_ranks

LENGTHS = [9, 3, 12, 5, 7, 4, 6, 8]


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


def trained(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    """Gradients of the training loop's step: of all objectives, and without ITM in two parts a process."""
    found = {}
    for parts, itm in ((1, True), (2, False)):
        config = replace(blip_tiny(), itm=itm)
        model, teacher = trained_pair(config)
        mine = split(replace(make_batch(config, LENGTHS), masked=None), world)[rank]
        Stepper(model, teacher, StepSettings(parts, seed=5, autocast=False), probe=mine)(mine, step=0)
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[f"{parts} parts"] = grads
    return found


def test_the_training_step_of_two_processes_is_that_of_one() -> None:
    expected = trained(0, 1)
    for result in run_ranks(2, trained, 2):
        for name, gradients in expected.items():
            assert_close(result[name], gradients)
