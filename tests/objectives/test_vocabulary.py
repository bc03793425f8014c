"""The chunked loss over a vocabulary: value, gradients, memory, precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from imglish.objectives.vocabulary import vocabulary_loss


def data(rows: int = 11, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(19, 6, generator=generator, dtype=dtype).requires_grad_()
    return x, weight, torch.randint(0, 19, (rows,), generator=generator)


@pytest.mark.parametrize("chunk", [None, 1, 4, 11, 100])
def test_value_and_gradients_equal_the_plain_form(chunk: int | None) -> None:
    x, weight, targets = data()
    expected = 3 * F.cross_entropy(x @ weight.T, targets)
    gradients = torch.autograd.grad(expected, (x, weight))
    loss = 3 * vocabulary_loss(x, weight, targets, chunk=chunk)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, weight)), gradients)
    with torch.no_grad():
        torch.testing.assert_close(3 * vocabulary_loss(x, weight, targets, chunk=chunk), expected)
    torch.testing.assert_close(vocabulary_loss(x, weight, targets, count=22.0, chunk=chunk), expected / 6)


def test_no_rows_give_zero() -> None:
    x, weight, targets = data(0)
    for chunk in (None, 4):
        loss = vocabulary_loss(x, weight, targets, chunk=chunk)
        assert float(loss.detach()) == 0
        loss.backward()
        assert float(weight.grad.abs().max()) == 0
    with pytest.raises(ValueError, match="chunk is 0"):
        vocabulary_loss(x, weight, targets, chunk=0)


def test_the_work_is_that_of_the_plain_form() -> None:
    flops = []
    for chunk in (None, 4):
        x, weight, targets = data()
        with FlopCounterMode(display=False) as counter:
            vocabulary_loss(x, weight, targets, chunk=chunk).backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]


def test_logits_of_all_rows_are_never_there() -> None:
    x, weight, targets = data(64)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        vocabulary_loss(x, weight, targets, chunk=8).backward()
    assert max(kept) < 64 * 19


def test_under_autocast() -> None:
    x, weight, targets = data(40)
    results = []
    for chunk in (None, 16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = vocabulary_loss(x, weight, targets, chunk=chunk)
        assert loss.dtype == torch.float32
        results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=0.02, atol=0.01)
