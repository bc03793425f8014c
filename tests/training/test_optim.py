"""Groups, schedule, clipping."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from imglish.models.registry import named
from imglish.training.config import OptimiserRecipe, ScheduleRecipe
from imglish.training.optim import (
    build_optimiser,
    clip_gradients,
    learning_rate,
    load_optimiser_state,
    optimiser_state,
    parameter_groups,
    set_learning_rate,
)


def names_of(model: torch.nn.Module, group: dict[str, object]) -> set[str]:
    members = {id(p) for p in group["params"]}  # type: ignore[attr-defined]
    return {name for name, p in model.named_parameters() if id(p) in members}


@pytest.mark.parametrize("name", ["albef-tiny", "clip-tiny"])
def test_biases_norms_and_scalars_do_not_decay(name: str) -> None:
    model = named(name).build()
    groups = parameter_groups(model, OptimiserRecipe(weight_decay=0.1))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    with_decay, without, temperatures = (names_of(model, group) for group in groups)
    assert temperatures == ({"temperature"} if name == "albef-tiny" else {"logit_scale"})
    assert with_decay | without | temperatures == {n for n, _ in model.named_parameters()}
    assert not with_decay & without
    assert all(
        n.endswith(("bias", "norm.weight", "norm1.weight", "norm2.weight")) or "norm" in n
        for n in without - {"vision.class_token"}
    )
    assert all("bias" not in n and "norm" not in n for n in with_decay)
    assert any("words" in n for n in with_decay)
    kept = parameter_groups(model, OptimiserRecipe(decay_embeddings=False))[1]
    tables = names_of(model, kept) - without
    assert tables
    assert all("words" in n or "position" in n or "types" in n for n in tables)


def test_biases_by_relative_position_do_not_decay() -> None:
    model = named("vlmo-tiny").build()
    with_decay, without, _ = (names_of(model, group) for group in parameter_groups(model, OptimiserRecipe()))
    assert "relative.table" in without
    assert {n for n in with_decay if "blocks.0" in n} == {
        "blocks.0.attn.qkv.all.weight",
        "blocks.0.attn.out.all.weight",
        *(f"blocks.0.ffn.{expert}.fc{i}.weight" for expert in ("image", "text") for i in (1, 2)),
    }


def test_temperatures_have_a_rate_of_their_own() -> None:
    model = named("albef-tiny").build()
    optimiser = build_optimiser(model, OptimiserRecipe(lr=1e-3, temperature_lr=1e-4))
    set_learning_rate(optimiser, 5e-4)  # half of the peak: half of each group's own rate
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([5e-4, 5e-4, 5e-5])
    together = build_optimiser(model, OptimiserRecipe(lr=1e-3))
    set_learning_rate(together, 5e-4)
    assert [group["lr"] for group in together.param_groups] == pytest.approx([5e-4] * 3)


def test_the_learning_rate_warms_up_and_ends_at_its_minimum() -> None:
    schedule = ScheduleRecipe(steps=100, warmup_steps=10, lr_min=1e-5)
    rates = [learning_rate(step, 100, 1e-3, schedule) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[99] == pytest.approx(1e-5)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    middle = 10 + (99 - 10) / 2
    assert rates[math.floor(middle)] > (1e-3 + 1e-5) / 2 > rates[math.ceil(middle)]
    assert learning_rate(0, 100, 1e-3, ScheduleRecipe(steps=100, warmup_steps=0)) == 1e-3


def test_clipping_scales_all_gradients_to_the_norm() -> None:
    parameters = [
        torch.nn.Parameter(torch.zeros(3)),
        torch.nn.Parameter(torch.zeros(2, 2)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((2, 2), 1.0)
    assert float(clip_gradients(parameters, None)) == pytest.approx(4.0)
    assert float(clip_gradients(parameters, 2.0)) == pytest.approx(4.0)
    assert float(clip_gradients(parameters, 10.0)) == pytest.approx(2.0)
    assert parameters[0].grad[0] == pytest.approx(1.0)
    with pytest.raises(RuntimeError, match="no parameter received a gradient"):
        clip_gradients(parameters[2:], 1.0)


def test_optimiser_state_goes_by_name() -> None:
    """Moments find their parameter again although the groups of the second optimiser differ."""

    def step(model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> None:
        for number, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.1 + number)
        optimiser.step()

    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 2))
    second = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 2))
    optimiser = build_optimiser(first, OptimiserRecipe())
    step(first, optimiser)
    second.load_state_dict(first.state_dict())
    other = build_optimiser(second, OptimiserRecipe(decay_embeddings=False, weight_decay=0.05))
    load_optimiser_state(second, other, optimiser_state(first, optimiser))
    step(first, optimiser)
    step(second, other)
    assert torch.equal(first[1].weight, second[1].weight)
    with pytest.raises(ValueError, match="parameters that the model does not have"):
        load_optimiser_state(second[:1], other, optimiser_state(first, optimiser))
