"""BLIP against the official models: pre-training and retrieval steps, matching, captioning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imglish.checkpoints import blip as official
from imglish.data.batch import Batch, TextBatch
from imglish.generation.beam import PUBLISHED_BLIP
from imglish.generation.config import GenerationConfig
from imglish.generation.engine import generate
from imglish.models.blip import Blip, BlipConfig
from imglish.models.capabilities import EncodedTexts
from imglish.nn.segments import Segments
from imglish.objectives.momentum import MomentumTeacher, TeacherConfig
from tests.golden.aligned import (
    Step,
    bert_of,
    check_after,
    check_gradients,
    check_rows,
    check_towers,
    load_queue,
    official_pairs,
    texts_of,
    vision_of,
    with_draws,
)
from tests.golden.support import Case, cases, check, filled


def config_of(case: Case, **changes: Any) -> BlipConfig:
    """Our configuration from the official dictionaries of the case."""
    made, tokens = case.config["constructor"], case.config["tokenizer"]
    config = BlipConfig(
        vision=vision_of(case.config["vit_overrides"], made["image_size"]),
        **(bert_of(case.config["med_config"]) | {"vocab_size": tokens["length"]}),
        embed_dim=made.get("embed_dim", 256),
        teacher=TeacherConfig(made.get("momentum", 0.995), made.get("queue_size", 0), ramp_epochs=0),
        **changes,
    )
    assert (config.decode_id, config.encode_id) == (tokens["bos_token_id"], tokens["enc_token_id"])
    return config


def build(case: Case, weights: dict[str, Tensor] | None = None, **changes: Any) -> Blip:
    """The student with ``weights``, else those of the fill rule, through the checkpoint conversion."""
    weights = case.weights() if weights is None else weights
    for name, value in case.meta.get("weight_overrides_after_fill", {}).items():
        tensor, index = name.removesuffix("]").split("[")
        for tied in [tensor] + [other for first, other in case.meta["ties"] if first == tensor]:
            weights[tied] = weights[tensor]
        weights[tensor][int(index)] = value
    config = config_of(case, **changes)
    if any(name.startswith("text_encoder.") for name in weights):
        return filled(config.build, lambda target: official.convert(weights, target, config).state).train()
    model = config.build().train()  # for captioning alone: the encoder keeps what is drawn here
    model.load_state_dict(official.convert(weights, model.state_dict(), config).state)
    return model


def build_teacher(case: Case, weights: dict[str, Tensor], model: Blip) -> MomentumTeacher[Blip]:
    teacher = model.make_teacher()
    assert teacher is not None
    teacher.model.load_state_dict(official.convert_teacher(weights, teacher.model.state_dict()).state)
    load_queue(case, weights, teacher)
    return teacher


@pytest.mark.parametrize("path", cases("blip-pretrain", "blip-retrieval"), ids=lambda p: p.name)
def test_training_step(path: Path) -> None:
    case = Case(path)
    weights = case.weights()
    model = build(case, weights, lm="loss_lm" in Case(path).outputs)
    teacher = build_teacher(case, weights, model)
    del weights  # a gigabyte for the base model
    check_step(Step(case, "", float(case.config["alpha"])), model, teacher, with_gradients=True)
    if "step2/image" in case.inputs:
        check_step(Step(case, "step2/", float(case.config["alpha2"])), model, teacher, with_gradients=False)


def check_step(step: Step, model: Blip, teacher: MomentumTeacher[Blip], with_gradients: bool) -> None:
    case = step.case
    teacher.blend(model)  # officially at the start of the forward
    teacher.alpha = step.alpha
    batch = step.batch()
    embedded = check_towers(step, model, batch, teacher)
    batch = with_draws(step, model, batch, embedded)
    if model.config.lm:
        image_m, text_m = embedded.momentum()
        step.check_weights("weights_i2t", embedded.image @ text_m.T / model.temperature, batch.image_ids, 1e-4)
        step.check_weights("weights_t2i", embedded.text @ image_m.T / model.temperature, batch.image_ids, 1e-4)
    else:  # fine-tuning compares students with students; which negatives that makes likely does not change the loss
        similarity = embedded.image @ embedded.text.T / model.temperature
        step.check_weights("weights_i2t", similarity, batch.image_ids)
        step.check_weights("weights_t2i", similarity.T, batch.image_ids)

    losses = model.losses(batch, teacher)
    step.check("loss_ita", losses["itc"])
    step.check("loss_itm", losses["itm"])
    if model.config.lm:
        step.check("loss_lm", losses["lm"])
    total = sum(v for k, v in losses.items() if not k.startswith("metric/"))
    assert isinstance(total, Tensor)
    step.check_known({"loss_total": total})
    check_modes(step, model, batch)
    if with_gradients and case.grad_norms:
        total.backward()
        check_gradients(case, model, lambda given, target: official.convert(given, target, model.config).state)
    teacher.enqueue()
    check_after(step, teacher, official.teacher_table().revert(teacher.model.state_dict()))


def check_modes(step: Step, model: Blip, batch: Batch) -> None:
    """The three modes of the text Transformer, with all their rows where the case has them."""
    case, mask = step.case, step.inputs["text.attention_mask"]
    images, texts = model.encode_images(batch.images), model.encode_texts(batch.texts)
    assert texts.rows is not None
    memory = model.project_images(images.tokens)
    pictures, captions = official_pairs(step, len(batch))
    step.check("vl_output", model.match(memory, texts, pictures, captions))
    if step.prefix:
        return
    count, segments = len(batch), batch.texts.segments
    check_rows(case, "text_output", model._unimodal(batch.texts), mask)
    one_each = Segments.equal(count, 1)
    check_rows(case, "output_pos", model.fuse(texts.rows, segments, memory, one_each), mask)
    negatives = [look_at(model, images.tokens, texts, i, t) for i, t in zip(pictures[count:], captions[count:])]
    check_rows(case, "output_neg", torch.cat(negatives), mask[captions[count:]])
    if "lm_logits" in case.outputs:
        check_writing(case, model, batch, memory)


def look_at(model: Blip, tokens: Tensor, texts: EncodedTexts, picture: int, text: int) -> Tensor:
    """States ``(n, D)`` of one text that looks at one picture."""
    assert texts.rows is not None
    rows = texts.rows[torch.from_numpy(texts.segments.rows_of([text]))]
    memory = model.project_images(tokens[picture : picture + 1])
    return model.fuse(rows, texts.segments.select([text]), memory, Segments.equal(1, 1))


def check_writing(case: Case, model: Blip, batch: Batch, memory: Any) -> None:
    """Logits at every position of the decoder, padding aside."""
    segments = batch.texts.segments
    ids = batch.texts.ids.index_fill(0, segments.starts(batch.texts.ids.device), model.config.decode_id)
    with torch.no_grad():
        logits = model.next_logits(model.decode(TextBatch(ids, segments), memory))
    check_rows(case, "lm_logits", logits, case.inputs["text.attention_mask"])


@pytest.mark.parametrize("path", cases("blip-itm"), ids=lambda p: p.name)
def test_matching(path: Path) -> None:
    case = Case(path)
    model = build(case, itc=False).eval()
    mask = case.inputs["text.attention_mask"]
    given = texts_of(case.inputs["text.input_ids"], mask)
    with torch.no_grad():
        images, texts = model.encode_images(case.inputs["image"]), model.encode_texts(given)
        assert texts.rows is not None
        memory = model.project_images(images.tokens)
        one_each = Segments.equal(len(given), 1)
        check(case, "image_embeds", images.tokens)
        check(case, "image_feat", images.features)
        check(case, "text_feat", texts.features)
        check(case, "itc_sim", images.features @ texts.features.T)
        check_rows(case, "text_last_hidden_state", model._unimodal(given), mask)
        check_rows(case, "base/text", model._unimodal(given), mask)
        check_rows(case, "base/multimodal", model.fuse(texts.rows, given.segments, memory, one_each), mask)
        # the official matching class leaves [CLS] where training had put [ENC]; we do not, unless told to
        forgotten = EncodedTexts(texts.features, given.segments, model.embedding(given))
        own = list(range(len(given)))
        check(case, "itm_logits", model.match(memory, forgotten, own, own))
        assert forgotten.rows is not None
        states = model.fuse(forgotten.rows, given.segments, memory, one_each)
        check_rows(case, "itm_last_hidden_state", states, mask)
        assert not torch.allclose(model.match(memory, texts, own, own), model.match(memory, forgotten, own, own))


@pytest.mark.parametrize("path", cases("blip-caption"), ids=lambda p: p.name)
def test_captioning_step(path: Path) -> None:
    case = Case(path)
    prompt = case.config["tokenizer"]["prompt_token_ids"]
    model = build(case, itc=False, itm=False, prompt=case.config["constructor"]["prompt"], prompt_tokens=len(prompt))
    mask = case.inputs["text.attention_mask"]
    texts = texts_of(case.inputs["text.input_ids"], mask)
    batch = Batch(case.inputs["image"], texts, torch.arange(len(texts)), torch.zeros(len(texts), 2))
    images = model.encode_images(batch.images)
    check(case, "image_embeds", images.tokens)
    check_writing(case, model, batch, model.project_images(images.tokens))
    losses = model.losses(batch)
    assert losses.keys() == {"lm"}
    check(case, "loss_lm", losses["lm"])
    if case.grad_norms:
        losses["lm"].backward()
        check_gradients(case, model, lambda given, target: official.convert(given, target, model.config).state)


WRITING = [(path, name) for path in cases("blip-caption") for name in Case(path).meta["generation"]]


@pytest.mark.parametrize(("path", "name"), WRITING, ids=[f"{path.name}-{name}" for path, name in WRITING])
def test_captions(path: Path, name: str) -> None:
    """The published code's sequences, by the rules of the transformers version that it pins."""
    case = Case(path)
    wanted, tokens = case.meta["generation"][name], case.config["tokenizer"]
    prompt = tokens["prompt_token_ids"]
    model = build(case, itc=False, itm=False, prompt_tokens=len(prompt)).eval()
    sample = bool(wanted.get("sample"))
    config = GenerationConfig(
        beams=wanted.get("num_beams", 1),
        sample=sample,
        min_length=wanted["min_length"],
        max_length=wanted["max_length"],
        repetition_penalty=1.1 if sample else wanted.get("repetition_penalty", 1.0),
        top_p=wanted.get("top_p", 1.0),
        top_k=50 if sample else 0,
    )
    with torch.no_grad():
        images = model.encode_images(case.inputs["image"])
    count = len(images.features)
    opening = [model.caption_form().start, *prompt]
    numbers = case.inputs[f"{name}/uniforms"].numpy() if sample else None
    found = generate(
        model,
        images,
        [opening] * count,
        tokens["sep_token_id"],
        config,
        [str(i) for i in range(count)],
        PUBLISHED_BLIP,
        None if numbers is None else lambda picture, _: numbers[:, picture],
    )
    expected = case.outputs[f"{name}/ids" if sample else f"gen/{name}/ids"]
    for row, (best,) in zip(expected.tolist(), found, strict=True):
        ids = [*opening, *best.ids, *([tokens["sep_token_id"]] if best.ended else [])]
        assert ids + [tokens["pad_token_id"]] * (len(row) - len(ids)) == row
    if f"gen/{name}/sequences_scores" in case.outputs:
        check(case, f"gen/{name}/sequences_scores", torch.tensor([best.score for (best,) in found]))
