"""VLMo's heads for VQA and NLVR2 against the official ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imglish.checkpoints import vlmo as official
from imglish.models.vlmo_heads import VlmoAnswers, VlmoReasoning
from tests.golden.aligned import texts_of
from tests.golden.support import Case, cases, check, check_grad_norms, official_gradients
from tests.golden.test_vlmo import Passes, batch_of, check_relative, config_of


def build(case: Case, head: str) -> VlmoAnswers | VlmoReasoning:
    weights = case.weights()
    config = replace(config_of(case.config), itc_fused=False, types=len(weights["token_type_embeddings.weight"]))
    answers = weights[f"{head}.3.weight"].shape[0]
    body = config.build()
    model = VlmoAnswers(body, answers) if head.startswith("vqa") else VlmoReasoning(body)
    model.load_state_dict(official.task_table(config, head).convert(weights, model.state_dict()).state)
    return model


def check_gradients(case: Case, model: VlmoAnswers | VlmoReasoning, head: str) -> None:
    target = {name: value.double() for name, value in model.state_dict().items()}
    table = official.task_table(model.vlmo.config, head)
    found = official_gradients(lambda numbers: table.convert(numbers, target).state, case.shapes, model)
    buffers = case.meta["buffers_kept"]
    check_grad_norms(case, {n: v for n, v in case.grad_norms.items() if n not in buffers}, found)
    for name in case.outputs:
        if name.startswith("grad."):
            gradient = found[name.removeprefix("grad.")]
            assert gradient is not None
            check(case, name, gradient.reshape(-1)[: case.outputs[name].numel()])


@pytest.mark.parametrize("path", cases("vlmo-vqa"), ids=lambda p: p.name)
def test_answers(path: Path) -> None:
    case = Case(path)
    model = build(case, "vqa_classifier")
    assert isinstance(model, VlmoAnswers)
    batch, mask = batch_of(case.inputs), case.inputs["text_masks"]
    with torch.no_grad():
        check_relative(case, model.vlmo, mask.shape[1])
        Passes(case, model.vlmo, batch, mask).pairs()
        check(case, "infer.cls_feats", model.pooled(batch.squares, batch.texts))
    logits = model(batch.squares, batch.texts)
    check(case, "vqa_logits", logits)
    targets = torch.zeros_like(logits)
    for row, (labels, scores) in enumerate(zip(case.meta["vqa_labels"], case.meta["vqa_scores"], strict=True)):
        targets[row, labels] = torch.tensor(scores)
    check(case, "vqa_targets", targets)
    loss = F.binary_cross_entropy_with_logits(logits, targets) * targets.shape[1]
    check(case, "vqa_loss", loss)
    loss.backward()
    check_gradients(case, model, "vqa_classifier")


@pytest.mark.parametrize("path", cases("vlmo-nlvr2"), ids=lambda p: p.name)
def test_reasoning(path: Path) -> None:
    case = Case(path)
    model = build(case, "nlvr2_classifier")
    assert isinstance(model, VlmoReasoning)
    texts = texts_of(case.inputs["text_ids"], case.inputs["text_masks"])
    pictures = case.inputs["image_0"], case.inputs["image_1"]
    with torch.no_grad():
        for number, images in enumerate(pictures, 1):
            check(case, f"infer{number}.cls_feats", model.pooled(images, texts, number))
    logits = model(pictures, texts)
    check(case, "nlvr2_logits", logits)
    loss = F.cross_entropy(logits, case.outputs["nlvr2_labels"].long())
    check(case, "nlvr2_loss", loss)
    loss.backward()
    check_gradients(case, model, "nlvr2_classifier")


def test_wrong_use_is_refused() -> None:
    from imglish.models.vlmo import vlmo_tiny

    with pytest.raises(ValueError, match="types=3"):
        VlmoReasoning(vlmo_tiny().build())
    model: nn.Module = VlmoAnswers(vlmo_tiny().build(), 5)
    with pytest.raises(ValueError, match="one to one"):
        model(torch.zeros(2, 3, 48, 48), texts_of(torch.ones(3, 4).long(), torch.ones(3, 4)))
