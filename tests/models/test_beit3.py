"""BEiT-3: the packed step of masked data modelling equals one sequence at a time, and costs no more than it must."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imglish.data.batch import Batch, MaskedTexts, PatchMasks, TextBatch, Unpaired
from imglish.data.patch_masks import block_mask, pack_patch_masks
from imglish.generation.config import GenerationConfig
from imglish.generation.engine import generate
from imglish.models.beit3 import (
    Beit3,
    Beit3Config,
    MatchingBeit3,
    beit3_base,
    beit3_giant,
    beit3_tiny,
    beit3_tiny_paper,
)
from imglish.models.capabilities import Matches
from imglish.models.visual_codes import CodeTeacher
from imglish.nn.packing import Packing
from imglish.nn.segments import Segments
from imglish.objectives.itm import draw_negatives, negative_weights
from imglish.training.step import split

LENGTHS = [9, 3, 12, 5]


class FakeTokenizer(nn.Module):
    """Codes from the mean of each cell."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.codes = codes

    def tokenize(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        cells = images.float().unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1)).mean((1, 3, 5))
        return (cells * 7).long().flatten(1) % self.codes


def teacher_of(config: Beit3Config) -> CodeTeacher:
    return CodeTeacher(FakeTokenizer(config.codes), config.codes)


def texts_of(config: Beit3Config, lengths: list[int], generator: torch.Generator) -> tuple[TextBatch, MaskedTexts]:
    texts = TextBatch.of([torch.randint(5, config.vocab_size, (n,), generator=generator).tolist() for n in lengths])
    rows = [int(start) + k for start, n in zip(texts.segments.bounds[:-1], lengths) for k in range(1, max(2, n // 2))]
    at, ids = torch.tensor(rows), texts.ids.clone()
    ids[at] = config.mask_id % config.vocab_size
    return texts, MaskedTexts(ids, at, texts.ids[at], tuple(max(2, n // 2) - 1 for n in lengths))


def masks_of(config: Beit3Config, count: int, seed: int = 0) -> PatchMasks:
    grid, rng = (config.grid, config.grid), np.random.default_rng(seed)
    masks = pack_patch_masks([block_mask(grid, round(0.4 * config.grid**2), rng, 2) for _ in range(count)])
    assert masks is not None
    return masks


def make_batch(config: Beit3Config, lengths: list[int], alone: list[int] | None = None, seed: int = 0) -> Batch:
    """Pairs with texts of ``lengths``; beside them texts of the lengths ``alone``, and half as many pictures again."""
    generator = torch.Generator().manual_seed(seed)

    def pictures(count: int) -> Tensor:
        size = config.image.size
        return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)

    texts, masked = texts_of(config, lengths, generator)
    unpaired = None
    if alone is not None:
        count = len(alone) + len(alone) // 2
        unpaired = Unpaired(pictures(count), masks_of(config, count, 1), *texts_of(config, alone, generator))
    count = len(lengths)
    return Batch(
        images=pictures(count),
        texts=texts,
        image_ids=torch.arange(count),
        draws=torch.rand(count, 2, generator=generator),
        masked=masked,
        patches=masks_of(config, count),
        unpaired=unpaired,
    )


def trained(config: Beit3Config) -> Beit3:
    torch.manual_seed(0)
    model = replace(config, mask_id=4).build()
    with torch.no_grad():  # away from the small initial weights, so that every path matters
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.8 / parameter.shape[-1] ** 0.5)
    return model


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([v for k, v in losses.items() if not k.startswith("metric/")]).sum()


def plain_masked_data(model: Beit3, batch: Batch, teacher: CodeTeacher) -> dict[str, Tensor]:
    """One sequence at a time, every row computed, as four averages of cross-entropies."""
    grid, body = model.config.grid, model.body
    assert model.mim_head is not None
    assert model.mlm_head is not None
    found: dict[str, list[Tensor]] = {}

    def predict(name: str, states: Tensor, head: nn.Module, wanted: Tensor) -> None:
        found.setdefault(name, []).append(nn.functional.cross_entropy(head(states), wanted, reduction="none"))

    def cut(masks: PatchMasks, b: int) -> PatchMasks:
        first = sum(masks.counts[:b])
        rows = masks.rows[first : first + masks.counts[b]] - b * masks.patches
        return PatchMasks(rows, (masks.counts[b],), masks.patches)

    def words(texts: TextBatch, masked: MaskedTexts, b: int) -> tuple[TextBatch, Tensor, Tensor]:
        low, high = texts.segments.bounds[b], texts.segments.bounds[b + 1]
        some = (masked.rows >= low) & (masked.rows < high)
        one = TextBatch(masked.ids[low:high], Segments((int(high - low),)))
        return one, masked.rows[some] - low, masked.labels[some]

    assert batch.patches is not None
    assert batch.masked is not None
    for b in range(len(batch)):
        image, masks = batch.squares[b : b + 1], cut(batch.patches, b)
        text, rows, labels = words(batch.texts, batch.masked, b)
        pictures = body.picture_rows(image, masks)[0]
        packing = Packing(fused_image=Segments((len(pictures),)), fused_text=text.segments)
        states = body.transform(torch.cat([pictures, body.text_rows(text)]), packing)
        codes = teacher.codes(image, (grid, grid))[0]
        predict("pair_mim", states[1 + masks.rows], model.mim_head, codes[masks.rows])
        predict("pair_mlm", states[len(pictures) + rows], model.mlm_head, labels)
    if batch.unpaired is not None:
        alone = batch.unpaired
        for b in range(len(alone.images)):
            image, masks = alone.images[b : b + 1], cut(alone.patches, b)
            pictures = body.picture_rows(image, masks)[0]
            states = body.transform(pictures, Packing(image=Segments((len(pictures),))))
            codes = teacher.codes(image, (grid, grid))[0]
            predict("mim", states[1 + masks.rows], model.mim_head, codes[masks.rows])
        for b in range(len(alone.texts)):
            text, rows, labels = words(alone.texts, alone.masked, b)
            states = body.transform(body.text_rows(text), Packing(text=text.segments))
            predict("mlm", states[rows], model.mlm_head, labels)
    return {name: torch.cat(values).mean() for name, values in found.items()}


def compare_gradients(model: nn.Module, values: list[dict[str, Tensor]]) -> None:
    gradients: list[dict[str, Tensor]] = []
    for losses in values:
        model.zero_grad()
        total(losses).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = float(gradients[1][name].abs().max())
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("config", [beit3_tiny(), beit3_tiny_paper()], ids=["released", "paper"])
@pytest.mark.parametrize("alone", [None, [4, 7]], ids=["pairs", "all kinds"])
def test_packed_step_equals_plain_step(config: Beit3Config, alone: list[int] | None) -> None:
    model, teacher = trained(config), teacher_of(config)
    batch = make_batch(model.config, LENGTHS, alone)
    packed, plain = model.losses(batch, teacher), plain_masked_data(model, batch, teacher)
    assert {n for n in packed if not n.startswith("metric/")} == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-5, atol=1e-6)
    compare_gradients(model, [packed, plain])


@pytest.mark.parametrize(("objective", "alone"), [("mdm", None), ("mdm", [4, 7]), ("captions", None)])
def test_losses_of_the_parts_of_a_batch_have_those_of_the_whole_as_their_mean(
    objective: Literal["mdm", "captions"], alone: list[int] | None
) -> None:
    model, teacher = trained(replace(beit3_tiny(), objective=objective)), teacher_of(beit3_tiny())
    batch = make_batch(model.config, LENGTHS, alone)
    parts = split(batch, 2)
    assert len({part.masked_words for part in parts}) == 2
    whole, each = model.losses(batch, teacher), [model.losses(part, teacher) for part in parts]
    mean = {name: (each[0][name] + each[1][name]) / 2 for name in whole if not name.startswith("metric/")}
    for name, value in mean.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6, msg=name)
    compare_gradients(model, [whole, mean])


def test_experts_of_the_paper_and_of_the_release() -> None:
    with torch.device("meta"):
        released, paper = beit3_tiny().build(), beit3_tiny_paper().build()
    assert any(".attn.qkv.text." in name for name, _ in released.named_parameters())
    assert not any(".ffn.fused." in name for name, _ in released.named_parameters())
    assert any(".attn.qkv.all." in name for name, _ in paper.named_parameters())
    assert {name.split(".")[2] for name, _ in paper.named_parameters() if ".ffn.fused." in name} == {"2"}


def step_flops(config: Beit3Config, pairs: int, tokens: int, alone: int) -> float:
    """FLOPs (2 a multiply-add) of forward and backward on shapes alone, without the tokenizer."""
    batch = make_batch(config, [tokens] * pairs, [tokens] * alone)
    with torch.device("meta"):
        model = config.build().to("meta")

    class Nothing(CodeTeacher):
        def codes(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
            return torch.zeros(len(images), grid[0] * grid[1], dtype=torch.int64, device=images.device)

    teacher = Nothing(FakeTokenizer(config.codes), config.codes)
    with FlopCounterMode(display=False) as counter:
        total(model.losses(batch.to("meta"), teacher)).backward()
    return float(counter.get_total_flops())


def linear_flops(config: Beit3Config, rows: float, last: float) -> float:
    """Of the matrices of the layers, forward and backward, for ``rows`` tokens; ``last`` pass the last layer whole."""
    width, hidden = config.width, config.hidden
    layer = 8 * width**2 + 4 * width * hidden
    keys = 4 * width**2
    return 3 * (rows * layer * (config.depth - 1) + rows * keys + last * (layer - keys))


def test_masked_data_step_tflop() -> None:
    """No padded token, logits where something is masked: 16 pairs, 16 texts and 24 pictures of BEiT-3-base, 224 px."""
    config = replace(beit3_base(), drop_path=0.0, outputs=("mlm", "mim"))
    pairs, alone, tokens = 16, 16, 13
    found = step_flops(config, pairs, tokens, alone)
    pictures = pairs + alone + alone // 2
    texts = (pairs + alone) * tokens
    masked_patches = len(masks_of(config, pairs).rows) + len(masks_of(config, alone + alone // 2, 1).rows)
    masked_words = (pairs + alone) * (tokens // 2 - 1)
    rows = pictures * config.tokens + texts
    heads = 3 * 2 * config.width * (masked_patches * config.codes + masked_words * config.vocab_size)
    embed = 2 * 2 * pictures * config.grid**2 * config.width * 3 * config.patch**2  # pixels need no gradient
    least = linear_flops(config, rows, masked_patches + masked_words) + heads + embed
    seen = sum(n**2 * k for n, k in ((config.tokens, alone * 1.5), (tokens, alone), (config.tokens + tokens, pairs)))
    attention = 12 * 3.5 * 4 * seen * config.width  # flash attention computes the scores once more on its way back
    print(f"BEiT-3-base, masked data modelling: {found / 1e12:.3f} TFLOP, matrices alone {least / 1e12:.3f}")
    assert least <= found <= least + attention
    padded = step_flops(config, pairs, 64, alone)
    assert found < 0.85 * padded


def test_logits_at_masked_positions_only() -> None:
    model, config = trained(beit3_tiny()), beit3_tiny()
    batch = make_batch(model.config, LENGTHS, [4, 7])
    seen: dict[str, int] = {}
    for name in ("mlm_head", "mim_head"):
        head = getattr(model, name)
        head.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: len(inputs[0])}))
    model.losses(batch, teacher_of(config))
    assert batch.masked is not None
    assert batch.patches is not None
    assert batch.unpaired is not None
    assert seen["mlm_head"] == len(batch.masked.rows) + len(batch.unpaired.masked.rows)
    assert seen["mim_head"] == len(batch.patches.rows) + len(batch.unpaired.patches.rows)


def test_towers() -> None:
    config = replace(beit3_tiny(), objective="itc")
    model = trained(config)
    batch = make_batch(model.config, LENGTHS)
    embedded = model.embed(batch)
    torch.testing.assert_close(embedded.image, model.encode_images(batch.squares).features)
    torch.testing.assert_close(embedded.text, model.encode_texts(batch.texts).features)
    whole, parts = model.losses(batch)["itc"], split(batch, 2)
    grads = torch.autograd.grad(whole, list(model.parameters()), allow_unused=True)
    leaves = replace(
        embedded, image=embedded.image.detach().requires_grad_(), text=embedded.text.detach().requires_grad_()
    )
    total(model.contrast(leaves)).backward()
    model_grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    for i, part in enumerate(parts):
        rows = slice(2 * i, 2 * i + 2)
        assert leaves.image.grad is not None
        assert leaves.text.grad is not None
        slices = replace(leaves, image=leaves.image.grad[rows], text=leaves.text.grad[rows])
        total(model.losses(part, None, slices)).backward()
    del model_grads
    for (name, parameter), expected in zip(model.named_parameters(), grads, strict=True):
        if expected is not None:
            scale = float(expected.abs().max())
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("config", [beit3_tiny(), beit3_tiny_paper()], ids=["released", "paper"])
def test_captions_of_one_picture_share_it(config: Beit3Config) -> None:
    model = trained(replace(config, objective="captions"))
    images = make_batch(model.config, [5, 5]).squares
    texts, masked = texts_of(model.config, [6, 9, 4, 7], torch.Generator().manual_seed(1))
    seen: list[int] = []
    model.body.patch_embed.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    hidden = TextBatch(masked.ids, texts.segments)
    together = model.fill_caption_masks(images, hidden, masked.rows, masked.counts, captions=2)
    assert seen == [2]
    with FlopCounterMode(display=False) as work:
        model.fill_caption_masks(images, hidden, masked.rows, masked.counts, captions=2)
    with FlopCounterMode(display=False) as twice:
        each = model.fill_caption_masks(images.repeat_interleave(2, 0), hidden, masked.rows, masked.counts)
    assert work.get_total_flops() < 0.65 * twice.get_total_flops()  # 37 picture tokens and two texts of 6.5
    torch.testing.assert_close(together, each, rtol=1e-4, atol=1e-5)
    one = model.fill_caption_masks(  # a later word is never seen
        images[:1],
        TextBatch(torch.cat([masked.ids[:5], masked.ids[5:6] + 1]), Segments((6,))),
        masked.rows[:2],
        masked.counts[:1],
    )
    torch.testing.assert_close(one, each[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [beit3_tiny(), beit3_tiny_paper()], ids=["released", "paper"])
def test_caches_give_what_whole_sequences_give(config: Beit3Config) -> None:
    model = trained(replace(config, objective="captions")).eval()
    images = make_batch(model.config, [5, 5, 5]).squares
    config_of_search = GenerationConfig(beams=3, n=2, max_length=8)
    with torch.no_grad():
        encoded = model.encode_images(images)
        state = model.start_captions(encoded, 8)
        logits = model.continue_captions(state, TextBatch.of([[2, 17], [2], [2, 9, 11]]))
        state.select([0, 0, 1, 2])
        logits = model.continue_captions(state, TextBatch.of([[5], [6], [7], [8]]))
        sequences = [[2, 17, 5], [2, 17, 6], [2, 7], [2, 9, 11, 8]]
        for row, (ids, picture) in enumerate(zip(sequences, [0, 0, 1, 2], strict=True)):
            whole = TextBatch.of([[*ids, 4]])
            expected = model.fill_caption_masks(images[[picture]], whole, torch.tensor([len(ids)]), (1,))
            torch.testing.assert_close(logits[row], expected[0], rtol=1e-4, atol=1e-5)
        found = generate(model, encoded, [[2]] * 3, 3, config_of_search, ["a", "b", "c"])
    assert [len(texts) for texts in found] == [2, 2, 2]


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="outputs"):
        replace(beit3_tiny(), outputs=("itc",))
    with pytest.raises(ValueError, match="codes"):
        teacher_of(replace(beit3_tiny(), codes=7)).__class__(FakeTokenizer(8), 7)
    model = trained(beit3_tiny())
    with pytest.raises(ValueError, match="max_length"):
        model.encode_texts(TextBatch.of([[1] * (model.config.max_length + 1)]))


def test_size_of_the_paper() -> None:
    with torch.device("meta"):
        giant = replace(beit3_giant(), outputs=("mlm",), objective="captions").build()
    parts = dict.fromkeys((".attn.", ".ffn.fused.", ".ffn.image.", ".ffn.text."), 0)
    for name, parameter in giant.named_parameters():
        for kind in parts:
            parts[kind] += parameter.numel() * (kind in name)
    published = (317, 52, 692, 692)  # table 2, in millions
    for count, expected in zip(parts.values(), published, strict=True):
        assert abs(count / 1e6 - expected) < 1
    assert round(sum(p.numel() for p in giant.parameters()) / 1e9, 1) == 1.9


def matching() -> MatchingBeit3:
    model = trained(replace(beit3_tiny(), objective="itc", outputs=("itc", "itm")))
    assert isinstance(model, MatchingBeit3)
    return model


def test_matching_reads_pairs() -> None:
    model = matching()
    assert isinstance(model, Matches)
    assert not isinstance(trained(beit3_tiny()), Matches)
    batch = make_batch(model.config, [5, 8, 3])
    images, texts = model.encode_images(batch.squares), model.encode_texts(batch.texts)
    memory = model.project_images(images.tokens)
    grid = model.match(memory, texts, [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2] * 3).reshape(3, 3, 2)
    some = model.match(memory, texts, [2, 0, 2, 1], [1, 1, 0, 2])
    torch.testing.assert_close(some, torch.stack([grid[2, 1], grid[0, 1], grid[2, 0], grid[1, 2]]))
    states = model.encode_pairs(batch.squares, batch.texts).flatten(1)
    torch.testing.assert_close(model.itm_head(states), grid[[0, 1, 2], [0, 1, 2]])


def test_matching_learns_from_hard_negatives() -> None:
    model = matching()
    batch = make_batch(model.config, LENGTHS)
    embedded = model.embed(batch)
    assert model.logit_scale is not None
    scale, ids = model.logit_scale.exp(), batch.image_ids
    texts = draw_negatives(negative_weights(scale * embedded.image @ embedded.text.T, ids, ids), batch.draws[:, 1])
    pictures = draw_negatives(negative_weights(scale * embedded.text @ embedded.image.T, ids, ids), batch.draws[:, 0])
    memory = model.project_images(model.encode_images(batch.squares).tokens)
    own = list(range(4))
    logits = model.match(
        memory, model.encode_texts(batch.texts), own + pictures.tolist() + own, own + own + texts.tolist()
    )
    expected = nn.functional.cross_entropy(logits, torch.tensor([1] * 4 + [0] * 8))
    losses = model.losses(batch)
    torch.testing.assert_close(losses["itm"], expected)
    torch.testing.assert_close(losses["itc"], model.contrast(embedded)["itc"])
