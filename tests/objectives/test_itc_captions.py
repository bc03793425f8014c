"""Contrastive losses with several captions a picture: the dense form, repeated pictures, and two ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.objectives.itc import hinge_loss, itc_loss, siglip_loss
from tests.ranks import run_ranks

IDS = torch.tensor([4, 7, 4, 1])
CAPTIONS = 3


def features(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 6, generator=generator, dtype=dtype)
    text = torch.randn(4 * CAPTIONS, 6, generator=generator, dtype=dtype)
    return F.normalize(image, dim=1).requires_grad_(), F.normalize(text, dim=1).requires_grad_()


def scale() -> Tensor:
    return torch.tensor(5.0, dtype=torch.float64, requires_grad=True)


def dense(image: Tensor, text: Tensor, factor: Tensor, ids: Tensor | None) -> Tensor:
    """The whole matrix, every caption of the picture a positive with an equal share."""
    names = torch.arange(4) if ids is None else ids
    same = (names[:, None] == names.repeat_interleave(CAPTIONS)[None, :]).double()
    logits = image @ text.T * factor
    i2t = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
    t2i = F.cross_entropy(logits.T, same.T / same.T.sum(1, keepdim=True))
    return (i2t + t2i) / 2


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_itc_equals_the_dense_form(ids: Tensor | None, chunk: int | None) -> None:
    results = []
    for form in (dense, partial(itc_loss, chunk=chunk)):
        image, text = features()
        factor = scale()
        loss = 3 * form(image, text, factor, ids)
        loss.backward()
        results.append((loss, image.grad, text.grad, factor.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_siglip_and_hinges_equal_repeated_pictures() -> None:
    """n captions beside one encoded picture are n pairs; the sigmoid loss sums over pairs and divides by pictures."""
    image, text = features()
    repeated = image.repeat_interleave(CAPTIONS, dim=0)
    ids = IDS.repeat_interleave(CAPTIONS)
    torch.testing.assert_close(hinge_loss(image, text, ids=IDS), hinge_loss(repeated, text, ids=ids))
    logits = image @ text.T * 5 - 1
    sign = 2 * (IDS[:, None] == ids[None, :]).double() - 1
    expected = -F.logsigmoid(sign * logits).sum() / 4
    for chunk in (None, 2):
        actual = siglip_loss(image, text, scale(), torch.tensor(-1.0, dtype=torch.float64), IDS, chunk)
        torch.testing.assert_close(actual, expected)


def test_texts_that_cannot_be_divided_are_an_error() -> None:
    image, text = features()
    with pytest.raises(ValueError, match="11 texts cannot be divided among 4 pictures"):
        itc_loss(image, text[:11], scale())


def gradients(pictures: slice) -> dict[str, list[Tensor]]:
    image, text = features()
    texts = slice(pictures.start * CAPTIONS, pictures.stop * CAPTIONS)
    found = {}
    for name, loss in {
        "itc": lambda i, t, s: itc_loss(i, t, s, IDS[pictures], chunk=1),
        "siglip": lambda i, t, s: siglip_loss(i, t, s, ids=IDS[pictures]),
        "hinge": lambda i, t, s: hinge_loss(i, t, ids=IDS[pictures]) + 0 * s,
    }.items():
        mine = [x[part].detach().requires_grad_() for x, part in ((image, pictures), (text, texts))]
        value = loss(*mine, scale())
        value.backward()
        found[name] = [value.detach(), *(x.grad for x in mine if x.grad is not None)]
    return found


def on_rank(rank: int) -> dict[str, list[Tensor]]:
    return gradients(slice(2 * rank, 2 * rank + 2))


def test_two_ranks_have_the_gradients_of_one_process() -> None:
    alone, ranks = gradients(slice(0, 4)), run_ranks(2, on_rank)
    for name, (value, image, text) in alone.items():
        torch.testing.assert_close(sum(r[name][0] for r in ranks) / 2, value)
        for k, whole in ((1, image), (2, text)):
            torch.testing.assert_close(torch.cat([r[name][k] for r in ranks]) / 2, whole)
