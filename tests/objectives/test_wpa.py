"""Word-patch alignment: against an exact optimal-transport solver, and independent of how pairs are batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from imglish.nn.segments import Segments
from imglish.objectives.wpa import alignment_distance, cosine_cost, transport_plan, wpa_loss

WORDS, PATCHES = Segments.of([3, 5, 1, 4]), Segments.of([6, 5, 7, 2])


def rows(seed: int, segments: Segments, width: int = 8) -> Tensor:
    return torch.randn(segments.total, width, generator=torch.Generator().manual_seed(seed))


def exact(cost: np.ndarray) -> float:
    """The least cost of moving uniform mass on the rows to uniform mass on the columns: a linear programme."""
    m, p = cost.shape
    by_row, by_column = np.kron(np.eye(m), np.ones(p)), np.kron(np.ones(m), np.eye(p))
    mass = np.concatenate([np.full(m, 1 / m), np.full(p, 1 / p)])
    return float(linprog(cost.ravel(), A_eq=np.concatenate([by_row, by_column]), b_eq=mass).fun)


def test_many_iterations_reach_the_optimum_and_fifty_are_near() -> None:
    words, patches = rows(1, WORDS), rows(2, PATCHES)
    near = alignment_distance(words, WORDS, patches, PATCHES)
    close = alignment_distance(words, WORDS, patches, PATCHES, iterations=5000)
    for n, (a, b) in enumerate(zip(words.split(list(WORDS.lengths)), patches.split(list(PATCHES.lengths)))):
        cost = 1 - torch.cosine_similarity(a[:, None], b[None], dim=-1)
        optimum = exact(cost.double().numpy())
        assert close[n].item() == pytest.approx(optimum, abs=2e-3)
        assert optimum - 1e-4 <= near[n].item() <= 1.05 * optimum
        spread = cost.mean().item()  # of the plan that moves everything everywhere
        assert near[n].item() < spread - 0.05 or min(a.shape[0], b.shape[0]) == 1


def test_the_plan_moves_all_mass_and_none_to_pads() -> None:
    cost, valid = cosine_cost(rows(1, WORDS), WORDS, rows(2, PATCHES), PATCHES)
    plan = transport_plan(cost, valid)
    assert float(plan[~valid].abs().max()) == 0
    for n, (m, p) in enumerate(zip(WORDS.lengths, PATCHES.lengths)):
        torch.testing.assert_close(plan[n, :m].sum(1), torch.full((m,), 1 / m))
        torch.testing.assert_close(plan[n, :, :p].sum(0), torch.full((p,), 1 / p), rtol=0, atol=2e-3)


def test_a_pair_alone_and_in_a_batch_are_alike() -> None:
    words, patches = rows(1, WORDS).requires_grad_(), rows(2, PATCHES).requires_grad_()
    distance = alignment_distance(words, WORDS, patches, PATCHES)
    alone = [
        alignment_distance(a, Segments.of([len(a)]), b, Segments.of([len(b)]))
        for a, b in zip(words.split(list(WORDS.lengths)), patches.split(list(PATCHES.lengths)))
    ]
    torch.testing.assert_close(distance, torch.cat(alone))
    together = torch.autograd.grad(distance.sum(), (words, patches))
    apart = torch.autograd.grad(torch.cat(alone).sum(), (words, patches))
    torch.testing.assert_close(together, apart)


def test_nothing_to_move_costs_nothing() -> None:
    words, patches = Segments.of([0, 2]), Segments.of([3, 2])
    made = rows(1, words).requires_grad_()
    distance = alignment_distance(made, words, rows(2, patches), patches)
    assert distance[0].item() == 0
    distance.sum().backward()
    assert made.grad is not None
    assert torch.isfinite(made.grad).all()


def test_the_loss_draws_matched_pairs_together_and_pushes_others_apart() -> None:
    distance = torch.tensor([0.5, 0.4, 0.2])
    assert wpa_loss(distance, torch.tensor([1, 0, 1])).item() == pytest.approx((0.5 + 0.2 - 0.4) / 3)


def test_half_precision_rows_are_compared_in_float32() -> None:
    words, patches = rows(1, WORDS), rows(2, PATCHES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = alignment_distance(words, WORDS, patches, PATCHES)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, alignment_distance(words, WORDS, patches, PATCHES))
