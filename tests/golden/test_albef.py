"""ALBEF against the official pre-training and retrieval models: outputs, losses, gradients, queue and EMA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from imglish.checkpoints import albef as official
from imglish.data.batch import Batch, MaskedTexts
from imglish.models.albef import Albef, AlbefConfig
from imglish.nn.embed import resize_grid
from imglish.objectives.momentum import MomentumTeacher, TeacherConfig
from tests.golden.aligned import (
    Step,
    bert_of,
    check_after,
    check_gradients,
    check_rows,
    check_towers,
    load_queue,
    masked_of,
    official_pairs,
    valid_rows,
    vision_of,
    with_draws,
)
from tests.golden.support import Case, cases, check, filled

STEPS = cases("albef-pretrain", "albef-retrieval")


def config_of(case: Case) -> AlbefConfig:
    """Our configuration from the official dictionaries of the case."""
    run, bert = case.config["config"], case.config["bert_config"]
    return AlbefConfig(
        vision=vision_of(case.config["vit_overrides"], run["image_res"]),
        **bert_of(bert),
        fusion_layer=bert["fusion_layer"],
        embed_dim=run["embed_dim"],
        temperature=run["temp"],
        teacher=TeacherConfig(momentum=run["momentum"], queue_size=run["queue_size"], ramp_epochs=0),
        mlm=case.path.name.startswith("albef-pretrain"),
    )


def build(case: Case) -> tuple[Albef, MomentumTeacher[Albef]]:
    """Student and teacher with the weights of the fill rule, through the checkpoint conversion."""
    weights = case.weights()
    config = config_of(case)
    model = filled(config.build, lambda target: official.convert(weights, target, config).state).train()
    teacher = model.make_teacher()
    assert teacher is not None
    teacher.model.load_state_dict(official.convert_teacher(weights, model.state_dict(), model.config).state)
    load_queue(case, weights, teacher)
    return model, teacher


@pytest.mark.parametrize("path", STEPS, ids=lambda p: p.name)
def test_training_step(path: Path) -> None:
    case = Case(path)
    model, teacher = build(case)
    check_step(Step(case, "", float(case.config["alpha"])), model, teacher, with_gradients=True)
    if "step2/image" in case.inputs:
        check_step(Step(case, "step2/", float(case.config["alpha2"])), model, teacher, with_gradients=False)


def check_step(step: Step, model: Albef, teacher: MomentumTeacher[Albef], with_gradients: bool) -> None:
    case, inputs = step.case, step.inputs
    teacher.blend(model)  # officially at the start of the forward
    teacher.alpha = step.alpha
    masked = None
    if model.config.mlm:
        expected = case.outputs[f"{step.prefix}input_ids"], case.outputs[f"{step.prefix}labels"]
        masked = masked_of(*expected, inputs["text.attention_mask"])
    batch = step.batch(masked)
    embedded = check_towers(step, model, batch, teacher)
    step.check_known({"image_embeds_m": embedded.towers.teacher.tokens})
    batch = with_draws(step, model, batch, embedded)
    image_m, text_m = embedded.momentum()
    step.check_weights("weights_i2t", embedded.image @ text_m.T / model.temperature, batch.image_ids)
    step.check_weights("weights_t2i", embedded.text @ image_m.T / model.temperature, batch.image_ids)

    losses = model.losses(batch, teacher)
    step.check("loss_ita", losses["itc"])
    step.check("loss_itm", losses["itm"])
    if model.config.mlm:
        step.check("loss_mlm", losses["mlm"])
    total = sum(v for k, v in losses.items() if not k.startswith("metric/"))
    assert isinstance(total, Tensor)
    step.check("loss_total", total)
    check_pairs(step, model, batch)
    if with_gradients and case.grad_norms:
        total.backward()
        check_gradients(case, model, lambda given, target: official.convert(given, target, model.config).state)
    teacher.enqueue()
    back = official.teacher_table(model.config, model.config.mlm).revert(teacher.model.state_dict())
    check_after(step, teacher, back)


def check_pairs(step: Step, model: Albef, batch: Batch) -> None:
    case, inputs = step.case, step.inputs
    images, texts = model.encode_images(batch.images), model.encode_texts(batch.texts)
    memory = model.project_images(images.tokens)
    step.check("vl_output", model.match(memory, texts, *official_pairs(step, len(batch))))
    if step.prefix:
        return
    if "eval_itm_scores_i2t" in case.outputs:
        own = list(range(len(batch)))
        logits = model.match(memory, texts, [i for i in own for _ in own], own * len(own))
        check(case, "eval_itm_scores_i2t", logits[:, 1].reshape(len(own), -1))
    if "mlm_logits" in case.outputs and case.meta["outputs"]["mlm_logits"]["stored"] == "full":
        mask, masked = inputs["text.attention_mask"], batch.masked
        assert masked is not None
        everything = MaskedTexts(
            masked.ids, torch.arange(masked.ids.shape[0]), masked.ids, batch.texts.segments.lengths
        )
        logits = model.fill_masks(images.tokens, everything, batch.texts.segments)
        expected = valid_rows(case.outputs["mlm_logits"], mask)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    if "text_embeds" in case.outputs:
        check_rows(case, "text_embeds", texts.rows, inputs["text.attention_mask"])


@pytest.mark.parametrize("path", cases("albef-posembed", "blip-posembed"), ids=lambda p: p.name)
def test_position_resize(path: Path) -> None:
    case = Case(path)
    for name in case.outputs:
        before, after = name.removeprefix("from").split("_to")
        table = case.inputs[f"pos_embed_{before}x{before}"][0]
        check(case, name, resize_grid(table, (int(after), int(after)))[None])
