"""ALBEF: the packed step computes what the plain one computes, and no more than it must."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from imglish.data.batch import Batch, MaskedTexts, TextBatch
from imglish.models import aligned
from imglish.models.albef import Albef, AlbefConfig, albef_base, albef_tiny
from imglish.nn.segments import Rows, Segments
from imglish.objectives.itm import draw_negatives, negative_weights
from imglish.objectives.momentum import MomentumTeacher


def make_batch(config: AlbefConfig, lengths: list[int], swapped: bool = False, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    texts = TextBatch.of([torch.randint(5, config.vocab_size, (n,), generator=generator).tolist() for n in lengths])
    rows = [int(start) + k for start, n in zip(texts.segments.bounds[:-1], lengths) for k in range(1, max(2, n // 3))]
    at = torch.tensor(rows)
    ids = texts.ids.clone()
    labels, ids[at] = ids[at], 4
    counts = tuple(max(2, n // 3) - 1 for n in lengths)
    size = config.image.size
    return Batch(
        images=torch.randint(0, 256, (len(lengths), 3, size, size), generator=generator, dtype=torch.uint8),
        texts=texts,
        image_ids=torch.arange(len(lengths)),
        draws=torch.rand(len(lengths), 2, generator=generator),
        masked=MaskedTexts(ids, at, labels, counts),
        swapped=TextBatch(texts.ids.flip(0), Segments(texts.segments.lengths[::-1])) if swapped else None,
    )


def trained_pair(config: AlbefConfig) -> tuple[Albef, MomentumTeacher[Albef]]:
    torch.manual_seed(0)
    model = config.build()
    with torch.no_grad():  # away from the small initial weights, so that every path matters
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.8 / parameter.shape[-1] ** 0.5)
    teacher = model.make_teacher()
    teacher.at(1.0)
    return model, teacher


def plain_fuse(model: Albef, tokens: Tensor, states: Tensor) -> Tensor:
    """Fusion of one picture ``(L, D)`` and one text ``(n, D)``, nothing shared, every row computed."""
    memory = model.project_images(tokens[None])
    length = states.shape[0]
    return model.fuse(states, Segments((length,)), memory, Segments((1,)))


def plain_losses(model: Albef, batch: Batch, teacher: MomentumTeacher[Albef]) -> dict[str, Tensor]:
    """The order of work of the paper: one pair at a time, one forward an objective."""
    bounds = batch.texts.segments.bounds
    count = len(batch)

    def states(ids: Tensor, who: Albef) -> list[Tensor]:
        return [who._text_states(TextBatch(ids[a:b], Segments((int(b - a),)))) for a, b in pairwise(bounds)]

    embedded = model.embed(batch, teacher)
    image_m, text_m = embedded.momentum()
    tokens = [model.vision(batch.images[b : b + 1])[0] for b in range(count)]
    clean = states(batch.texts.ids, model)
    i2t = embedded.image @ text_m.T / model.temperature
    t2i = embedded.text @ image_m.T / model.temperature
    neg_text = draw_negatives(negative_weights(i2t, batch.image_ids, batch.image_ids), batch.draws[:, 1])
    neg_image = draw_negatives(negative_weights(t2i, batch.image_ids, batch.image_ids), batch.draws[:, 0])
    pairs = [(b, clean[b]) for b in range(count)]
    labels = [1] * count
    if batch.swapped is not None:
        cuts = batch.swapped.segments.bounds
        for b in range(count):
            one = TextBatch(batch.swapped.ids[cuts[b] : cuts[b + 1]], Segments((int(cuts[b + 1] - cuts[b]),)))
            pairs.append((b, model._text_states(one)))
            labels.append(0)
    pairs += [(int(neg_image[b]), clean[b]) for b in range(count)] + [
        (b, clean[int(neg_text[b])]) for b in range(count)
    ]
    labels += [0] * (2 * count)
    logits = torch.stack([model.itm_head(plain_fuse(model, tokens[i], rows)[0]) for i, rows in pairs])
    itm = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))

    assert batch.masked is not None
    masked, soft = [], []
    mine, theirs = states(batch.masked.ids, model), states(batch.masked.ids, teacher.model)
    for b in range(count):
        masked.append(plain_fuse(model, tokens[b], mine[b]))
        with torch.no_grad():
            tokens_m = teacher.model.vision(batch.images[b : b + 1])[0]
            soft.append(plain_fuse(teacher.model, tokens_m, theirs[b]))
    ours = model._mlm_logits(torch.cat(masked))[batch.masked.rows]
    target = torch.softmax(teacher.model._mlm_logits(torch.cat(soft))[batch.masked.rows], dim=1)
    hard = torch.nn.functional.cross_entropy(ours, batch.masked.labels)
    distilled = -(torch.log_softmax(ours, 1) * target).sum(1).mean()
    mlm = (1 - teacher.alpha) * hard + teacher.alpha * distilled
    return {"itc": model.contrast(embedded, teacher)["itc"], "itm": itm, "mlm": mlm}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("lengths", [[6, 6, 6, 6], [9, 3, 12, 5, 7]])
def test_packed_step_equals_plain_step(lengths: list[int], swapped: bool) -> None:
    model, teacher = trained_pair(albef_tiny())
    batch = make_batch(model.config, lengths, swapped)
    with torch.no_grad():
        teacher.model.image_proj.weight.mul_(1.1)
    gradients = []
    values = []
    for compute in (model.losses, lambda b, t: plain_losses(model, b, t)):
        model.zero_grad()
        losses = {k: v for k, v in compute(batch, teacher).items() if not k.startswith("metric/")}
        sum(losses.values()).backward()
        values.append(losses)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert values[0].keys() == values[1].keys()
    for name, value in values[0].items():
        torch.testing.assert_close(value, values[1][name], rtol=1e-5, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = float(gradients[1][name].abs().max())
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


class FixedCopy:
    """Stands in for the copy to the host on a device that holds no values: pair b draws b + 1."""

    def __init__(self, chosen: Tensor) -> None:
        self.count = chosen.shape[1]

    def numpy(self) -> np.ndarray:
        after = (np.arange(self.count) + 1) % self.count
        return np.stack([after, after])


def step_flops(config: AlbefConfig, pairs: int, tokens: int, monkeypatch: Any) -> dict[str, float]:
    """FLOPs (2 a multiply-add) of forward + backward + teacher on shapes alone, by kind of work."""
    monkeypatch.setattr(aligned, "HostCopy", FixedCopy)
    batch = make_batch(replace(config, vision=config.vision), [tokens] * pairs)
    with torch.device("meta"):
        model = config.build().to("meta")  # buffers of pixel statistics stay on the CPU
        teacher = model.make_teacher()
    teacher.at(1.0)
    assert teacher.queue is not None
    teacher.queue.filled = config.teacher.queue_size
    with FlopCounterMode(display=False) as counter:
        losses = model.losses(batch.to("meta"), teacher)
        sum(v for k, v in losses.items() if not k.startswith("metric/")).backward()
    return {"total": counter.get_total_flops()}


def test_step_of_albef_base_costs_at_most_15_tflop(monkeypatch: pytest.MonkeyPatch) -> None:
    total = step_flops(albef_base(), pairs=64, tokens=13, monkeypatch=monkeypatch)["total"]
    print(f"ALBEF-base, 64 pairs, 256 px, 13 tokens: {total / 1e12:.2f} TFLOP (official order of work: 19.2)")
    assert total <= 15e12
    assert total >= 13e12  # a step that leaves work out is not cheaper, it is wrong


def test_last_fusion_layer_computes_only_rows_that_are_read() -> None:
    model, _ = trained_pair(albef_tiny())
    batch = make_batch(model.config, [9, 4, 7])
    tokens = model.vision(batch.images)
    states = model.encode_texts(batch.texts)
    assert states.rows is not None
    memory, one = model.project_images(tokens), Segments.equal(3, 1)
    everything = model.fuse(states.rows, states.segments, memory, one)
    read = Rows.first(states.segments, tokens.device)
    torch.testing.assert_close(model.fuse(states.rows, states.segments, memory, one, read), everything[read.index])


def test_pairs_in_any_order_and_number() -> None:
    model, _ = trained_pair(albef_tiny())
    batch = make_batch(model.config, [5, 8, 3])
    memory, texts = model.project_images(model.vision(batch.images)), model.encode_texts(batch.texts)
    grid = model.match(memory, texts, [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2] * 3).reshape(3, 3, 2)
    some = model.match(memory, texts, [2, 0, 2, 1], [1, 1, 0, 2])
    torch.testing.assert_close(some, torch.stack([grid[2, 1], grid[0, 1], grid[2, 0], grid[1, 2]]))


def test_captions_of_one_picture_are_never_negatives() -> None:
    model, teacher = trained_pair(albef_tiny())
    batch = make_batch(model.config, [5, 5, 5])
    losses = model.losses(replace(batch, image_ids=torch.tensor([7, 7, 7])), teacher)
    # without any negative, ITM is the loss of the positives alone
    memory, texts = model.project_images(model.vision(batch.images)), model.encode_texts(batch.texts)
    positives = model.match(memory, texts, [0, 1, 2], [0, 1, 2])
    expected = torch.nn.functional.cross_entropy(positives, torch.ones(3, dtype=torch.int64))
    torch.testing.assert_close(losses["itm"], expected)


def test_share_of_hard_negatives() -> None:
    batch = make_batch(albef_tiny(), [5] * 4)
    batch = replace(batch, draws=torch.tensor([[0.1, 0.1], [0.5, 0.5], [0.9, 0.9], [0.34, 0.34]]))

    def drawn(share: float) -> list[list[int]]:
        model, teacher = trained_pair(replace(albef_tiny(), hard_negatives=share, temperature=0.001))
        chosen: list[list[int]] = model._draw(model.embed(batch, teacher), batch.draws).chosen.numpy().tolist()
        return chosen

    uniform = [1, 2, 3, 1]  # of the three others: draws 0.1, 0.5, 0.9, 0.34 are the 1st, 2nd, 3rd, 2nd
    assert drawn(0.0) == [uniform, uniform]
    hard = drawn(1.0)
    model, teacher = trained_pair(replace(albef_tiny(), temperature=0.001))
    embedded = model.embed(batch, teacher)
    similarity = embedded.text @ embedded.momentum()[0].T - 9 * torch.eye(4)
    assert hard[0] == similarity.argmax(1).tolist()  # so cold that only the most similar picture can be drawn
    with pytest.raises(ValueError, match="share"):
        replace(albef_tiny(), hard_negatives=1.5)


def test_published_parameter_count() -> None:
    with torch.device("meta"):
        model = albef_base().build()
    vision = sum(p.numel() for p in model.vision.parameters())
    assert round(vision / 1e6, 1) == 85.8
    assert sum(p.numel() for p in model.parameters()) == 209_937_725


def test_too_long_text_is_refused() -> None:
    model, _ = trained_pair(albef_tiny())
    with pytest.raises(ValueError, match="max_length"):
        model.encode_texts(TextBatch.of([[1] * (model.config.max_length + 1)]))
