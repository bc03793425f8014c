from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import Batch, TextBatch
from imglish.models import registry
from imglish.models.capabilities import Embedded, EncodesImages, EncodesTexts, Matches, Trainable
from imglish.models.clip import CONFIGS, Clip, ClipConfig, ResNetConfig, clip_tiny
from imglish.models.text_towers import TextConfig
from imglish.models.vit import CLIP_MEAN, CLIP_STD, ImageInput, VitConfig
from imglish.nn.segments import Segments

PUBLISHED = {
    "clip-vit-b-32": 151_277_313,
    "clip-vit-b-16": 149_620_737,
    "clip-vit-l-14": 427_616_513,
    "clip-vit-l-14-336": 427_944_193,
    "clip-rn50": 102_007_137,
    "clip-rn101": 119_688_033,
    "clip-rn50x4": 178_300_601,
    "clip-rn50x16": 290_979_217,
    "clip-rn50x64": 623_258_305,
    "openclip-vit-h-14": 986_109_441,
    "siglip-b-16": 203_155_970,
}
RESNET = replace(clip_tiny(), vision=ResNetConfig(ImageInput(64), (1, 1, 1, 1), 16, 4))
SIGLIP = replace(
    clip_tiny(),
    vision=VitConfig(image=ImageInput(48), patch=8, width=64, depth=2, heads=4, class_token=False),
    text=TextConfig(64, 2, 4, causal=False, pool="last", padded=True, pad_id=1, projection="bias"),
    max_length=12,
    pool="map",
    image_projection=False,
    loss="siglip",
    logit_bias=-10.0,
)
MEAN = replace(clip_tiny(), pool="mean", vision=replace(clip_tiny().vision, norm_after=False))


def texts() -> TextBatch:
    return TextBatch.of([[1, 5, 6, 7, 2], [1, 9, 2], [1, 4, 4, 4, 4, 4, 2], [1, 8, 3, 2]])


def batch(config: ClipConfig, ids: tuple[int, ...] = (0, 1, 2, 3)) -> Batch:
    side = config.image.size
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, texts(), torch.tensor(ids), torch.zeros(4, 2))


def build(config: ClipConfig) -> Clip:
    torch.manual_seed(0)
    return config.build()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = CONFIGS[name]().build()
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_survive_json(name: str) -> None:
    config = CONFIGS[name]()
    assert registry.from_dict("clip", json.loads(json.dumps(registry.to_dict(config)))) == config


def test_defaults_are_vit_b_32() -> None:
    assert ClipConfig() == CONFIGS["clip-vit-b-32"]()


@pytest.mark.parametrize("config", [clip_tiny(), RESNET, SIGLIP, MEAN], ids=["vit", "resnet", "siglip", "mean"])
def test_every_parameter_is_trained(config: ClipConfig) -> None:
    model = build(config)
    losses = model(batch(config))
    sum(v for k, v in losses.items() if not k.startswith("metric/")).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    # a residual block of the ResNet starts as the identity, so its convolutions have a zero gradient, but they have one
    assert without == []


@pytest.mark.parametrize("config", [clip_tiny(), SIGLIP], ids=["causal", "padded"])
def test_a_text_alone_equals_the_text_in_a_batch(config: ClipConfig) -> None:
    model = build(config).eval()
    together = model.encode_texts(texts()).features
    assert together.shape == (4, config.embed_dim)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    flat, bounds = texts().ids, texts().segments.bounds
    for i in range(4):
        alone = model.encode_texts(TextBatch.of([flat[bounds[i] : bounds[i + 1]].tolist()])).features
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-6)


def test_packed_texts_equal_padded_ones() -> None:
    """A causal tower gives the same vector however much padding follows the end token."""
    model = build(clip_tiny()).eval()
    rows = model.text_proj(model.text(texts()))[texts().segments.ends(torch.device("cpu"))]
    torch.testing.assert_close(model.project_text(texts()), rows, rtol=1e-5, atol=1e-6)
    ids = torch.zeros(4, 10, dtype=torch.int64)
    for i, (start, length) in enumerate(zip(texts().segments.bounds[:-1], texts().segments.lengths, strict=True)):
        ids[i, :length] = texts().ids[start : start + length]
    padded = model.text(TextBatch(ids.flatten(), Segments.equal(4, 10))).unflatten(0, (4, 10))
    ends = [length - 1 for length in texts().segments.lengths]
    expected = model.text_proj(padded[range(4), ends])
    torch.testing.assert_close(model.project_text(texts()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", ["end", "first", "last"])
@pytest.mark.parametrize("padded", [True, False])
def test_text_pooling_reads_one_row_of_the_full_computation(causal: bool, pool: str, padded: bool) -> None:
    if pool == "last" and not padded:
        with pytest.raises(ValueError, match="last row of padded texts"):
            replace(clip_tiny(), text=TextConfig(64, 2, 4, pool="last"))
        return
    text = TextConfig(64, 2, 4, causal=causal, pool=pool, padded=padded, pad_id=3)
    model = build(replace(clip_tiny(), text=text, max_length=9)).eval()
    lists = [texts().ids[a:b].tolist() for a, b in zip(texts().segments.bounds, texts().segments.bounds[1:])]
    filled = [x + [3] * (9 - len(x)) if padded else x for x in lists]
    full = model.text(TextBatch.of(filled))
    starts = Segments.of(len(x) for x in filled).bounds[:-1]
    place = {"end": [len(x) - 1 for x in lists], "first": [0] * 4, "last": [8] * 4}[pool]
    torch.testing.assert_close(model.text.pooled(texts()), full[torch.tensor(starts + place)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [clip_tiny(), RESNET, SIGLIP], ids=["vit", "resnet", "siglip"])
def test_bytes_are_normalised_in_the_tower(config: ClipConfig) -> None:
    model = build(config).eval()
    images = batch(config).images
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    assert (config.image.mean, config.image.std) == (CLIP_MEAN, CLIP_STD)
    by_hand = (images / 255 - mean) / std
    features = model.encode_images(images).features
    torch.testing.assert_close(features, model.encode_images(by_hand).features, rtol=1e-4, atol=1e-5)
    assert "mean" not in " ".join(name for name in model.state_dict() if "running" not in name)


def test_mean_pooling_leaves_the_class_token_out() -> None:
    model = build(MEAN).eval()
    images = batch(MEAN).images
    tokens = model.vision(images)
    expected = model.image_proj(model.image_norm(tokens[:, 1:].mean(1)))
    torch.testing.assert_close(model.project_image(images), expected)
    assert isinstance(model.image_norm, nn.LayerNorm)
    assert isinstance(model.vision.norm, nn.Identity)


def test_losses_by_hand() -> None:
    for loss in ("itc", "siglip", "hinge"):
        config = replace(clip_tiny(), loss=loss, logit_bias=-1.0 if loss == "siglip" else None)
        model = build(config).eval()
        data = batch(config)
        similarity = model.encode_images(data.images).features @ model.encode_texts(data.texts).features.T
        logits = similarity / config.temperature
        if loss == "itc":
            target = torch.arange(4)
            expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        elif loss == "siglip":
            expected = -F.logsigmoid((2 * torch.eye(4) - 1) * (logits - 1)).sum() / 4
        else:
            cost = (0.2 + similarity - similarity.diagonal()[:, None]).clamp(min=0).fill_diagonal_(0)
            cost_t = (0.2 + similarity.T - similarity.diagonal()[:, None]).clamp(min=0).fill_diagonal_(0)
            expected = cost.amax(1).mean() + cost_t.amax(1).mean()
        torch.testing.assert_close(model.losses(data)[loss], expected)


def test_captions_of_one_picture_are_positives() -> None:
    model = build(clip_tiny())
    distinct, same = (model.losses(batch(clip_tiny(), ids))["itc"] for ids in ((0, 1, 2, 3), (0, 1, 0, 3)))
    assert not torch.allclose(distinct, same)


def test_chunked_loss_is_the_same() -> None:
    dense, chunked = build(clip_tiny()), build(replace(clip_tiny(), chunk=3))
    grads = []
    for model in (dense, chunked):
        model.losses(batch(clip_tiny()))["itc"].backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_feature_gradients_replace_the_contrast() -> None:
    """Gradients with respect to features, carried through the towers later, are the gradients of one backward pass."""
    model, data = build(clip_tiny()), batch(clip_tiny())
    model.losses(data)["itc"].backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    embedded = model.embed(data)
    image, text = (x.detach().requires_grad_() for x in (embedded.image, embedded.text))
    model.contrast(Embedded(image, text, data.image_ids))["itc"].backward()
    grads = Embedded(image.grad, text.grad, data.image_ids)
    sum(model.losses(data, feature_grads=grads).values()).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=1e-4, atol=1e-6)


def test_logit_scale_starts_at_the_temperature_and_stays_below_100() -> None:
    model = build(clip_tiny())
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert float(model.losses(batch(clip_tiny()))["metric/logit_scale"]) == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    model.clamp_()
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    assert model.logit_scale.requires_grad


def test_initial_weights_follow_the_paper() -> None:
    model = build(replace(clip_tiny(), text=TextConfig(256, 8, 4), vocab_size=5000))
    block = model.text.blocks[0]
    wanted = {
        model.text.words.weight: 0.02,
        model.text.positions: 0.01,
        block.attn.qkv.weight: 256**-0.5,
        block.attn.out.weight: 256**-0.5 * 16**-0.5,
        block.mlp.fc1.weight: 512**-0.5,
        block.mlp.fc2.weight: 256**-0.5 * 16**-0.5,
        model.text_proj.weight: 256**-0.5,
        model.vision.blocks[0].attn.qkv.weight: 64**-0.5,
        model.vision.blocks[0].mlp.fc2.weight: 64**-0.5 * 6**-0.5,
    }
    for weight, std in wanted.items():
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.03)
    assert float(block.attn.qkv.bias.abs().max()) == 0
    resnet = build(RESNET)
    assert all(float(m.bn3.weight.abs().max()) == 0 for stage in resnet.vision.stages for m in stage)


def test_capabilities() -> None:
    model = build(clip_tiny())
    assert isinstance(model, EncodesImages)
    assert isinstance(model, EncodesTexts)
    assert isinstance(model, Trainable)
    assert not isinstance(model, Matches)
    assert model.make_teacher() is None


def test_impossible_settings_are_refused() -> None:
    tiny = clip_tiny()
    with pytest.raises(ValueError, match="class_token"):
        replace(tiny, vision=replace(tiny.vision, class_token=False))
    with pytest.raises(ValueError, match=r"vision\.width 64 must be embed_dim"):
        replace(tiny, image_projection=False, embed_dim=32)
    with pytest.raises(ValueError, match=r"text\.width 64 must be embed_dim 32"):
        replace(tiny, text=replace(tiny.text, projection="none"), embed_dim=32)
    with pytest.raises(ValueError, match="temperature is 0"):
        replace(tiny, temperature=0.0)
    long = TextBatch(torch.zeros(60, dtype=torch.int64), Segments.of([60]))
    with pytest.raises(ValueError, match="a text has 60 tokens, the model takes 48"):
        build(tiny).encode_texts(long)
    with pytest.raises(ValueError, match="a text has 60 tokens, the model takes 12"):
        build(SIGLIP).encode_texts(long)
    wrong: Tensor = torch.zeros(1, 3, 96, 96)
    with pytest.raises(ValueError, match="resize them"):
        build(RESNET).encode_images(wrong)
