"""BLIP's model for NLVR2 against the official one: outputs, loss, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from imglish.checkpoints import blip_tasks as official
from imglish.models.blip import BlipConfig
from imglish.models.blip_heads import BlipReasoning
from tests.golden.aligned import bert_of, check_gradients, check_rows, texts_of, vision_of
from tests.golden.support import Case, cases, check


@pytest.mark.parametrize("path", cases("blip-nlvr"), ids=lambda p: p.name)
def test_reasoning(path: Path) -> None:
    case = Case(path)
    vision = vision_of(case.config["vit_overrides"], case.config["constructor"]["image_size"])
    config = BlipConfig(vision=vision, **bert_of(case.config["med_config"]))
    weights = case.weights()
    model = BlipReasoning(config.build(), weights["cls_head.2.weight"].shape[0])
    model.load_state_dict(official.convert_reasoning(weights, model.state_dict(), config).state)
    mask = case.inputs["text.attention_mask"]
    texts = texts_of(case.inputs["text.input_ids"], mask)
    images = case.inputs["image"].split(len(texts))
    with torch.no_grad():
        check(case, "image_embeds", model.blip.vision(case.inputs["image"]))
        check_rows(case, "last_hidden_state", model.states(images, texts), mask)
    logits = model(images, texts)
    check(case, "prediction", logits)
    loss = F.cross_entropy(logits, case.inputs["targets"])
    check(case, "loss", loss)
    loss.backward()
    check_gradients(case, model, lambda given, target: official.reasoning_table(config).convert(given, target).state)
    with pytest.raises(ValueError, match="pictures"):
        model([images[0], images[1][:1]], texts)
