"""ALBEF's heads for visual entailment and NLVR2 against the official models: outputs, distilled loss, gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from imglish.checkpoints import albef_tasks as official
from imglish.checkpoints.rules import ConversionError
from imglish.models.albef import AlbefConfig
from imglish.models.albef_heads import AlbefEntailment, AlbefReasoning
from tests.golden.aligned import bert_of, check_gradients, check_rows, texts_of, vision_of
from tests.golden.support import Case, cases, check

MOMENTUM = 0.995  # fixed in the official task models


def config_of(case: Case) -> AlbefConfig:
    bert = case.config["bert_config"]
    vision = vision_of(case.config["vit_overrides"], case.config["config"]["image_res"])
    return AlbefConfig(vision=vision, **bert_of(bert), fusion_layer=bert["fusion_layer"])


def build(case: Case, pictures: int) -> AlbefEntailment | AlbefReasoning:
    albef, classes = config_of(case).build(), case.weights()["cls_head.2.weight"].shape[0]
    return AlbefEntailment(albef, classes) if pictures == 1 else AlbefReasoning(albef, pictures, classes)


@pytest.mark.parametrize(
    ("path", "pictures"),
    [*((path, 1) for path in cases("albef-ve")), *((path, 2) for path in cases("albef-nlvr"))],
    ids=lambda value: value.name if isinstance(value, Path) else str(value),
)
def test_step(path: Path, pictures: int) -> None:
    case = Case(path)
    config, weights = config_of(case), case.weights()
    model, teacher = build(case, pictures), build(case, pictures)
    model.load_state_dict(official.convert(weights, model.state_dict(), config, pictures).state)
    teacher.load_state_dict(official.convert_teacher(weights, teacher.state_dict(), config, pictures).state)
    mask = case.inputs["text.attention_mask"]
    texts, pixels = texts_of(case.inputs["text.input_ids"], mask), case.inputs["image"]

    def run(one: AlbefEntailment | AlbefReasoning, whole: bool = False) -> torch.Tensor:
        if isinstance(one, AlbefEntailment):
            return one.states(pixels, texts) if whole else one(pixels, texts)
        images = pixels.split(len(texts))
        return one.states(images, texts) if whole else one(images, texts)

    with torch.no_grad():
        for momentum, student in zip(teacher.parameters(), model.parameters(), strict=True):
            momentum.lerp_(student, 1 - MOMENTUM)  # officially within the forward, before the teacher predicts
        soft = run(teacher)
        check(case, "prediction_m", soft)
        check(case, "image_embeds", model.albef.vision(pixels))
        check_rows(case, "last_hidden_state", run(model, whole=True), mask)
    logits = run(model)
    check(case, "prediction", logits)
    check(case, "eval_prediction", logits)
    loss = model.loss(logits, case.inputs["targets"], soft, float(case.config["alpha"]))
    check(case, "loss", loss)
    loss.backward()
    check_gradients(case, model, lambda given, target: official.table(config, pictures).convert(given, target).state)


@pytest.mark.parametrize("path", cases("albef-nlvr"), ids=lambda p: p.name)
def test_keys_and_values_that_are_not_shared_are_an_error(path: Path) -> None:
    case = Case(path)
    config, weights = config_of(case), case.weights()
    name = f"text_encoder.encoder.layer.{config.fusion_layer + 1}.crossattention.self.key.bias"
    changed = {**weights, name: weights[name] + 1}
    with pytest.raises(ConversionError, match="should hold the same values"):
        official.convert(changed, build(case, 2).state_dict(), config, 2)


def test_a_reasoning_model_starts_from_equal_layers_that_share_keys_and_values() -> None:
    config = AlbefConfig(vision=vision_of({"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8}, 16))
    small = {"vocab_size": 20, "max_length": 8, "width": 16, "depth": 2, "fusion_layer": 1, "heads": 2, "hidden": 32}
    albef = AlbefConfig(vision=config.vision, **small, dropout=0.0).build()
    text_layers = copy.deepcopy(albef.text_layers)
    model = AlbefReasoning(albef, pictures=3)
    layers = model.albef.fusion_layers
    assert len(layers) == 3
    assert all(layer.cross.kv is layers[0].cross.kv for layer in layers)
    assert len({id(layer.cross.q) for layer in layers}) == 3
    assert all(torch.equal(layer.cross.q.weight, layers[0].cross.q.weight) for layer in layers)
    assert len(model.albef.text_layers) == len(text_layers)
    texts = texts_of(torch.tensor([[2, 5, 6], [2, 7, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    images = [torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    with torch.no_grad():
        together = model(images, texts)
        alone = model([image[:1] for image in images], texts_of(torch.tensor([[2, 5, 6]]), torch.ones(1, 3)))
    torch.testing.assert_close(together[:1], alone)
    with pytest.raises(ValueError, match="2 pictures to a sentence, the model reads 3"):
        model(images[:2], texts)
