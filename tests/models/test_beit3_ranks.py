"""BEiT-3's losses and gradients do not depend on how many processes share the batch (2 real gloo processes)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from imglish.models.beit3 import beit3_tiny
from imglish.training.step import split
from tests.models.test_beit3 import make_batch, teacher_of, total, trained
from tests.ranks import run_ranks

LENGTHS = [9, 3, 12, 5, 7, 4]


def step(rank: int, parts: int, objective: str, outputs: tuple[str, ...]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of the part of the batch that belongs to ``rank``."""
    model = trained(replace(beit3_tiny(), objective=objective, outputs=outputs))
    batch = split(make_batch(model.config, LENGTHS, [4, 7, 5, 6]), parts)[rank]
    losses = model.losses(batch, teacher_of(model.config) if objective == "mdm" else None)
    total(losses).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {k: float(v.detach()) for k, v in losses.items() if not k.startswith("metric/")}, gradients


@pytest.mark.parametrize(
    ("objective", "outputs"),
    [("mdm", ("mlm", "mim")), ("itc", ("itc",)), ("itc", ("itc", "itm")), ("captions", ("mlm",))],
)
def test_two_processes_equal_one(objective: str, outputs: tuple[str, ...]) -> None:
    alone_losses, alone = step(0, 1, objective, outputs)
    results = run_ranks(2, step, 2, objective, outputs)
    for name, value in alone_losses.items():
        mean = sum(losses[name] for losses, _ in results) / 2
        assert abs(mean - value) < 1e-5 * max(1.0, abs(value)), name
    for name, gradient in alone.items():
        mean_gradient = torch.stack([gradients[name] for _, gradients in results]).mean(0)
        scale = float(gradient.abs().max())
        torch.testing.assert_close(mean_gradient, gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)
