"""ALBEF against the official pre-training and retrieval models: outputs, losses, gradients, queue and EMA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from imglish.checkpoints import albef as official
from imglish.data.batch import Batch, MaskedTexts, TextBatch
from imglish.models.albef import Albef, AlbefConfig
from imglish.models.vit import ImageInput, VitConfig
from imglish.nn.embed import resize_grid
from imglish.nn.segments import Segments
from imglish.objectives.itm import negative_weights
from imglish.objectives.momentum import MomentumTeacher, TeacherConfig
from tests.golden.support import Case, cases, check, check_grad_norms, official_gradients

STEPS = cases("albef-pretrain", "albef-retrieval")


def config_of(case: Case) -> AlbefConfig:
    """Our configuration from the official dictionaries of the case."""
    run, bert = case.config["config"], case.config["bert_config"]
    vit = case.config["vit_overrides"]
    vit = vit if isinstance(vit, dict) else {}
    width = vit.get("embed_dim", run["vision_width"])
    return AlbefConfig(
        vision=VitConfig(
            image=ImageInput(run["image_res"]),
            patch=vit.get("patch_size", 16),
            width=width,
            depth=vit.get("depth", 12),
            heads=vit.get("num_heads", 12),
            mlp_ratio=vit.get("mlp_ratio", 4.0),
        ),
        vocab_size=bert["vocab_size"],
        max_length=bert["max_position_embeddings"],
        width=bert["hidden_size"],
        depth=bert["num_hidden_layers"],
        fusion_layer=bert["fusion_layer"],
        heads=bert["num_attention_heads"],
        hidden=bert["intermediate_size"],
        norm_eps=bert["layer_norm_eps"],
        dropout=0.0,
        embed_dim=run["embed_dim"],
        temperature=run["temp"],
        teacher=TeacherConfig(momentum=run["momentum"], queue_size=run["queue_size"], ramp_epochs=0),
        mlm=case.path.name.startswith("albef-pretrain"),
    )


def build(case: Case) -> tuple[Albef, MomentumTeacher[Albef]]:
    """Student and teacher with the weights of the fill rule, through the checkpoint conversion."""
    weights = case.weights()
    model = config_of(case).build().train()
    model.load_state_dict(official.convert(weights, model.state_dict(), model.config).state)
    teacher = model.make_teacher()
    teacher.model.load_state_dict(official.convert_teacher(weights, model.state_dict(), model.config).state)
    queue = teacher.queue
    assert queue is not None
    queue.image.copy_(weights["image_queue"].T)
    queue.text.copy_(weights["text_queue"].T)
    queue.ids.copy_(case.inputs.get("initial_idx_queue", torch.full((1, queue.ids.shape[0]), -1))[0])
    queue.pointer, queue.filled = int(weights["queue_ptr"]), queue.ids.shape[0]
    return model, teacher


def texts_of(ids: Tensor, mask: Tensor) -> TextBatch:
    return TextBatch(ids[mask.bool()], Segments.of(mask.sum(1).tolist()))


def masked_of(ids: Tensor, labels: Tensor, mask: Tensor) -> MaskedTexts:
    kept = labels[mask.bool()]
    rows = torch.nonzero(kept != -100).squeeze(1)
    counts = tuple(int(n) for n in ((labels != -100) & mask.bool()).sum(1))
    return MaskedTexts(ids[mask.bool()], rows, kept[rows], counts)


def draws_for(weights: Tensor, chosen: Tensor) -> Tensor:
    """Uniform numbers by which the inverse cumulative distribution gives just ``chosen``."""
    upper = weights.double().cumsum(1)
    at = chosen[:, None].long()
    middle = upper.gather(1, at) - weights.double().gather(1, at) / 2
    return (middle / upper[:, -1:]).squeeze(1).float()


def valid_rows(padded: Tensor, mask: Tensor) -> Tensor:
    return padded[mask.bool()]


@pytest.mark.parametrize("path", STEPS, ids=lambda p: p.name)
def test_training_step(path: Path) -> None:
    case = Case(path)
    model, teacher = build(case)
    check_step(case, "", model, teacher, float(case.config["alpha"]), with_gradients=True)
    if "step2/image" in case.inputs:
        check_step(case, "step2/", model, teacher, float(case.config["alpha2"]), with_gradients=False)


def check_step(
    case: Case, step: str, model: Albef, teacher: MomentumTeacher[Albef], alpha: float, with_gradients: bool
) -> None:
    inputs = {k.removeprefix(step): v for k, v in case.inputs.items() if k.startswith(step)}
    mask = inputs["text.attention_mask"]
    texts = texts_of(inputs["text.input_ids"], mask)
    count = len(texts)
    ids = inputs["idx"] if "idx" in inputs else torch.arange(count) + 10**6 * (1 + len(step))
    teacher.blend(model)  # officially at the start of the forward
    teacher.alpha = alpha
    masked = None
    if model.config.mlm:
        masked = masked_of(case.outputs[f"{step}input_ids"], case.outputs[f"{step}labels"], mask)
    batch = Batch(inputs["image"], texts, ids, torch.zeros(count, 2), masked)

    embedded = model.embed(batch, teacher)
    itc = model.distilled_itc(embedded, teacher)
    image_m, text_m = embedded.momentum()
    i2t = embedded.image @ text_m.T / model.temperature
    t2i = embedded.text @ image_m.T / model.temperature
    weights_i2t, weights_t2i = negative_weights(i2t, ids, ids), negative_weights(t2i, ids, ids)
    batch = Batch(
        batch.images,
        texts,
        ids,
        torch.stack(
            [draws_for(weights_t2i, inputs["neg_image_idx"]), draws_for(weights_i2t, inputs["neg_text_idx"])], dim=1
        ),
        masked,
    )
    found = {
        "image_feat": embedded.image,
        "text_feat": embedded.text,
        "image_feat_m": image_m,
        "text_feat_m": text_m,
        "sim_i2t": itc.i2t,
        "sim_t2i": itc.t2i,
        "sim_i2t_m": itc.i2t_teacher,
        "sim_t2i_m": itc.t2i_teacher,
        "image_embeds": embedded.towers.tokens,
        "image_embeds_m": embedded.towers.teacher.tokens,
    }
    for name, value in found.items():
        if f"{step}{name}" in case.outputs:
            check(case, step + name, value)
    for name, weights in (("weights_i2t", weights_i2t), ("weights_t2i", weights_t2i)):
        expected = case.outputs[f"{step}{name}"]  # officially zeroed after the softmax, not normalised again
        torch.testing.assert_close(weights, expected / expected.sum(1, keepdim=True), rtol=1e-3, atol=1e-4)

    losses = model.losses(batch, teacher)
    check(case, f"{step}loss_ita", losses["itc"])
    check(case, f"{step}loss_itm", losses["itm"])
    if model.config.mlm:
        check(case, f"{step}loss_mlm", losses["mlm"])
    total = sum(v for k, v in losses.items() if not k.startswith("metric/"))
    assert isinstance(total, Tensor)
    check(case, f"{step}loss_total", total)
    check_pairs(case, step, model, batch, inputs)
    if with_gradients and case.grad_norms:
        total.backward()
        check_gradients(case, model)
    teacher.enqueue()
    check_after(case, step, model, teacher)


def check_pairs(case: Case, step: str, model: Albef, batch: Batch, inputs: dict[str, Tensor]) -> None:
    """The rows of the official ITM pass: B positives, B (text b, drawn picture), B (drawn text, picture b)."""
    own = list(range(len(batch)))
    images, texts = model.encode_images(batch.images), model.encode_texts(batch.texts)
    assert images.tokens is not None
    memory = model.project_images(images.tokens)
    pictures = own + inputs["neg_image_idx"].tolist() + own
    captions = own + own + inputs["neg_text_idx"].tolist()
    check(case, f"{step}vl_output", model.match(memory, texts, pictures, captions))
    if "eval_itm_scores_i2t" in case.outputs and not step:
        grid = [(i, j) for i in own for j in own]
        logits = model.match(memory, texts, [i for i, _ in grid], [j for _, j in grid])
        check(case, "eval_itm_scores_i2t", logits[:, 1].reshape(len(own), -1))
    if "mlm_logits" in case.outputs and not step and case.meta["outputs"]["mlm_logits"]["stored"] == "full":
        mask, masked = inputs["text.attention_mask"], batch.masked
        assert masked is not None
        everything = MaskedTexts(
            masked.ids, torch.arange(masked.ids.shape[0]), masked.ids, batch.texts.segments.lengths
        )
        logits = model.fill_masks(images.tokens, everything, batch.texts.segments)
        expected = valid_rows(case.outputs["mlm_logits"], mask)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        expected = valid_rows(case.outputs["text_embeds"], mask)
        assert texts.rows is not None
        torch.testing.assert_close(texts.rows, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def check_gradients(case: Case, model: Albef) -> None:
    tied = {name for _, name in case.meta["ties"]}
    shapes = {n: v.shape for n, v in case.weights().items() if v.is_floating_point() and n not in tied}
    target = {n: v.double() for n, v in model.state_dict().items()}
    found = official_gradients(lambda numbers: official.convert(numbers, target, model.config).state, shapes, model)
    expected = {n: v for n, v in case.grad_norms.items() if n not in tied}
    check_grad_norms(case, expected, found)
    for name in case.outputs:
        if name.startswith("grad/"):
            gradient = found[name.removeprefix("grad/")]
            assert gradient is not None
            check(case, name, gradient)


def check_after(case: Case, step: str, model: Albef, teacher: MomentumTeacher[Albef]) -> None:
    queue = teacher.queue
    assert queue is not None
    check(case, f"{step}after/image_queue", queue.image.T.contiguous())
    check(case, f"{step}after/text_queue", queue.text.T.contiguous())
    assert queue.pointer == int(case.outputs[f"{step}after/queue_ptr"])
    if "after/idx_queue" in case.outputs:
        assert torch.equal(queue.ids, case.outputs[f"{step}after/idx_queue"][0])
    back = official.teacher_table(model.config, model.config.mlm).revert(teacher.model.state_dict())
    for name in case.outputs:
        if name.startswith(f"{step}ema/"):
            check(case, name, back[name.removeprefix(f"{step}ema/")].reshape(-1)[: case.outputs[name].numel()])


@pytest.mark.parametrize("path", cases("albef-posembed", "blip-posembed"), ids=lambda p: p.name)
def test_position_resize(path: Path) -> None:
    case = Case(path)
    for name in case.outputs:
        before, after = name.removeprefix("from").split("_to")
        table = case.inputs[f"pos_embed_{before}x{before}"][0]
        check(case, name, resize_grid(table, (int(after), int(after)))[None])
