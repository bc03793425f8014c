"""Dual encoders of the older taxonomy: their towers, the momentum contrast, and training on real photographs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.data.batch import Batch, TextBatch
from imglish.data.records import Record
from imglish.data.scenes import SceneConfig, SceneSource
from imglish.data.sources import open_source
from imglish.models import registry
from imglish.models.clip import Clip, ClipConfig, EfficientNetConfig, ResNetConfig, clip_tiny
from imglish.models.dual import CONFIGS, align_base
from imglish.models.text_towers import BertConfig, GruConfig, steps
from imglish.models.vit import ImageInput
from imglish.nn.segments import Segments
from imglish.objectives.momentum import MomentumTeacher, TeacherConfig
from imglish.training.config import recipe_from
from imglish.training.step import Stepper, StepSettings, split
from imglish.training.trainer import train
from tests.ranks import run_ranks

PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "shared" / "data" / "flickr8k"
LENGTHS = [5, 2, 7, 4, 3, 6]

SMALL = ImageInput(32)
VSEPP = replace(
    clip_tiny(), vision=ResNetConfig(SMALL, (1, 1, 1, 1), 8, 4), text=GruConfig(20, 24), embed_dim=24, loss="hinge"
)
ALIGN = replace(
    clip_tiny(), vision=EfficientNetConfig(SMALL, 0.25, 0.3, None), text=BertConfig(32, 2, 2, 64, dropout=0.0)
)
WENLAN = replace(
    clip_tiny(),
    text=BertConfig(32, 2, 2, 64, dropout=0.0),
    teacher=TeacherConfig(momentum=0.9, queue_size=10, alpha=0.0, ramp_epochs=0.0),
)
TINY = {"vsepp": VSEPP, "align": ALIGN, "wenlan": WENLAN}


def texts_of(lengths: Sequence[int]) -> TextBatch:
    generator = torch.Generator().manual_seed(1)
    return TextBatch.of([torch.randint(0, 500, (n,), generator=generator).tolist() for n in lengths])


def make_batch(config: ClipConfig, lengths: Sequence[int] = LENGTHS) -> Batch:
    generator, count, side = torch.Generator().manual_seed(0), len(lengths), config.image.size
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return Batch(images, texts_of(lengths), torch.arange(count), torch.zeros(count, 2))


def build(config: ClipConfig) -> Clip:
    torch.manual_seed(0)
    return config.build()


# ---- towers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_text_alone_equals_the_text_in_a_batch(name: str) -> None:
    model, texts = build(TINY[name]).eval(), texts_of(LENGTHS)
    together = model.encode_texts(texts).features
    torch.testing.assert_close(together.norm(dim=1), torch.ones(6))
    for number, (start, end) in enumerate(pairwise(texts.segments.bounds)):
        alone = model.encode_texts(TextBatch.of([texts.ids[start:end].tolist()])).features
        torch.testing.assert_close(alone[0], together[number], rtol=1e-4, atol=1e-6)


def test_the_recurrent_tower_reads_tokens_in_order_up_to_the_last() -> None:
    tower, texts = build(VSEPP).text, texts_of(LENGTHS)
    states = tower.pooled(texts)
    for number, (start, end) in enumerate(pairwise(texts.segments.bounds)):
        _, last = tower.gru(tower.words(texts.ids[start:end])[:, None])
        torch.testing.assert_close(states[number], last[0, 0], rtol=1e-5, atol=1e-6)
    packed = steps(torch.arange(27.0)[:, None], texts.segments)
    assert packed.batch_sizes.tolist() == [6, 6, 5, 4, 3, 2, 1]  # no step is computed for a text that has ended
    with pytest.raises(ValueError, match="at least one token"):
        steps(torch.zeros(2, 1), Segments.of([2, 0]))


def test_the_bert_tower_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AlignTextConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48
    )
    theirs = transformers.AlignTextModel(config, add_pooling_layer=False).eval()
    ours = BertConfig(24, 2, 3, 48).build(50, config.max_position_embeddings).eval()
    state = dict(theirs.state_dict())
    found: dict[str, Tensor] = {}
    for name in ours.state_dict():
        kind, _, rest = name.partition(".")
        if kind == "embedding":
            part, leaf = rest.split(".")
            table = {"words": "word_embeddings", "positions": "position_embeddings", "types": "token_type_embeddings"}
            found[name] = state[f"embeddings.{table.get(part, 'LayerNorm')}.{leaf}"]
            continue
        number, part, *inner, leaf = rest.split(".")
        layer = f"encoder.layer.{number}."
        if inner == ["qkv"]:
            parts = [state[f"{layer}attention.self.{x}.{leaf}"] for x in ("query", "key", "value")]
            found[name] = torch.cat(parts)
        else:
            place = {
                "attn": "attention.output.dense",
                "norm1": "attention.output.LayerNorm",
                "norm2": "output.LayerNorm",
            }
            inside = {"fc1": "intermediate.dense", "fc2": "output.dense"}
            found[name] = state[layer + (inside[inner[0]] if part == "mlp" else place[part]) + f".{leaf}"]
    ours.load_state_dict(found)
    ids = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).last_hidden_state[:, 0]
    torch.testing.assert_close(ours.pooled(TextBatch.of(ids.tolist())), expected, rtol=1e-4, atol=1e-5)


def test_align_base_has_as_many_parameters_as_transformers_gives_it() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs, ours = transformers.AlignModel(transformers.AlignConfig()), align_base().build()
    pooler = sum(p.numel() for name, p in theirs.named_parameters() if "text_model.pooler" in name)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) - pooler


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_survive_json(name: str) -> None:
    config = CONFIGS[name]()
    assert registry.from_dict("clip", json.loads(json.dumps(registry.to_dict(config)))) == config
    assert registry.named(name) == config
    with torch.device("meta"):
        count = sum(p.numel() for p in config.build().parameters())
    assert 3.5e6 < count < 5.5e6 if name.endswith("small") else count > 40e6


def test_every_parameter_is_trained() -> None:
    for config in TINY.values():
        model = build(config)
        teacher = model.make_teacher()
        sum(v for k, v in model.losses(make_batch(config), teacher).items() if not k.startswith("metric/")).backward()
        unused = {"logit_scale"} if config.loss == "hinge" else set()
        unused |= {"text.embedding.types.weight"} & {n for n, p in model.named_parameters() if p.grad is None}
        assert {n for n, p in model.named_parameters() if p.grad is None} == unused


# ---- momentum contrast ----------------------------------------------------------------------------------------------


def with_queue(model: Clip) -> MomentumTeacher[Clip]:
    teacher = model.make_teacher()
    assert teacher is not None
    assert teacher.queue is not None
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.mul_(1.05)
    generator = torch.Generator().manual_seed(5)
    image, text = F.normalize(torch.randn(2, 4, 64, generator=generator), dim=-1)
    teacher.queue.push(image, text, torch.tensor([50, 51, 52, 53]))
    return teacher


def test_momentum_contrast_by_hand() -> None:
    """InfoNCE of each feature with momentum features of the other side: its pair's, the batch's, the queue's."""
    model = build(WENLAN)
    teacher, batch = with_queue(model), make_batch(WENLAN)
    assert teacher.queue is not None
    loss = model.losses(batch, teacher)["itc"]
    image, text = model.encode_images(batch.squares).features, model.encode_texts(batch.texts).features
    image_m = teacher.model.encode_images(batch.squares).features.detach()
    text_m = teacher.model.encode_texts(batch.texts).features.detach()
    own = torch.arange(6)
    i2t = image @ torch.cat([text_m, teacher.queue.text[:4]]).T / 0.07
    t2i = text @ torch.cat([image_m, teacher.queue.image[:4]]).T / 0.07
    torch.testing.assert_close(loss, (F.cross_entropy(i2t, own) + F.cross_entropy(t2i, own)) / 2)
    loss.backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    before = teacher.model.text_proj.weight.clone()
    teacher.update(model)
    torch.testing.assert_close(teacher.model.text_proj.weight, before.lerp(model.text_proj.weight, 0.1))
    torch.testing.assert_close(teacher.queue.text[4:10], text_m)
    with pytest.raises(ValueError, match="make_teacher"):
        model.losses(batch)


def gradients(parts: int) -> tuple[Tensor, dict[str, Tensor]]:
    model = build(WENLAN)
    teacher = with_queue(model)
    losses = Stepper(model, teacher, StepSettings(parts, seed=0, autocast=False))(make_batch(WENLAN), 0)
    return losses["itc"], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


def test_momentum_contrast_is_exact_with_accumulation() -> None:
    (whole_loss, whole), (loss, accumulated) = gradients(1), gradients(3)
    torch.testing.assert_close(loss, whole_loss)
    close(accumulated, whole)


def on_rank(rank: int, ranks: int) -> dict[str, Tensor]:
    model = build(WENLAN)
    teacher = with_queue(model)
    model.losses(split(make_batch(WENLAN), ranks)[rank], teacher)["itc"].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_momentum_contrast_does_not_depend_on_the_number_of_processes() -> None:
    alone, ranks = on_rank(0, 1), run_ranks(2, on_rank, 2)
    close({name: (ranks[0][name] + ranks[1][name]) / 2 for name in alone}, alone)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="goes with loss=\"itc\", not with 'hinge'"):
        replace(WENLAN, loss="hinge")
    with pytest.raises(ValueError, match="embed_dim must be the tower's"):
        replace(ALIGN, image_projection=False).build()
    assert not WENLAN.several_captions
    assert VSEPP.several_captions


# ---- training on real photographs, and on drawn scenes with Chinese captions ----------------------------------------


def photographs(count: int) -> list[Record]:
    if not PHOTOGRAPHS.is_dir():
        pytest.skip("the photographs of Flickr8k are not on this machine")
    images = str(PHOTOGRAPHS / "images")
    return list(open_source(PHOTOGRAPHS / "captions.jsonl", images=images, split="train")[:count])


def chinese_scenes(count: int) -> list[Record]:
    return SceneSource(SceneConfig(scenes=count, languages=("zh",), seed=3)).training()


@pytest.mark.parametrize(
    ("name", "data"),
    [("vsepp-small", photographs), ("align-small", photographs), ("wenlan-small", chinese_scenes)],
    ids=["vsepp", "align", "wenlan"],
)
def test_a_few_steps_of_training(name: str, data: Any, tmp_path: Path) -> None:
    recipe = recipe_from(
        {
            "model": {"name": name, **({"teacher": {"queue_size": 16}} if name.startswith("wenlan") else {})},
            "output": str(tmp_path / "run"),
            "data": {"workers": 0, "crop": None, "flip": False},
            "tokenizer": {"vocab_size": 300, "append_sep": True},
            "batch": {"size": 16},
            "optimiser": {"lr": 1e-3},
            "schedule": {"steps": 12, "warmup_steps": 2},
            "compute": {"device": "cpu", "threads": 1},
            "log": {"every": 3},
        }
    )
    records = data(32)
    result = train(recipe, records, records[:8])
    losses = [sum(event["losses"].values()) for event in result.events if event["event"] == "step"]
    assert losses[-1] < losses[0]
    assert result.model is not None
    assert result.best["r_mean"] > 0
