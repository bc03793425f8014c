"""ViLT: the packed step computes what one pair at a time computes, and no more than it must."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from imglish.data.batch import Batch, MaskedTexts, TextBatch
from imglish.data.patches import PatchBatch, Patches
from imglish.data.regions import RegionBatch, Regions
from imglish.models import registry, vilt
from imglish.models.capabilities import (
    Contrastive,
    EmbedsInputs,
    EncodesImages,
    FillsMasks,
    Matches,
    MissingCapabilityError,
    Trainable,
    require,
)
from imglish.models.vilt import Vilt, ViltConfig, vilt_base, vilt_regions, vilt_small, vilt_tiny
from imglish.models.vilt_pictures import AspectInput, RegionInput, neighbours
from imglish.nn.segments import Ragged, Segments
from imglish.objectives.wpa import alignment_distance
from imglish.training.step import Stepper, StepSettings, split
from tests.ranks import run_ranks

LENGTHS = [9, 4, 12, 5, 7, 6]
GRIDS = [(6, 10), (10, 6), (6, 6), (1, 7), (6, 8), (9, 6)]


def patches(config: ViltConfig, grids: list[tuple[int, int]], generator: torch.Generator) -> PatchBatch:
    assert isinstance(config.image, AspectInput)
    p = config.image.patch
    return PatchBatch.of(
        [Patches(torch.randint(0, 256, (h * w, 3, p, p), generator=generator).byte(), (h, w)) for h, w in grids]
    )


def regions(config: ViltConfig, counts: list[int], generator: torch.Generator) -> RegionBatch:
    assert isinstance(config.image, RegionInput)
    made = []
    for n in counts:
        corners = torch.rand(n, 2, 2, generator=generator).sort(1).values
        made.append(Regions(torch.randn(n, config.image.features, generator=generator), corners.flatten(1)))
    return RegionBatch.of(made)


def make_batch(config: ViltConfig, swapped: bool = False, lengths: list[int] = LENGTHS, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    texts = TextBatch.of([torch.randint(5, config.vocab_size, (n,), generator=generator).tolist() for n in lengths])
    rows = [int(start) + k for start, n in zip(texts.segments.bounds[:-1], lengths) for k in range(1, max(2, n // 3))]
    at = torch.tensor(rows)
    ids = texts.ids.clone()
    labels, ids[at] = ids[at], 4
    images: Any = (
        patches(config, GRIDS[: len(lengths)], generator)
        if isinstance(config.image, AspectInput)
        else regions(config, [4, 7, 3, 5, 6, 4][: len(lengths)], generator)
    )
    return Batch(
        images=images,
        texts=texts,
        image_ids=torch.arange(len(lengths)),
        draws=torch.tensor([[0.6, 0.1], [0.2, 0.1], [0.9, 0.1], [0.7, 0.1], [0.1, 0.1], [0.3, 0.1]])[: len(lengths)],
        masked=MaskedTexts(ids, at, labels, tuple(max(2, n // 3) - 1 for n in lengths)),
        swapped=TextBatch(texts.ids.flip(0), Segments(texts.segments.lengths[::-1])) if swapped else None,
    )


def far_from_start(config: ViltConfig) -> Vilt:
    """A model away from its small initial weights, so that every path matters."""
    torch.manual_seed(0)
    model = config.build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.8 / parameter.shape[-1] ** 0.5)
    return model


def tiny_regions(**changes: Any) -> ViltConfig:
    return replace(vilt_tiny(), image=RegionInput(24), **changes)


def plain_states(model: Vilt, words: Tensor, picture: Any) -> Tensor:
    """All states of one pair: nothing packed, nothing left out."""
    tokens = model.embed_images(picture).tokens
    assert isinstance(tokens, Ragged)
    rows = torch.cat([model.embedding(TextBatch(words, Segments((len(words),)))) + model.types.weight[0], tokens.rows])
    segments = Segments((len(rows),))
    for block in model.blocks:
        rows = block(rows, segments)
    states: Tensor = model.norm(rows)
    return states


def plain_losses(model: Vilt, batch: Batch) -> dict[str, Tensor]:
    """The order of work of the paper, one pair at a time."""
    config, images, masked = model.config, batch.images, batch.masked
    assert masked is not None
    bounds = batch.texts.segments.bounds
    texts = [batch.texts.ids[a:b] for a, b in pairwise(bounds)]
    filled = torch.cat(
        [plain_states(model, masked.ids[a:b], images[n : n + 1])[: b - a] for n, (a, b) in enumerate(pairwise(bounds))]
    )
    losses = {"mlm": F.cross_entropy(model._words(filled[masked.rows]), masked.labels)}
    matched = batch.draws[:, 0] < 0.5
    pairs = [(words, n if matched[n] else n ^ 1) for n, words in enumerate(texts)]
    if batch.swapped is not None:
        cuts = batch.swapped.segments.bounds
        pairs += [(batch.swapped.ids[a:b], n) for n, (a, b) in enumerate(pairwise(cuts))]
        matched = torch.cat([matched, torch.zeros(len(texts), dtype=torch.bool)])
    states = [plain_states(model, words, images[n : n + 1]) for words, n in pairs]
    assert model.itm_head is not None
    logits = torch.stack([model.itm_head(torch.tanh(model.pooler(rows[0]))) for rows in states])
    losses["itm"] = F.cross_entropy(logits, matched.long())
    total = torch.zeros(())
    for (words, _), rows, true in zip(pairs, states, matched):
        inner, seen = rows[1 : len(words) - 1], rows[len(words) + model.pictures.leading :]
        one = alignment_distance(inner, Segments((len(inner),)), seen, Segments((len(seen),)))[0]
        total = total + (one if true else -one)
    losses["wpa"] = config.wpa_weight * total / len(pairs)
    return losses


def trained(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in losses.items() if not name.startswith("metric/")}


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        scale = float(right[name].detach().abs().max())
        torch.testing.assert_close(value, right[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("config", [vilt_tiny(), tiny_regions()], ids=["patches", "regions"])
def test_packed_step_equals_one_pair_at_a_time(config: ViltConfig, swapped: bool) -> None:
    model = far_from_start(config)
    batch = make_batch(config, swapped)
    values, gradients = [], []
    for compute in (model.losses, lambda b: plain_losses(model, b)):
        model.zero_grad()
        losses = trained(compute(batch))
        torch.stack(list(losses.values())).sum().backward()
        values.append({name: value.detach() for name, value in losses.items()})
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    close(*values)
    close(*gradients)
    assert gradients[0].keys() == dict(model.named_parameters()).keys()  # every parameter learns


def test_one_forward_reads_masked_texts_once_and_fills_matching_pairs() -> None:
    config = replace(vilt_tiny(), one_forward=True)
    model, batch = far_from_start(config), make_batch(vilt_tiny())
    masked = batch.masked
    assert masked is not None
    losses = trained(model.losses(batch))
    both = replace(batch, texts=TextBatch(masked.ids, batch.texts.segments))
    plain = far_from_start(replace(config, one_forward=False))
    close({n: losses[n] for n in ("itm", "wpa")}, {n: plain.losses(both)[n] for n in ("itm", "wpa")})
    kept = [b for b in range(len(batch)) if batch.draws[b, 0] < 0.5]
    starts = np.concatenate([[0], np.cumsum(masked.counts)])
    some = np.concatenate([np.arange(starts[b], starts[b + 1]) for b in kept])
    tokens = plain.embed_images(batch.images).tokens
    logits = plain.fill_masks(tokens, masked, batch.texts.segments)[some]
    torch.testing.assert_close(losses["mlm"], F.cross_entropy(logits, masked.labels[some]))


def test_capabilities() -> None:
    model = vilt_tiny().build()
    for capability in (Matches, FillsMasks, EmbedsInputs, Trainable):
        assert isinstance(model, capability)
    assert not isinstance(model, Contrastive)
    with pytest.raises(MissingCapabilityError, match="albef"):
        require(model, EncodesImages, "a search index")


def test_pairs_in_any_order_squares_and_patches() -> None:
    model = far_from_start(vilt_tiny())
    batch = make_batch(model.config)
    tokens = model.embed_images(batch.images).tokens
    texts = model.embed_texts(batch.texts)
    memory = model.project_images(tokens)
    grid = model.match(memory, texts, [i for i in range(6) for _ in range(6)], list(range(6)) * 6).view(6, 6, 2)
    some = model.match(memory, texts, [2, 0, 5], [1, 1, 0])
    torch.testing.assert_close(some, torch.stack([grid[2, 1], grid[0, 1], grid[5, 0]]))
    squares = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    cut = PatchBatch.cut(squares, 8)
    torch.testing.assert_close(model.embed_images(squares).tokens.rows, model.embed_images(cut).tokens.rows)
    with pytest.raises(TypeError, match="regions"):
        model.embed_images(regions(tiny_regions(), [2], torch.Generator()))


def test_what_a_model_was_built_without_is_said() -> None:
    batch = make_batch(vilt_tiny())
    words = replace(vilt_tiny(), itm=False, wpa=False).build()
    assert trained(words.losses(batch)).keys() == {"mlm"}
    with pytest.raises(ValueError, match="without ITM"):
        words.match(
            words.project_images(words.embed_images(batch.images).tokens), words.embed_texts(batch.texts), [0], [0]
        )
    pairs = replace(vilt_tiny(), mlm=False).build()
    assert trained(pairs.losses(batch)).keys() == {"itm", "wpa"}
    with pytest.raises(ValueError, match="wpa=false"):
        replace(vilt_tiny(), itm=False)
    with pytest.raises(ValueError, match="one_forward"):
        replace(vilt_tiny(), mlm=False, one_forward=True)
    with pytest.raises(ValueError, match="masked texts"):
        vilt_tiny().build().losses(replace(batch, masked=None))


def test_replaced_pictures() -> None:
    assert neighbours(6).tolist() == [1, 0, 3, 2, 5, 4]
    assert neighbours(5).tolist() == [1, 0, 3, 2, 3]
    assert neighbours(1).tolist() == [0]
    batch = make_batch(vilt_tiny())
    assert vilt.replaced(batch).tolist() == [True, False, True, True, False, False]
    twins = replace(batch, image_ids=torch.tensor([7, 7, 2, 3, 4, 5]))  # never a picture for a copy of itself
    assert vilt.replaced(twins).tolist() == [False, False, True, True, False, False]


def gradients(parts: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = far_from_start(vilt_tiny())
    losses = Stepper(model, None, StepSettings(parts, seed=5, autocast=False))(make_batch(model.config), step=0)
    return trained(losses), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_accumulation_changes_nothing() -> None:
    """Neighbours exchange pictures, and means over masked words are those of the batch: parts of two are exact."""
    for whole, divided in zip(gradients(1), gradients(3)):
        close(divided, whole)


def on_rank(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = far_from_start(vilt_tiny())
    batch = make_batch(model.config, lengths=LENGTHS[:4])
    losses = trained(model.losses(split(batch, 2)[rank]))
    torch.stack(list(losses.values())).sum().backward()
    return {n: v.detach() for n, v in losses.items()}, {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def test_two_processes_equal_one() -> None:
    model = far_from_start(vilt_tiny())
    losses = trained(model.losses(make_batch(model.config, lengths=LENGTHS[:4])))
    torch.stack(list(losses.values())).sum().backward()
    results = run_ranks(2, on_rank)
    alone = {n: v.detach() for n, v in losses.items()}, {n: p.grad for n, p in model.named_parameters()}
    for kind in (0, 1):
        mean = {name: (results[0][kind][name] + results[1][kind][name]) / 2 for name in results[0][kind]}
        close(mean, alone[kind])  # type: ignore[arg-type]


class FixedCopy:
    """Stands in for the copy to the host on a device that holds no values: every other picture is replaced."""

    def __init__(self, wrong: Tensor) -> None:
        self.count = wrong.shape[0]

    def numpy(self) -> np.ndarray:
        return np.arange(self.count) % 2 == 1


def step_flops(config: ViltConfig, lengths: list[int], grids: list[tuple[int, int]], monkeypatch: Any) -> int:
    """FLOPs (2 a multiply-add) of forward and backward on shapes alone."""
    monkeypatch.setattr(vilt, "HostCopy", FixedCopy)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know the meta device
    batch = replace(make_batch(config, lengths=lengths), draws=torch.zeros(len(lengths), 2))
    batch = replace(batch, images=patches(config, grids, torch.Generator()), image_ids=torch.arange(len(lengths)))
    with torch.device("meta"):
        model = config.build()
    with FlopCounterMode(display=False) as counter:
        torch.stack(list(trained(model.losses(batch.to("meta"))).values())).sum().backward()
    return int(counter.get_total_flops())


def test_step_of_vilt_base_computes_no_padding_tflop(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 pictures of 12 x 18 and 32 of 12 x 12 patches with texts of 10 tokens, MLM, ITM and WPA.

    The official code pads texts to 40 and pictures to the largest: 2 x 64 sequences of 40 + 217 rows.
    """
    config = replace(vilt_base(), image=AspectInput())
    grids = [(12, 18), (12, 12)] * 32
    total = step_flops(config, [10] * 64, grids, monkeypatch)
    rows = sum(10 + 1 + h * w for h, w in grids)
    body = 12 * 12 * 768 * 768  # multiply-adds a row: 4 for attention, 8 for the feed-forward, a layer
    least = 3 * 2 * 2 * rows * body  # two forwards, each with twice the work backward
    padded = least * 64 * (40 + 217) / rows
    print(f"ViLT-base, 64 pairs: {total / 1e12:.2f} TFLOP; padded as officially, body alone: {padded / 1e12:.2f}")
    assert least * 0.9 < total < 1.14 * least  # the rest: attention, patch embedding, heads
    assert total < 0.85 * padded


def test_one_forward_costs_half_tflop(monkeypatch: pytest.MonkeyPatch) -> None:
    config = vilt_base()
    grids = [(12, 16)] * 4
    two = step_flops(config, [10] * 4, grids, monkeypatch)
    one = step_flops(replace(config, one_forward=True), [10] * 4, grids, monkeypatch)
    print(f"one masked forward: {one / two:.2f} of the FLOPs of two")
    assert 0.45 < one / two < 0.56


def test_parameter_counts() -> None:
    def count(config: ViltConfig) -> tuple[int, int]:
        with torch.device("meta"):
            model = config.build()
        heads = [part for part in (model.itm_head, model.mlm_head, model.mlm_words) if part is not None]
        in_heads = sum(p.numel() for head in heads for p in head.parameters())
        return sum(p.numel() for p in model.parameters()) - in_heads, in_heads

    assert count(vilt_base()) == (111_595_008, 24_065_084)
    body = 12 * (12 * 768 * 768 + 13 * 768) + 768 * 3072 + 768  # blocks and patches: the paper's 87.4 M
    assert round(body / 1e6, 1) == 87.4
    assert round(sum(count(vilt_small())) / 1e6, 1) == 5.3
    assert count(vilt_regions())[0] == 110_722_560


@pytest.mark.parametrize("name", vilt.CONFIGS)
def test_configurations_survive_json(name: str) -> None:
    config = registry.named(name)
    assert registry.from_dict("vilt", registry.to_dict(config)) == config


def test_published_picture_rule() -> None:
    transform = vilt_base().image.transform()
    assert transform is not None
    assert transform.shape(640, 480) == (384, 512)
    assert transform.shape(500, 375) == (384, 512)
    assert transform.shape(375, 500) == (512, 384)
    assert transform.shape(4000, 1000) == (160, 608)  # the longer side reaches 639 first, then multiples of 32
    assert transform.shape(1000, 1000) == (384, 384)
    most = max(np.prod(transform.shape(w, 300)) // 32**2 for w in range(300, 1200))
    assert most == 228
    assert transform.shape(9000, 30) == (32, 608)  # never less than a patch


def test_too_long_text_is_refused() -> None:
    model = vilt_tiny().build()
    with pytest.raises(ValueError, match="max_length"):
        model.embed_texts(TextBatch.of([[1] * (model.config.max_length + 1)]))
