"""Packed rows of several kinds through expert blocks: the same as every sequence on its own, and only its experts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from imglish.nn.experts import ExpertBlock, ExpertBlockConfig, prefix_causal
from imglish.nn.packing import BY_MODALITY, FUSED_APART, SHARED, Packing, Read, Route
from imglish.nn.relative import RelativeBias
from imglish.nn.segments import Segments

PACKING = Packing(
    image=Segments.equal(2, 10),
    fused_image=Segments.of([10, 10, 10, 0]),  # the third is a picture without a text, the fourth a text without one
    fused_text=Segments.of([5, 7, 0, 6]),
    text=Segments.of([5, 1]),
)
BLOCKS = {
    "vlmo below": ExpertBlockConfig(32, 4, 64, SHARED, BY_MODALITY, qkv_bias="qv", layer_scale=0.1),
    "vlmo on top": ExpertBlockConfig(32, 4, 64, SHARED, FUSED_APART, qkv_bias="qv"),
    "beit3 released": ExpertBlockConfig(32, 4, 64, BY_MODALITY, BY_MODALITY, sub_norm=True),
    "one for all": ExpertBlockConfig(32, 4, 64, SHARED, SHARED),
}


def block_of(config: ExpertBlockConfig) -> ExpertBlock:
    torch.manual_seed(0)
    block = config.build()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def relative() -> RelativeBias:
    bias = RelativeBias(grid=3, text=9, heads=4, layers=2)
    torch.nn.init.normal_(bias.table, std=2.0)
    return bias


def rows() -> Tensor:
    return torch.randn(PACKING.total, 32, generator=torch.Generator().manual_seed(1))


def alone(number: int) -> tuple[list[int], Packing]:
    """Rows of one sequence, and a packing of it alone."""
    (image, text), (first, second) = PACKING.lengths[:, number], PACKING.first_rows[:, number]
    index = [*range(first, first + image), *range(second, second + text)]
    if number < 2:
        return index, Packing(image=Segments.of([image]))
    if number < 6:
        return index, Packing(fused_image=Segments.of([image]), fused_text=Segments.of([text]))
    return index, Packing(text=Segments.of([text]))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("bias", [None, "relative", "causal"])
def test_packed_equals_each_sequence_alone(name: str, bias: str | None) -> None:
    block, table, x = block_of(BLOCKS[name]), relative(), rows()

    def bias_of(packing: Packing) -> list[Tensor] | None:
        return {None: lambda: None, "relative": lambda: table(packing)[1], "causal": lambda: causal(packing)}[bias]()

    def causal(packing: Packing) -> list[Tensor]:
        return prefix_causal(packing, x.device)

    packed = block(x, PACKING, bias_of(PACKING))
    for number in range(PACKING.count):
        index, packing = alone(number)
        torch.testing.assert_close(packed[index], block(x[index], packing, bias_of(packing)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", ["image", "text"])
@pytest.mark.parametrize("biased", [False, True])
def test_read_carries_only_its_rows(fused: str, biased: bool) -> None:
    block, x = block_of(BLOCKS["vlmo on top"]), rows()
    bias = relative()(PACKING)[0] if biased else None
    read = Read.first(PACKING, x.device, fused)  # type: ignore[arg-type]
    expected = PACKING.first_rows[0 if fused == "image" else 1, 2:4].tolist()
    assert read.index.tolist()[2:4] == expected or read.index.tolist()[3:5] == expected
    with FlopCounterMode(display=False) as few:
        found = block(x, PACKING, bias, read)
    with FlopCounterMode(display=False) as all_rows:
        everything = block(x, PACKING, bias)
    torch.testing.assert_close(found, everything[read.index], atol=1e-5, rtol=1e-5)
    assert few.get_total_flops() < 0.45 * all_rows.get_total_flops()


def test_causal_texts_do_not_see_what_follows_and_pictures_do_not_see_the_text() -> None:
    block, x = block_of(BLOCKS["beit3 released"]), rows()
    bias = prefix_causal(PACKING, x.device)
    before = block(x, PACKING, bias)
    last = int(PACKING.first_rows[1, 2]) + 4  # the last token of the first pair's text
    x[last] += 1.0
    changed = (block(x, PACKING, bias) - before).abs().amax(1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [last]


@pytest.mark.parametrize("route", [BY_MODALITY, FUSED_APART])
def test_an_expert_changes_only_the_rows_routed_to_it(route: Route) -> None:
    block = block_of(ExpertBlockConfig(32, 4, 64, SHARED, route))
    kinds = [route.image, route.fused_image, route.fused_text, route.text]
    owner = list(itertools.chain(*([kind] * s.total for kind, s in zip(kinds, PACKING.stretches, strict=True))))
    before = block(rows(), PACKING)
    for name in route.names:
        with torch.no_grad():
            block.ffn[name].fc2.bias += 1.0  # type: ignore[union-attr, operator]
        after = block(rows(), PACKING)
        moved = (after - before).abs().amax(1) > 1e-3
        assert moved.tolist() == [kind == name for kind in owner]
        before = after


def test_every_expert_is_one_product() -> None:
    """Rows are sorted so that an expert's rows are one slice, in lower and in upper layers."""
    assert [name for name, _ in PACKING.spans(BY_MODALITY)] == ["image", "text"]
    assert [name for name, _ in PACKING.spans(FUSED_APART)] == ["image", "fused", "text"]
    assert PACKING.spans(SHARED) == [("all", PACKING.total)]
    assert [name for name, _ in Packing(text=Segments.of([3, 4])).spans(FUSED_APART)] == ["text"]


def test_keys_without_bias() -> None:
    full = ExpertBlockConfig(32, 4, 64, SHARED, SHARED).build()
    some = ExpertBlockConfig(32, 4, 64, SHARED, SHARED, qkv_bias="qv").build()
    count = [sum(p.numel() for p in block.parameters()) for block in (full, some)]
    assert count[0] - count[1] == 32


def test_drop_path_skips_whole_sequences_and_keeps_the_mean() -> None:
    config = ExpertBlockConfig(32, 4, 64, SHARED, SHARED, drop_path=0.5)
    block = block_of(config).train()
    packing = Packing(image=Segments.equal(400, 2))
    x = torch.randn(2, 32).repeat(400, 1)
    torch.manual_seed(0)
    out = block._drop(torch.ones(800, 32), packing).unflatten(0, (400, 2))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert (out.amax((1, 2)) == out.amin((1, 2))).all()
    assert 0.8 < float(out.mean()) < 1.2
    assert torch.equal(block.eval()(x, packing), block(x, packing))


def test_pictures_and_texts_that_the_table_does_not_cover_are_refused() -> None:
    table = relative()
    with pytest.raises(ValueError, match="17 tokens"):
        table(Packing(image=Segments.of([17])))
    with pytest.raises(ValueError, match="10 tokens"):
        table(Packing(text=Segments.of([10])))


def test_parts_of_fused_sequences_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="meet"):
        Packing(fused_image=Segments.of([3]), fused_text=Segments.of([3, 4]))
