"""VLMo: the packed step computes what one forward an objective computes, and no more than it must."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.vlmo_plain import PlainVlmo, make_batch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from imglish.data.batch import Batch, TextBatch
from imglish.data.tokenizers import Tokenizer
from imglish.evaluation.encoding import Machine, picture_loader
from imglish.evaluation.retrieval import RetrievalConfig, evaluate_retrieval
from imglish.models import hard_pairs, registry, vlmo
from imglish.models.capabilities import Contrastive, EncodesImages, EncodesTexts, Matches
from imglish.models.vlmo import Vlmo, VlmoConfig, vlmo_base, vlmo_base_plus, vlmo_large, vlmo_small, vlmo_tiny
from imglish.training.optim import train_only
from imglish.training.step import Stepper, StepSettings
from tests.training.support import records

LENGTHS = [9, 3, 12, 5, 7, 4]


def trained(config: VlmoConfig) -> Vlmo:
    torch.manual_seed(0)
    model = config.build().train()
    with torch.no_grad():  # away from the small initial weights, so that every path matters
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.8 / parameter.shape[-1] ** 0.5)
    return model


def batch_for(config: VlmoConfig, lengths: list[int] = LENGTHS) -> Batch:
    return make_batch(config.image.size, lengths, config.vocab_size)


def texts_alone(batch: Batch) -> Batch:
    return replace(batch, images=torch.zeros(len(batch), 3, 0, 0, dtype=torch.uint8))


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([value for name, value in losses.items() if not name.startswith("metric/")]).sum()


def gradients(model: Vlmo, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("positions", ["relative", "absolute"])
@pytest.mark.parametrize("lengths", [[6, 6, 6, 6], LENGTHS])
def test_packed_step_equals_one_forward_an_objective(lengths: list[int], positions: Any) -> None:
    model = trained(replace(vlmo_tiny(), positions=positions, layer_scale=0.3))
    batch, plain = batch_for(model.config, lengths), PlainVlmo(model, slots=max(lengths) + 3)
    ours, theirs = model.losses(batch), plain.losses(batch)
    assert ours.keys() == theirs.keys() == {"itc", "mlm", "itm", "metric/itm_accuracy"}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
    assert_same(
        gradients(model, lambda: total(model.losses(batch))), gradients(model, lambda: total(plain.losses(batch)))
    )


def test_every_parameter_learns_from_pairs() -> None:
    model = trained(replace(vlmo_tiny(), layer_scale=0.3))
    found = gradients(model, lambda: total(model.losses(batch_for(model.config))))
    assert found.keys() == dict(model.named_parameters()).keys()


def test_swapped_captions_are_negatives() -> None:
    model = trained(vlmo_tiny())
    batch = batch_for(model.config, [6, 6, 6])
    wrong = TextBatch(batch.texts.ids.flip(0), batch.texts.segments)
    losses = model.losses(replace(batch, swapped=wrong))
    images, texts, others = (
        model.encode_images(batch.squares),
        model.encode_texts(batch.texts),
        model.encode_texts(wrong),
    )
    memory, own = model.project_images(images.tokens), [0, 1, 2]
    assert isinstance(images.tokens, Tensor)
    drawn = model._draw(model.embed(batch), batch.draws).chosen.numpy()[0].tolist()
    logits = torch.cat(
        [
            model.match(memory, texts, own, own),
            model.match(memory, others, own, own),
            model.match(memory, texts, drawn[0] + own, own + drawn[1]),
        ]
    )
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1] * 3 + [0] * 9))
    torch.testing.assert_close(losses["itm"], expected)


def test_objectives_can_be_switched_off() -> None:
    config = vlmo_tiny()
    batch = batch_for(config, [6, 4])
    for off in ("itc", "itm", "mlm"):
        model = replace(config, **{off: False}, itc_fused=off != "itc").build()
        losses = {name for name in model.losses(batch) if not name.startswith("metric/")}
        assert losses == {"itc", "itm", "mlm"} - {off}
    only = replace(config, itm=False, mlm=False, itc_fused=False).build()
    assert list(only.losses(replace(batch, masked=None))) == ["itc"]
    with pytest.raises(ValueError, match="masked texts"):
        config.build().losses(replace(batch, masked=None))
    with pytest.raises(ValueError, match="itc_fused"):
        replace(config, itc=False)


def test_contrast_is_the_mean_of_both_forms() -> None:
    model = trained(vlmo_tiny())
    batch = batch_for(model.config)
    both = model.embed(batch)
    width = model.config.embed_dim
    each = []
    for form in (0, 1):
        part = replace(both, image=both.image.split(width, 1)[form], text=both.text.split(width, 1)[form])
        scale = (model.logit_scale, model.logit_scale_fused)[form]
        logits, target = scale.exp() * part.image @ part.text.T, torch.arange(len(batch))
        each.append(sum(torch.nn.functional.cross_entropy(x, target) for x in (logits, logits.T)) / 2)
    torch.testing.assert_close(model.contrast(both)["itc"], (each[0] + each[1]) / 2)
    assert abs(float((each[0] - each[1]).detach())) > 1e-3


def test_accumulation_sees_the_whole_batch_in_its_contrast() -> None:
    def step(parts: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = trained(replace(vlmo_tiny(), itm=False, mlm=False, drop_path=0.0))
        losses = Stepper(model, None, StepSettings(parts, 0, False))(batch_for(model.config), 0)
        return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    whole, halves = step(1), step(2)
    torch.testing.assert_close(halves[0]["itc"], whole[0]["itc"])
    assert_same(halves[1], whole[1])


def test_accumulation_repeats_stochastic_depth() -> None:
    """The features that the contrast is taken over are those that the backward pass makes again."""
    model = trained(replace(vlmo_tiny(), drop_path=0.5))
    seen: list[Tensor] = []
    embed = model.embed
    model.embed = lambda *a: seen.append(embed(*a)) or seen[-1]  # type: ignore[method-assign, assignment, func-returns-value]
    Stepper(model, None, StepSettings(2, 0, False))(batch_for(model.config), 0)
    first, again = [embedded.image for embedded in seen[:2]], [embedded.image for embedded in seen[2:]]
    torch.testing.assert_close(first, again)


def test_texts_alone_train_what_belongs_to_texts() -> None:
    model = trained(vlmo_tiny())
    batch = texts_alone(batch_for(model.config))
    train_only(model, ("embedding.*", "blocks.*.ffn.text.*", "mlm_*"))
    found = gradients(model, lambda: model.losses(batch)["mlm"])
    assert {name.split(".")[0] for name in found} == {"embedding", "blocks", "mlm_head", "mlm_words"}
    assert all(".ffn.text." in name for name in found if name.startswith("blocks."))
    assert model.embed(batch).image.shape == (len(batch), 0)
    halves = Stepper(model, None, StepSettings(2, 0, False))(batch, 0)
    assert list(halves) == ["mlm"]
    with pytest.raises(ValueError, match="texts alone"):
        replace(vlmo_tiny(), mlm=False).build().losses(batch)


def test_capabilities() -> None:
    for capability in (EncodesImages, EncodesTexts, Matches, Contrastive):
        assert "vlmo" in registry.families_with(capability)
    model = replace(vlmo_tiny(), itc=False, itc_fused=False, itm=False).build()
    with pytest.raises(ValueError, match="without ITC"):
        model.encode_texts(TextBatch.of([[2, 7, 3]]))
    with pytest.raises(ValueError, match="without ITM"):
        model.match(*[None] * 4)  # type: ignore[arg-type]


def test_pairs_in_any_order_and_number() -> None:
    model = trained(vlmo_tiny())
    batch = batch_for(model.config, [5, 8, 3])
    images, texts = model.encode_images(batch.squares), model.encode_texts(batch.texts)
    assert isinstance(images.tokens, Tensor)
    memory = model.project_images(images.tokens)
    grid = model.match(memory, texts, [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2] * 3).reshape(3, 3, 2)
    some = model.match(memory, texts, [2, 0, 2, 1], [1, 1, 0, 2])
    torch.testing.assert_close(some, torch.stack([grid[2, 1], grid[0, 1], grid[2, 0], grid[1, 2]]))


def test_wrong_sizes_are_refused() -> None:
    model = vlmo_tiny().build()
    with pytest.raises(ValueError, match="pictures of 64 x 64 pixels: resize them to 48 x 48"):
        model.encode_images(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="49 tokens"):
        model.encode_texts(TextBatch.of([[1] * 49]))
    with pytest.raises(ValueError, match="max_length"):
        replace(vlmo_tiny(), positions="absolute").build().encode_texts(TextBatch.of([[1] * 49]))


@pytest.mark.parametrize(
    ("config", "count"),
    [(vlmo_base(), 202_414_750), (vlmo_base_plus(), 184_980_734), (vlmo_large(), 599_086_142)],
)
def test_published_parameter_counts(config: VlmoConfig, count: int) -> None:
    """The official files hold a table of text positions beside the relative ones, which nothing reads: 40 x width."""
    with torch.device("meta"):
        model = config.build()
    assert sum(p.numel() for p in model.parameters()) == count


def test_small_is_small() -> None:
    assert sum(p.numel() for p in vlmo_small().build().parameters()) < 7_000_000


class FixedCopy:
    """Stands in for the copy to the host on a device that holds no values: pair b draws b + 1."""

    def __init__(self, chosen: Tensor) -> None:
        self.count = chosen.shape[2]

    def numpy(self) -> np.ndarray:
        after = (np.arange(self.count) + 1) % self.count
        return np.stack([after, after])[None]


def count_flops(loss: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return int(counter.get_total_flops())


def on_shapes(config: VlmoConfig, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[Vlmo, Batch]:
    monkeypatch.setattr(hard_pairs, "HostCopy", FixedCopy)
    monkeypatch.setattr(vlmo, "itc_loss", lambda image, text, scale, ids: (scale * image @ text.T).sum())  # no autocast
    batch = batch_for(config, lengths)
    with torch.device("meta"):
        model = replace(config, drop_path=0.0).build()
    return model.to("meta"), batch.to("meta")


def test_packed_step_saves_more_tflop_than_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLMo-base, texts of 10 tokens in place of 40 slots: 13 % are padding, the rest rows that nobody reads."""
    model, batch = on_shapes(vlmo_base(), [7, 8, 9, 10, 10, 11, 12, 13] * 8, monkeypatch)
    packed = count_flops(lambda: total(model.losses(batch)))
    plain = count_flops(lambda: total(PlainVlmo(model).losses(batch)))
    print(f"VLMo-base, 64 pairs: {packed / 1e12:.1f} TFLOP packed, {plain / 1e12:.1f} one forward an objective")
    assert 0.70 * plain < packed <= 0.87 * plain


def test_text_stage_tflop_has_logits_of_masked_positions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = on_shapes(vlmo_base(), [190] * 8, monkeypatch)
    batch = texts_alone(batch)
    assert batch.masked is not None
    segments = batch.texts.segments
    everywhere = replace(
        batch.masked, rows=torch.zeros(segments.total, dtype=torch.int64, device="meta"), counts=segments.lengths
    )
    few = count_flops(lambda: model.losses(batch)["mlm"])
    every = count_flops(lambda: model.fill_text_masks(everywhere, segments).sum())
    print(f"VLMo-base, 8 texts of 190 tokens: {few / 1e12:.2f} TFLOP, {every / 1e12:.2f} with logits everywhere")
    assert few < 0.85 * every


def test_retrieval_recalls_by_towers_and_reranks_by_pairs() -> None:
    """The official code has this and never calls it."""
    model = trained(vlmo_tiny()).eval()
    found = records(12)
    texts = [caption for record in found for caption in record.captions]
    tokenizer = Tokenizer.train_wordpiece(texts, 90, max_length=40, append_sep=True)
    result = evaluate_retrieval(
        model, tokenizer, found, RetrievalConfig(rerank=4, machine=Machine(image_block=5, pair_block=7, progress=False))
    )
    assert result.towers is not None
    assert result.reranked_lists is not None
    images = torch.stack([picture_loader(model.config.image.transform(None, False))(record) for record in found])
    with torch.no_grad():
        pictures = model.encode_images(images)
        words = model.encode_texts(TextBatch.of(tokenizer.encode(texts)))
        assert isinstance(pictures.tokens, Tensor)
        memory = model.project_images(pictures.tokens)
        for text in (0, 5, 17):
            nearest = (words.features[text] @ pictures.features.T).topk(4).indices
            scores = model.match(memory, words, nearest.tolist(), [text] * 4)[:, 1]
            order = nearest[scores.argsort(descending=True)]
            assert result.reranked_lists.found[text, :4].tolist() == order.tolist()
