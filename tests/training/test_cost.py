"""What is counted of a step."""

from __future__ import annotations

import resource

import torch
import torch.nn.functional as F

from imglish.training.cost import flop_counter, peak_memory


def test_matrix_products_and_attention_are_counted_both_ways() -> None:
    """The fused attention of the CPU makes its scores once more on the way back: five products for two."""
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    with flop_counter() as counter:
        F.linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 3 * 5 * 7
    q, k = torch.randn(2, 4, 6, 8, requires_grad=True), torch.randn(2, 4, 10, 8, requires_grad=True)
    with flop_counter() as counter:
        F.scaled_dot_product_attention(q, k, k).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * (2 * 4 * 6 * 10 * 8)


def test_peak_memory_is_that_of_the_process() -> None:
    before = peak_memory(torch.device("cpu"))
    assert before == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    held = torch.ones(int((before + 0.1) * 2**28))  # as much again and a tenth of a GiB
    assert peak_memory(torch.device("cpu")) > before + 0.1
    del held
