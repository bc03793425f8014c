"""Packed attention equals a plain softmax of every sequence on its own, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from imglish.nn.attention import CrossAttention, Memory, SelfAttention, attend
from imglish.nn.blocks import BlockConfig
from imglish.nn.segments import Rows, Segments


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(4, 4, 4), (1, 7, 3), (5,)])
def test_attend_self(lengths: tuple[int, ...], causal: bool) -> None:
    torch.manual_seed(0)
    segments = Segments(lengths)
    q, k, v = (torch.randn(segments.total, 2, 8, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, segments, segments, causal)
    parts = [plain(*(t.split(lengths)[n] for t in (q, k, v)), causal) for n in range(len(lengths))]
    torch.testing.assert_close(out, torch.cat(parts))
    upstream = torch.randn_like(out)
    mine = torch.autograd.grad(out, (q, k, v), upstream)
    theirs = torch.autograd.grad(torch.cat(parts), (q, k, v), upstream)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("queries", [(2, 2), (0, 5), (3, 1)])
@pytest.mark.parametrize("keys", [(6, 6), (4, 9)])
def test_attend_cross(queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    q = torch.randn(sum(queries), 2, 8)
    k, v = torch.randn(sum(keys), 2, 8), torch.randn(sum(keys), 2, 8)
    out = attend(q, k, v, Segments(queries), Segments(keys))
    parts = [plain(a, b, c, False) for a, b, c in zip(q.split(queries), k.split(keys), v.split(keys))]
    torch.testing.assert_close(out, torch.cat(parts))


def test_attend_refuses_what_does_not_fit() -> None:
    x = torch.randn(4, 1, 8)
    with pytest.raises(ValueError, match="query sequences"):
        attend(x, x, x, Segments((4,)), Segments((2, 2)))
    with pytest.raises(ValueError, match="same lengths"):
        attend(x, x, x, Segments((3, 1)), Segments((2, 2)), causal=True)


def test_read_rows_equal_all_rows() -> None:
    torch.manual_seed(0)
    segments = Segments((5, 2, 6))
    attention = SelfAttention(16, 4)
    x = torch.randn(segments.total, 16)
    some = Rows(torch.tensor([1, 4, 6, 7]), Segments((2, 1, 1)))
    torch.testing.assert_close(attention(x, segments, read=some), attention(x, segments)[some.index])
    last = Rows.last(segments, x.device)
    torch.testing.assert_close(
        attention(x, segments, causal=True, read=last), attention(x, segments, causal=True)[last.index]
    )


def test_texts_of_one_picture_share_its_keys() -> None:
    torch.manual_seed(0)
    cross = CrossAttention(16, 4, 12)
    pictures = torch.randn(3, 7, 12)
    rows = Segments((2, 4, 1, 3))
    x = torch.randn(rows.total, 16)
    keys, values = cross.project(pictures.flatten(0, 1))
    together = cross(x, rows, Memory(keys, values, Segments.equal(3, 7), Segments((2, 0, 2))))
    alone = []
    for text, picture in zip(x.split(rows.lengths), [0, 0, 2, 2]):
        k, v = cross.project(pictures[picture])
        alone.append(cross(text, Segments((len(text),)), Memory(k, v, Segments((7,)), Segments((1,)))))
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_block_reads_rows(norm: str) -> None:
    torch.manual_seed(0)
    block = BlockConfig(16, 4, 32, norm=norm, cross_width=12, layer_scale=0.5).build()  # type: ignore[arg-type]
    segments, x, picture = Segments((3, 5)), torch.randn(8, 16), torch.randn(14, 12)
    assert block.cross is not None
    memory = Memory(*block.cross.project(picture), Segments.equal(2, 7), Segments((1, 1)))
    read = Rows(torch.tensor([0, 2, 7]), Segments((2, 1)))
    torch.testing.assert_close(block(x, segments, memory, read=read), block(x, segments, memory)[read.index])
    assert not torch.allclose(block(x, segments), block(x, segments, memory))  # without a picture: no cross-attention


@pytest.mark.parametrize("lengths", [[3, 3], [5, 1], [2, 0]])
def test_reading_tokens_equals_attention_over_their_keys_and_values(lengths: list[int]) -> None:
    torch.manual_seed(0)
    cross = CrossAttention(12, 3, 20).double()
    with torch.no_grad():
        for parameter in cross.parameters():
            parameter.normal_()
    pictures, rows = Segments.equal(2, 7), Segments.of(lengths)
    tokens, x = torch.randn(14, 20).double(), torch.randn(rows.total, 12).double()
    one_each = Segments.equal(2, 1)
    expected = cross(x, rows, Memory(*cross.project(tokens), pictures, one_each))
    found = cross(x, rows, Memory(tokens, tokens, pictures, one_each, projected=False))
    torch.testing.assert_close(found, expected)


def test_tokens_are_read_where_that_is_less_than_half_the_work() -> None:
    cross = CrossAttention(768, 12, 768)
    pictures = Segments.equal(64, 577)
    # 577 * 768 / (12 * 577 + 768) = 57.6 rows a picture cost the same
    assert cross.rather_reads(64 * 28, pictures)
    assert not cross.rather_reads(64 * 29, pictures)
    assert not cross.rather_reads(1, Segments((577, 197)))
