"""Gradients of task models over two processes equal those of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from imglish.data.batch import TextBatch
from imglish.data.tasks.batch import Answers, TaskBatch
from imglish.models.heads import HeadConfig, with_head
from imglish.training.step import Stepper, StepSettings, split
from tests.models.test_heads import CANDIDATES, NAMES, base, pictures_of
from tests.ranks import run_ranks

QUESTIONS = [[2, 5, 6, 7], [2, 8], [2, 9, 9], [2, 4]]


def gradients(form: Any, share: slice, probe: bool) -> dict[str, Tensor]:
    head = HeadConfig("vqa", form, NAMES, soft=form == "classes", start=2)
    model = with_head(base("albef", vocab_size=30), head)
    answers = Answers(TextBatch.of([[2, *c] for c in CANDIDATES[:6]]), (1, 2, 0, 3), torch.linspace(0.1, 1, 6))
    labels = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    batch = TaskBatch((pictures_of(model, 4, 0),), TextBatch.of(QUESTIONS), labels, answers, tuple("abcd")).part(share)
    stepper = Stepper(model, None, StepSettings(1, 0, False), batch if probe else None)
    stepper(batch, 0)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def work(rank: int, form: str) -> dict[str, Tensor]:
    return gradients(form, slice(2 * rank, 2 * rank + 2), probe=True)


@pytest.mark.parametrize("form", ["classes", "answers"])
def test_two_processes(form: str) -> None:
    whole = gradients(form, slice(0, 4), probe=False)
    for of_rank in run_ranks(2, work, form):
        assert of_rank.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(of_rank[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_parts_of_a_batch() -> None:
    answers = Answers(TextBatch.of([[2, *c] for c in CANDIDATES[:6]]), (1, 2, 0, 3), torch.arange(6.0))
    batch = TaskBatch((torch.arange(4.0),), TextBatch.of(QUESTIONS), torch.arange(4), answers, tuple("abcd"))
    one, two = split(batch, 2)
    assert isinstance(one, TaskBatch)
    assert isinstance(two, TaskBatch)
    assert two.texts.segments.lengths == (3, 2)
    assert two.texts.ids.tolist() == [2, 9, 9, 2, 4]
    assert (one.keys, two.keys) == (("a", "b"), ("c", "d"))
    assert two.answers is not None
    assert two.answers.counts == (0, 3)
    assert two.answers.weights.tolist() == [3, 4, 5]
    assert two.answers.texts.ids.tolist() == [2, *CANDIDATES[3], 2, *CANDIDATES[4], 2, *CANDIDATES[5]]
