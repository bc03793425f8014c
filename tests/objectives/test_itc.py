from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.objectives.gather import gather, gather_with_grad, global_mean, rank, world_size
from imglish.objectives.itc import hinge_loss, itc_loss, siglip_loss
from tests.ranks import run_ranks


def features(rows: int, width: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, rows, width, generator=generator, dtype=dtype)
    return F.normalize(image, dim=1).requires_grad_(), F.normalize(text, dim=1).requires_grad_()


IDS = torch.tensor([4, 7, 4, 1, 7, 4, 9])
SCALE = partial(torch.tensor, 5.0, dtype=torch.float64, requires_grad=True)


def test_itc_by_hand() -> None:
    image = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # similarities [[1, .6], [0, .8]]
    rows = math.log(1 + math.exp(2 * (0.6 - 1))) + math.log(1 + math.exp(2 * (0 - 0.8)))
    columns = math.log(1 + math.exp(2 * (0 - 1))) + math.log(1 + math.exp(2 * (0.6 - 0.8)))
    assert float(itc_loss(image, text, torch.tensor(2.0))) == pytest.approx((rows + columns) / 4, abs=1e-6)


def test_distinct_ids_change_nothing() -> None:
    image, text = features(7)
    torch.testing.assert_close(itc_loss(image, text, SCALE(), torch.arange(7) + 3), itc_loss(image, text, SCALE()))
    assert not torch.allclose(itc_loss(image, text, SCALE(), IDS), itc_loss(image, text, SCALE()))


def dense(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None) -> Tensor:
    """The loss as one writes it down: the whole matrix, soft targets, autograd."""
    names = torch.arange(image.shape[0]) if ids is None else ids
    target = (names[:, None] == names[None, :]).double()
    target /= target.sum(1, keepdim=True)
    logits = image @ text.T * scale
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
def test_value_and_gradient_equal_the_dense_form(ids: Tensor | None, chunk: int | None) -> None:
    results = []
    for form in (dense, partial(itc_loss, chunk=chunk)):
        image, text = features(7)
        scale = SCALE()
        loss = 3 * form(image, text, scale, ids)  # the factor tests the upstream gradient
        loss.backward()
        results.append((loss, image.grad, text.grad, scale.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 10])
def test_gradient_vanishes_with_the_loss(chunk: int | None) -> None:
    """float32, scale 100, pairs that are told apart: no rounding noise may be left for Adam to magnify."""
    base = features(64, 32, torch.float32)[0].detach()
    near = (F.normalize(base + 0.02 * x.detach().float(), dim=1) for x in features(64, 32))
    image, text = (x.requires_grad_() for x in near)
    scale = torch.tensor(100.0, requires_grad=True)
    loss = itc_loss(image, text, scale, torch.arange(64), chunk)
    loss.backward()
    assert loss.item() == 0.0
    assert max(float(x.grad.abs().max()) for x in (image, text, scale)) < 1e-12


@pytest.mark.parametrize("ids", [None, IDS])
def test_gradcheck(ids: Tensor | None) -> None:
    image, text = features(7)
    assert torch.autograd.gradcheck(lambda i, t, s: itc_loss(i, t, s, ids, chunk=3), (image, text, SCALE()))


@pytest.mark.parametrize("chunk", [None, 16])
def test_no_square_matrix_is_kept_for_the_backward_pass(chunk: int | None) -> None:
    kept: list[int] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    image, text = features(256, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        itc_loss(image, text, torch.tensor(5.0, requires_grad=True), chunk=chunk)
    assert max(kept) <= 256 * 6


def test_loss_is_float32_under_autocast() -> None:
    image, text = features(7, dtype=torch.float32)
    scale = torch.tensor(100.0)
    outside = itc_loss(image, text, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in (itc_loss(image, text, scale), itc_loss(image, text, scale, chunk=2)):
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, outside)


def test_siglip_by_hand() -> None:
    image, text = features(2, dtype=torch.float32)
    s = 3 * (image @ text.T) - 1
    pairs = [s[0, 0], s[1, 1], -s[0, 1], -s[1, 0]]
    expected = sum(math.log1p(math.exp(-x.item())) for x in pairs) / 2
    loss = siglip_loss(image, text, torch.tensor(3.0), torch.tensor(-1.0))
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(
        siglip_loss(image, text, torch.tensor(3.0)), siglip_loss(image, text, torch.tensor(3.0), torch.tensor(0.0))
    )


@pytest.mark.parametrize("ids", [None, IDS])
def test_chunked_siglip_equals_dense(ids: Tensor | None) -> None:
    results = []
    for chunk in (None, 3):
        image, text = features(7)
        scale, bias = SCALE(), torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
        loss = siglip_loss(image, text, scale, bias, ids, chunk)
        loss.backward()
        results.append((loss, image.grad, text.grad, scale.grad, bias.grad))
    for dense, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, dense)


def test_hinges_by_hand() -> None:
    image = torch.eye(3)
    text = torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.3, 0.2], [0.45, 0.0, 0.9]])  # similarity s[i, j] = text[j, i]
    # pictures, hinges .2 + s_ij - s_ii: row 0 (.3, .15), row 1 (.3, none), row 2 (none, none)
    # texts, hinges .2 + s_ji - s_ii:    text 0 (.1, none), text 1 (.5, .1), text 2 (none, none)
    assert float(hinge_loss(image, text)) == pytest.approx((0.3 + 0.3 + 0.1 + 0.5) / 3, abs=1e-6)
    assert float(hinge_loss(image, text, hardest=0.0)) == pytest.approx((0.45 + 0.3 + 0.1 + 0.6) / 3, abs=1e-6)
    assert float(hinge_loss(image, text, hardest=0.8)) == pytest.approx((0.8 * 1.2 + 0.2 * 1.45) / 3, abs=1e-6)
    assert float(hinge_loss(image, text, margin=0.0)) == pytest.approx((0.1 + 0.1 + 0.3) / 3, abs=1e-6)


def test_hinges_never_take_the_same_picture_as_negative() -> None:
    image = torch.eye(3)
    text = torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.3, 0.2], [0.45, 0.0, 0.9]])
    ids = torch.tensor([5, 5, 8])
    # what is left of the case above: row 0 (text 2: .15), everything else below the margin
    assert float(hinge_loss(image, text, ids=ids)) == pytest.approx((0.15 + 0.1) / 3, abs=1e-6)
    assert float(hinge_loss(image, text, ids=torch.zeros(3))) == 0.0


def test_chunk_must_be_positive() -> None:
    image, text = features(2)
    for loss in (itc_loss, siglip_loss):
        with pytest.raises(ValueError, match="chunk is 0"):
            loss(image, text, SCALE(), chunk=0)


def test_one_process_gathers_nothing() -> None:
    x = torch.ones(2, requires_grad=True)
    assert gather_with_grad(x) is x
    assert not gather(x).requires_grad
    assert (world_size(), rank()) == (1, 0)
    assert float(global_mean(torch.tensor(6.0), 4)) == 1.5
    assert float(global_mean(torch.tensor(0.0), 0)) == 0.0


def _all_losses(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ids: Tensor, chunk: int | None
) -> dict[str, Tensor]:
    return {
        "itc": itc_loss(image, text, scale, chunk=chunk),
        "itc, ids": itc_loss(image, text, scale, ids, chunk=chunk),
        "siglip": siglip_loss(image, text, scale, bias, chunk=chunk),
        "siglip, ids": siglip_loss(image, text, scale, bias, ids, chunk=chunk),
        "hinge": hinge_loss(image, text, ids=ids),
        "sum of hinges": hinge_loss(image, text, hardest=0.0),
    }


def _gradients(rows: slice, chunk: int | None) -> dict[str, tuple[Tensor, ...]]:
    """Value and gradients, by parameters as a model has them: a weight before the features, scale and bias."""
    found = {}
    ids = torch.tensor([4, 7, 4, 1, 7, 5])
    for name in _all_losses(*features(6), SCALE(), SCALE(), ids, None):
        weight = torch.eye(6, dtype=torch.float64).requires_grad_()
        scale, bias = SCALE(), torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
        image, text = (F.normalize(x.detach()[rows] @ weight, dim=1) for x in features(6))
        loss = _all_losses(image, text, scale, bias, ids[rows], chunk)[name]
        grads = torch.autograd.grad(loss, (weight, scale, bias), allow_unused=True, materialize_grads=True)
        found[name] = (loss.detach(), *grads)
    return found


def _rank_work(number: int) -> dict[str, object]:
    mean = global_mean(torch.tensor(float(number + 1)), count=2 * number + 1)  # totals 1, 2 of counts 1, 3
    gathered = gather(torch.full((2,), number))
    rows = slice(3 * number, 3 * number + 3)
    return {"dense": _gradients(rows, None), "chunked": _gradients(rows, 2), "mean": mean, "gathered": gathered}


def test_two_ranks_have_the_gradients_of_one_process() -> None:
    expected = _gradients(slice(0, 6), None)
    ranks = run_ranks(2, _rank_work)
    for name, wanted in expected.items():
        for how in ("dense", "chunked"):
            averaged = [(a + b) / 2 for a, b in zip(*(r[how][name] for r in ranks), strict=True)]
            for actual, value in zip(averaged, wanted, strict=True):
                torch.testing.assert_close(actual, value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(float(r["mean"]) for r in ranks) / 2 == pytest.approx(3 / 4)
    assert all(r["gathered"].tolist() == [0, 0, 1, 1] for r in ranks)
