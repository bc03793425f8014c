"""CoCa: the packed step computes what the plain one computes, each picture once, and no more than it must."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imglish.data.batch import Batch, TextBatch
from imglish.models import registry
from imglish.models.capabilities import Captions, EncodesImages, EncodesTexts, Matches, Trainable
from imglish.models.coca import CONFIGS, Coca, CocaConfig, coca_base, coca_tiny
from imglish.nn.attention import CrossAttention
from imglish.nn.blocks import Block
from imglish.nn.segments import Segments
from imglish.training.step import Stepper, StepSettings

OPEN_CLIP = replace(coca_tiny(), pool="shared", cross="separate", projection=True, embed_dim=32)
VARIANTS = {"paper": coca_tiny(), "parallel": replace(coca_tiny(), pool="parallel"), "open_clip": OPEN_CLIP}
LENGTHS = [9, 3, 12, 5, 7, 4, 6, 8, 2, 10, 5, 11]


def make_batch(config: CocaConfig, lengths: list[int], captions: int = 1, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    texts = TextBatch.of([torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in lengths])
    count, size = len(lengths) // captions, config.image.size
    return Batch(
        images=torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8),
        texts=texts,
        image_ids=torch.arange(count),
        draws=torch.rand(count, 2, generator=generator),
        captions=captions,
    )


def trained(config: CocaConfig) -> Coca:
    torch.manual_seed(0)
    model = config.build()
    with torch.no_grad():  # away from the small initial weights, so that every path matters
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.8 / parameter.shape[-1] ** 0.5)
    return model


# ---- the step, written down one text at a time ----------------------------------------------------------------------


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def dense_self(block: Block, x: Tensor) -> Tensor:
    """Causal self-attention of one sequence ``(n, D)`` by an explicit matrix."""
    q, k, v = (heads(part, block.attn.heads) for part in block.attn.qkv(block.norm1(x)).chunk(3, dim=-1))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
    return x + block.attn.out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


def dense_cross(cross: CrossAttention, asked: Tensor, tokens: Tensor) -> Tensor:
    k, v = (heads(part, cross.heads) for part in cross.kv(tokens).chunk(2, dim=-1))
    q = heads(cross.q(asked), cross.heads)
    return cross.out(((q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(0, 1).flatten(1))


def dense_logits(model: Coca, states: Tensor, tokens: Tensor) -> Tensor:
    """The upper half over one text ``(n, D)`` and its picture's caption tokens ``(Q, D)``, every position."""
    x = states
    for layer in model.layers:
        block = layer.block
        x = dense_self(block, x)
        if layer.cross is None:
            x = x + dense_cross(block.cross, block.norm_cross(x), tokens)
            x = x + block.mlp(block.norm2(x))
        else:
            x = x + block.mlp(block.norm2(x))
            x = x + dense_cross(layer.cross.cross, layer.cross.norm1(x), layer.cross.norm_memory(tokens))
            x = x + layer.cross.mlp(layer.cross.norm2(x))
    return model.head(model.norm(x))


def plain_losses(model: Coca, batch: Batch) -> dict[str, Tensor]:
    """Equation 4 one pair at a time: the picture is encoded anew for each of its captions."""
    bounds, text = batch.texts.segments.bounds, model.text
    image_features, text_features, nats = [], [], []
    for number, (start, end) in enumerate(pairwise(bounds)):
        ids = batch.texts.ids[start:end]
        pooled, tokens = model.pool_images(batch.images[number // batch.captions][None])
        x = torch.cat([text.words(ids) + text.positions[: len(ids)], (text.cls + text.positions[-1])[None]])
        for block in text.blocks:
            x = dense_self(block, x)
            x = x + block.mlp(block.norm2(x))
        image_features.append(F.normalize(model.image_proj(pooled[0]), dim=-1))
        text_features.append(F.normalize(model.text_proj(text.norm(x[-1])), dim=-1))
        logits = dense_logits(model, x[:-1], tokens[0])
        nats.append(F.cross_entropy(logits[:-1], ids[1:], reduction="none"))
    similarity = torch.stack(image_features)[:: batch.captions] @ torch.stack(text_features).T * model.logit_scale.exp()
    mine = torch.arange(len(batch)).repeat_interleave(batch.captions)
    target = (torch.arange(len(batch))[:, None] == mine).float()
    i2t = F.cross_entropy(similarity, target / batch.captions)
    t2i = F.cross_entropy(similarity.T, mine)
    config = model.config
    itc, caption = (i2t + t2i) / 2 * config.contrastive_weight, torch.cat(nats).mean() * config.caption_weight
    return {"itc": itc, "caption": caption}


def gradients(model: Coca, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    sum(v for k, v in losses.items() if not k.startswith("metric/")).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("captions", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_step_equals_plain_step(variant: str, captions: int) -> None:
    model = trained(replace(VARIANTS[variant], contrastive_weight=0.7))
    batch = make_batch(model.config, LENGTHS, captions)
    packed, plain = model.losses(batch), plain_losses(model, batch)
    for name, value in plain.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed["metric/token_nats"] * 2, packed["caption"].detach())
    close(gradients(model, packed), gradients(model, plain))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_trained(variant: str) -> None:
    model = VARIANTS[variant].build()
    found = gradients(model, model.losses(make_batch(model.config, LENGTHS, 2)))
    assert {name for name, _ in model.named_parameters()} == set(found)
    assert all(torch.isfinite(gradient).all() and gradient.abs().max() > 0 for gradient in found.values())


def test_texts_of_one_token_have_nothing_to_predict() -> None:
    model = trained(coca_tiny())
    batch = make_batch(model.config, [1, 4, 1, 1])
    torch.testing.assert_close(model.losses(batch)["caption"], plain_losses(model, batch)["caption"])
    nothing = model.losses(make_batch(model.config, [1, 1]))
    assert float(nothing["caption"].detach()) == 0


def test_one_loss_alone() -> None:
    batch = make_batch(coca_tiny(), LENGTHS[:4])
    for name, other in (("contrastive_weight", "caption"), ("caption_weight", "itc")):
        losses = replace(coca_tiny(), **{name: 0.0}).build().losses(batch)
        assert [key for key in losses if not key.startswith("metric/")] == [other]


# ---- initial weights ------------------------------------------------------------------------------------------------


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds no numbers, so that a parameter without initialisation shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_initialised(variant: str) -> None:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        model = VARIANTS[variant].build()
    norms = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        assert torch.isfinite(value).all(), f"{name} was never written"
        if name in norms:
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        elif name != "logit_scale":
            assert 0.001 < float(value.std()) < 1.5, f"{name} has a deviation of {float(value.std())}"


def test_initial_deviations() -> None:
    model = replace(coca_tiny(), width=256, embed_dim=256, pool_heads=8, vocab_size=4000, projection=True).build()
    layer, pool = model.layers[0].block, model.caption_pool
    wanted = {
        model.text.words.weight: 0.02,
        model.head.weight: 0.02,
        model.text.positions: 0.01,
        model.text.blocks[1].attn.qkv.weight: 256**-0.5,
        layer.attn.out.weight: 256**-0.5 * 8**-0.5,
        layer.cross.q.weight: 256**-0.5,
        layer.cross.kv.weight: 256**-0.5,
        layer.cross.out.weight: 256**-0.5 * 8**-0.5,
        layer.mlp.fc1.weight: 512**-0.5,
        layer.mlp.fc2.weight: 256**-0.5 * 8**-0.5,
        pool.queries: 1.0,
        pool.kv.weight: 64**-0.5,
        pool.out.weight: 256**-0.5,
        model.image_proj.weight: 256**-0.5,
        model.vision.blocks[0].mlp.fc2.weight: 64**-0.5 * 6**-0.5,
    }
    for weight, std in wanted.items():
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.04)
    assert float(model.logit_scale.detach().exp()) == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_begin_at_chance_and_fall(variant: str) -> None:
    torch.manual_seed(0)
    model = VARIANTS[variant].build()
    batch = make_batch(model.config, LENGTHS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    seen = []
    for _ in range(25):
        losses = model.losses(batch)
        seen.append({name: float(value.detach()) for name, value in losses.items()})
        optimiser.zero_grad()
        (losses["itc"] + losses["caption"]).backward()
        optimiser.step()
        model.clamp_()
    assert seen[0]["metric/token_nats"] == pytest.approx(math.log(500), abs=0.15)
    assert seen[0]["itc"] == pytest.approx(math.log(12), abs=1.5)
    assert seen[-1]["metric/token_nats"] < 0.5 * seen[0]["metric/token_nats"]
    assert seen[-1]["itc"] < 0.5 * seen[0]["itc"]


# ---- sizes ----------------------------------------------------------------------------------------------------------

TABLE_1 = {"coca-base": (86e6, 297e6, 383e6), "coca-large": (303e6, 484e6, 787e6), "coca-2b": (1.0e9, 1.18e9, 2.19e9)}
"""Image encoder, decoder and both; the paper prints 1 B, 1.1 B and 2.1 B for the last."""


@pytest.mark.parametrize("name", TABLE_1)
def test_published_parameter_counts(name: str) -> None:
    """The paper's counts are without poolers, of which the table says nothing."""
    with torch.device("meta"):
        model = CONFIGS[name]().build()
    sizes = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    decoder = sizes["text"] + sizes["layers"] + sizes["norm"] + sizes["head"]
    for actual, published in zip((sizes["vision"], decoder, sizes["vision"] + decoder), TABLE_1[name], strict=True):
        assert actual == pytest.approx(published, rel=0.015)
    pools = sizes["caption_pool"] + sizes["contrast_pool"]
    assert sum(p.numel() for p in model.parameters()) == sizes["vision"] + decoder + pools + 1


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_survive_json(name: str) -> None:
    config = CONFIGS[name]()
    assert registry.from_dict("coca", json.loads(json.dumps(registry.to_dict(config)))) == config
    assert registry.named(name) == config


def test_small_and_tiny_are_small() -> None:
    for name, most in (("coca-small", 6e6), ("coca-tiny", 0.6e6)):
        with torch.device("meta"):
            assert sum(p.numel() for p in CONFIGS[name]().build().parameters()) < most


# ---- cost -----------------------------------------------------------------------------------------------------------


def step_flops(config: CocaConfig, pictures: int, captions: int, tokens: int) -> float:
    """FLOPs (2 a multiply-add) of forward and backward on shapes alone."""
    batch = make_batch(config, [tokens] * pictures * captions, captions)
    with torch.device("meta"):
        model = config.build()
    with FlopCounterMode(display=False) as counter:
        losses = model.losses(batch.to("meta"))
        (losses["itc"] + losses["caption"]).backward()
    return float(counter.get_total_flops())


def picture_flops(config: CocaConfig, pictures: int) -> float:
    """FLOPs of forward and backward of encoding pictures and projecting their keys and values, alone."""
    batch = make_batch(config, [2] * pictures)
    with torch.device("meta"):
        model = config.build()
    with FlopCounterMode(display=False) as counter:
        pooled, tokens = model.pool_images(batch.to("meta").squares)
        memory = model.project_images(tokens)
        (pooled.sum() + sum(x.sum() for layer in memory.layers for x in layer)).backward()
    return float(counter.get_total_flops())


def test_a_picture_is_encoded_once_for_all_its_captions_tflop() -> None:
    config = coca_base()
    one, five = (step_flops(config, 16, captions, 14) for captions in (1, 5))
    picture = picture_flops(config, 16)
    text = one - picture
    print(
        f"CoCa-Base, 16 pictures, 288 px, 14 tokens: {one / 1e12:.2f} TFLOP with one caption, {five / 1e12:.2f} with "
        f"five (encoding the picture for each: {5 * one / 1e12:.2f}); a picture costs {picture / one:.0%} of a pair"
    )
    assert five == pytest.approx(picture + 5 * text, rel=0.01)
    assert five < 0.4 * 5 * one


def test_nothing_is_computed_for_padding_tflop() -> None:
    """open_clip fills texts up to 76 tokens and makes logits for all of them."""
    config = CONFIGS["openclip-coca-vit-b-32"]()
    packed, filled = (step_flops(config, 16, 1, tokens) for tokens in (14, 76))
    print(f"coca_ViT-B-32, 16 pairs of 14 tokens: {packed / 1e12:.3f} TFLOP (filled to 76: {filled / 1e12:.3f})")
    assert packed < 0.5 * filled


def test_logits_are_made_for_positions_with_a_target_only() -> None:
    model = trained(coca_tiny())
    rows: list[int] = []
    model.norm.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    model.losses(make_batch(model.config, LENGTHS))
    assert rows == [sum(LENGTHS) - len(LENGTHS)]


def test_chunks_change_nothing() -> None:
    batch, results = make_batch(coca_tiny(), LENGTHS, 2), []
    for chunk in (None, 5):
        model = trained(replace(coca_tiny(), chunk=chunk))
        losses = model.losses(batch)
        results.append(gradients(model, losses) | {"loss": losses["caption"].detach()})
    close(results[1], results[0])


# ---- encoders and captions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_text_alone_equals_the_text_in_a_batch(variant: str) -> None:
    model = trained(VARIANTS[variant]).eval()
    batch = make_batch(model.config, LENGTHS)
    together = model.encode_texts(batch.texts).features
    torch.testing.assert_close(together, model.embed(batch).text)
    bounds = batch.texts.segments.bounds
    for number, (start, end) in enumerate(pairwise(bounds)):
        alone = model.encode_texts(TextBatch.of([batch.texts.ids[start:end].tolist()])).features
        torch.testing.assert_close(alone[0], together[number], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_continued_captions_equal_whole_ones(variant: str) -> None:
    """Logits token by token from the caches, for several sequences a picture, against the whole text at once."""
    model = trained(VARIANTS[variant]).eval()
    batch = make_batch(model.config, [6] * 4, captions=2)
    images = model.encode_images(batch.squares)
    state = model.start_captions(images, 8)
    ids = batch.texts.ids.view(4, 6)
    with torch.no_grad():
        found = [model.continue_captions(state, TextBatch.of(ids[::2, :2].tolist()))]  # one prompt a picture
        state.select([0, 0, 1, 1])
        given = torch.cat([ids[[0, 0, 2, 2], :2], ids[:, 2:]], 1)
        for position in range(2, 6):
            found.append(model.continue_captions(state, TextBatch.of(given[:, position : position + 1].tolist())))
        texts = TextBatch.of(given.tolist())
        rows, _ = model.text(texts)
        memory = model.project_images(images.tokens)
        whole = model.head(model.decode(rows, texts.segments, memory, Segments.equal(2, 2))).view(4, 6, -1)
    torch.testing.assert_close(found[0], whole[::2, 1], rtol=1e-4, atol=1e-4)
    for position in range(2, 6):
        torch.testing.assert_close(found[position - 1], whole[:, position], rtol=1e-4, atol=1e-4)


def test_capabilities() -> None:
    model = coca_tiny().build()
    for capability in (EncodesImages, EncodesTexts, Trainable, Captions):
        assert isinstance(model, capability)
    assert not isinstance(model, Matches)
    assert model.caption_form().longest == 48


def test_impossible_settings_are_refused() -> None:
    tiny = coca_tiny()
    for change, message in (
        ({"embed_dim": 32}, "without projection, embed_dim 32 must be width 64"),
        ({"pool": "shared", "queries": 1}, "at least two queries"),
        ({"vision": replace(tiny.vision, norm_after=True)}, "norm_after must be false"),
        ({"multimodal_depth": 0}, "at least one layer"),
        ({"temperature": 0.0}, "temperature is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(tiny, **change)
    with pytest.raises(ValueError, match="a text has 49 tokens, the model takes 48"):
        tiny.build().encode_texts(TextBatch.of([[1] * 49]))
    with pytest.raises(ValueError, match="not a multiple of 5 heads"):
        replace(tiny, pool_heads=5).build()


# ---- accumulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [1, 3])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_exact(parts: int, captions: int) -> None:
    """Contrast over the whole batch, and the caption loss a mean over all its tokens, however long each part is."""
    lengths = [3, 2, 3, 4, 3, 3, 12, 14, 11, 13, 12, 12]
    results = []
    for count in (1, parts):
        model = trained(coca_tiny())
        batch = make_batch(model.config, lengths if captions == 3 else lengths[2:10], captions)
        if captions == 3:
            batch = replace(batch, image_ids=torch.tensor([0, 1, 0, 2]))
        losses = Stepper(model, None, StepSettings(count, seed=0, autocast=False))(batch, 0)
        results.append((losses, {n: p.grad for n, p in model.named_parameters()}))
    (whole_losses, whole), (losses, accumulated) = results
    for name in ("itc", "caption", "metric/token_nats"):
        torch.testing.assert_close(losses[name], whole_losses[name], rtol=1e-5, atol=1e-6)
    close(accumulated, whole)
