"""CLIP against openai/CLIP: states, features, loss, gradients; the ResNet also in training mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from imglish.checkpoints import clip as official
from imglish.data.batch import Batch, TextBatch
from imglish.models.clip import Clip
from imglish.nn.resnet import ModifiedResNet
from imglish.nn.segments import Segments
from tests.golden.support import Case, cases, check, check_grad_norms, filled

# the tokenizer's cases (other inputs) are for test_clip_tokenizer.py
MODELS = [path for path in cases("clip") if "embed_dim" in Case(path).meta.get("config", {})]


def texts_up_to_end(ids: Tensor) -> TextBatch:
    """Padded official ids as packed texts: each ends at its end token, which has the largest id."""
    return TextBatch.of([row[: int(row.argmax()) + 1].tolist() for row in ids])


def texts_as_they_are(ids: Tensor) -> TextBatch:
    """The padding read as words: a causal tower gives the same states in front of it."""
    return TextBatch(ids.flatten(), Segments.equal(*ids.shape))


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What the modules return in the forward passes made meanwhile, under the given names."""
    found: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, out: found.update({name: out.detach()})

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    yield found
    for handle in handles:
        handle.remove()


def batch_of(case: Case, texts: TextBatch) -> Batch:
    count = len(texts)
    return Batch(case.inputs["image"], texts, torch.arange(count), torch.zeros(count, 2))


def build(case: Case) -> Clip:
    config = official.config_from_arguments(case.config)
    return filled(config.build, lambda _: official.convert(case.weights(), config).state).eval()


def image_states(model: Clip, images: Tensor) -> dict[str, Tensor]:
    vision = model.vision
    with torch.no_grad():
        if isinstance(vision, ModifiedResNet):
            stages = {f"visual/layer{number}": stage for number, stage in enumerate(vision.stages, start=1)}
            with recorded({"visual/stem": vision.stem, **stages}) as found:
                vision(images)
            return found
        with recorded({"last": vision.blocks[-1]}) as found:
            normed = vision(images)[:, 0]
        sequence_first = found["last"].unflatten(0, (len(images), -1)).transpose(0, 1)
        return {
            "visual/ln_pre": vision.embed(images),
            "visual/transformer_LND": sequence_first,
            "visual/ln_post": normed,
        }


def train_mode(case: Case, model: Clip) -> dict[str, Tensor]:
    """The image tower with batch statistics, and its buffers after this one forward pass."""
    model.vision.train()
    with torch.no_grad():
        found = {"train_mode/image_features": model.project_image(case.inputs["image"])}
    after = official.table(model.config).revert(model.state_dict())
    return found | {f"train_mode/after/{name}": value for name, value in after.items()}


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.name)
def test_against_openai(path: Path) -> None:
    case = Case(path)
    model = build(case)
    images, ids = case.inputs["image"], case.inputs["text"]
    texts = texts_up_to_end(ids)
    actual = image_states(model, images)
    with torch.no_grad():
        actual["text/ln_final"] = model.text(texts_as_they_are(ids)).unflatten(0, ids.shape)
        actual |= {"image_features": model.project_image(images), "text_features": model.project_text(texts)}
        logits = model.logit_scale.exp() * model.encode_images(images).features @ model.encode_texts(texts).features.T
    actual |= {"logits_per_image": logits, "logits_per_text": logits.T}
    loss = model.losses(batch_of(case, texts))["itc"]
    loss.backward()
    actual["derived/loss"] = loss
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if any(name.startswith("train_mode/") for name in case.outputs):
        actual |= train_mode(case, model)
    for name in case.outputs:
        check(case, name, actual[name])
    if case.grad_norms:
        reverted = official.table(model.config).revert(gradients)
        check_grad_norms(case, case.grad_norms, {name: reverted.get(name) for name in case.grad_norms})
    weights = case.weights()
    config = official.config_from_weights(weights) if case.meta["size"] == "base" else model.config
    assert config == model.config
    back = official.table(config).revert(official.convert(weights, config).state)
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
