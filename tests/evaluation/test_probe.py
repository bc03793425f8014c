"""The linear probe: the optimum of its loss, the choice of the penalty, what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.data.records import Record
from imglish.evaluation.encoding import Machine
from imglish.evaluation.probe import STRENGTHS, choose_strength, evaluate_probe, fit
from tests.evaluation.fakes import Towers


def _clusters(count: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.eye(3, 6, dtype=torch.float64)
    return centres[labels] + noise * torch.randn(count, 6, generator=generator, dtype=torch.float64), labels


def test_the_fit_is_at_the_smallest_loss_whatever_the_scale() -> None:
    features, labels = _clusters(60, 0.5, 0)
    for scale in (0.1, 10.0):
        weight, bias = (x.requires_grad_() for x in fit(features * scale, labels, 3, 1e-2))
        loss = F.cross_entropy(features * scale @ weight.T + bias, labels) + 1e-2 * weight.square().sum()
        gradients = torch.autograd.grad(loss, (weight, bias))
        assert max(float(g.abs().max()) for g in gradients) < 1e-5 * max(scale, 1.0)
    strong, _ = fit(features, labels, 3, 10.0)
    assert float(strong.norm()) < 0.05 * float(fit(features, labels, 3, 1e-3)[0].norm())


def test_the_penalty_is_what_held_out_pictures_prefer() -> None:
    noisy, labels = _clusters(60, 1.0, 1)
    many = torch.cat([noisy, torch.randn(60, 200, generator=torch.Generator().manual_seed(2)).double()], dim=1)
    chosen = choose_strength(many, labels, 3)
    assert chosen > min(STRENGTHS)  # without any penalty 206 features learn 48 pictures by heart
    assert choose_strength(many, labels, 3) == chosen
    assert choose_strength(noisy[:9], labels[:9], 3) == 1e-3  # three of each: none can be held out


def _records(count: int, first: int, classes: tuple[str, ...] = ("a", "b")) -> list[Record]:
    return [Record(f"{first + i}", None, (classes[i % len(classes)],), first + i) for i in range(count)]


def _load(record: Record) -> Tensor:
    generator = torch.Generator().manual_seed(record.image_id)
    shade = torch.zeros(6, 2, 2)
    shade[0 if record.captions[0] == "a" else 1] = 3.0
    return shade + 0.3 * torch.randn(6, 2, 2, generator=generator)


def test_classes_that_features_tell_apart() -> None:
    machine = Machine(image_block=3, progress=False)
    found = evaluate_probe(Towers(), _records(30, 0), _records(9, 100), _load, machine)
    assert found.found.top1 == 100
    assert found.majority == pytest.approx(500 / 9)
    again = evaluate_probe(Towers(), _records(30, 0), _records(9, 100), _load, Machine(image_block=30, progress=False))
    assert (again.found, again.strength) == (found.found, found.strength)
    more = evaluate_probe(Towers(), _records(30, 0), _records(9, 100, ("a", "b", "new")), _load, machine)
    assert (more.test, len(more.notes)) == (6, 1)
    assert "3 test pictures left out" in more.notes[0]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to choose"):
        evaluate_probe(Towers(), _records(4, 0, ("a",)), _records(2, 9), _load)
    with pytest.raises(ValueError, match="no pictures"):
        evaluate_probe(Towers(), _records(4, 0), _records(2, 9, ("new",)), _load)
    with pytest.raises(ValueError, match="2 captions"):
        evaluate_probe(Towers(), [Record("x", None, ("a", "b"), 0)], _records(2, 9), _load)
