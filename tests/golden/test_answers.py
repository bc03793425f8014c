"""The decoders of answers of ALBEF and BLIP against the official models: loss, gradients, ranking, writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imglish.checkpoints import albef_tasks, blip_tasks
from imglish.data.tasks.batch import Answers
from imglish.generation.config import GenerationConfig
from imglish.generation.engine import generate
from imglish.models.albef_heads import AlbefVqa
from imglish.models.answering import AnswerDecoder, RankRule, answer_loss, distilled_tokens, summed
from imglish.models.blip import BlipConfig
from imglish.models.blip_heads import BlipVqa
from imglish.models.capabilities import EncodedImages
from imglish.models.heads import AnswerModel, HeadConfig
from imglish.nn.segments import Ragged
from tests.golden.aligned import bert_of, check_gradients, check_rows, texts_of, vision_of
from tests.golden.support import Case, cases, check
from tests.golden.test_albef_heads import config_of
from tests.golden.test_blip import PUBLISHED_BLIP

MOMENTUM = 0.995


def depth_of(case: Case) -> int:
    marks = "text_decoder.bert.encoder.layer."
    return 1 + max(
        int(name[len(marks) :].split(".")[0]) for name, *_ in case.meta["parameters"] if marks in name[: len(marks)]
    )


def weights_of(case: Case) -> dict[str, Tensor]:
    weights = case.weights()
    for place, value in case.meta.get("weight_overrides_after_fill", {}).items():
        name, number = place.rstrip("]").split("[")
        weights[name][int(number)] = value
    return weights


def answers_of(case: Case, start: int) -> Answers:
    ids, mask = case.inputs["answer.input_ids"].clone(), case.inputs["answer.attention_mask"]
    ids[:, 0] = start
    name = "k" if "k" in case.inputs else "n"
    return Answers(texts_of(ids, mask), tuple(case.inputs[name].tolist()), case.inputs["weights"])


def candidates_of(case: Case) -> list[list[int]]:
    """Without the start."""
    ids, mask = case.inputs["candidates.input_ids"], case.inputs["candidates.attention_mask"].bool()
    return [row[keep].tolist()[1:] for row, keep in zip(ids, mask, strict=True)]


def check_logits(case: Case, logits: Tensor, answers: Answers) -> None:
    """Packed logits against padded ones; the official last token of each answer predicts too, ours does not."""
    expected, lengths = case.outputs["answer_logits"], answers.texts.segments.lengths
    packed = torch.cat([row[: length - 1] for row, length in zip(expected, lengths, strict=True)])
    torch.testing.assert_close(
        logits.detach(), packed, rtol=0, atol=1e-4 * float(case.meta["outputs"]["answer_logits"]["absmax"])
    )


def questions_of(case: Case) -> tuple[Tensor, Any, Tensor]:
    mask = case.inputs["question.attention_mask"]
    return case.inputs["image"], texts_of(case.inputs["question.input_ids"], mask), mask


@pytest.mark.parametrize("path", cases("albef-vqa"), ids=lambda p: p.name)
def test_albef(path: Path) -> None:
    case = Case(path)
    config, weights, start = config_of(case), weights_of(case), case.config["tokenizer"]["cls_token_id"]
    models = []
    for table, keep in ((albef_tasks.vqa_table(config), ""), (albef_tasks.vqa_teacher_table(config), "_m")):
        model = AlbefVqa(config.build(), start, depth_of(case))
        given = {n: v for n, v in weights.items() if not keep or n.split(".")[0].endswith(keep)}
        model.load_state_dict(table.convert(given, model.state_dict()).state)
        models.append(model.train())
    student, teacher = models
    images, texts, mask = questions_of(case)
    answers = answers_of(case, start)
    with torch.no_grad():
        for momentum, mine in zip(teacher.parameters(), student.parameters(), strict=True):
            momentum.lerp_(mine, 1 - MOMENTUM)
        check(case, "image_embeds", student.albef.vision(images))
        theirs, _, _ = teacher.decoder.written(teacher.questions(images, texts), answers)
    questions = student.questions(images, texts)
    check_rows(case, "question_last_hidden_state", questions.rows, mask)
    logits, targets, owner = student.decoder.written(questions, answers)
    check_logits(case, logits, answers)
    alpha = float(case.config["alpha"])
    tokens = (1 - alpha) * answer_loss(logits, targets) + alpha * distilled_tokens(logits, theirs)
    each = summed(tokens, owner, len(answers.texts))
    check(case, "answer_loss_per_answer", each)
    loss = (each * answers.weights).sum() / len(texts)
    check(case, "loss", loss)
    loss.backward()
    check_gradients(case, student, lambda given, target: albef_tasks.vqa_table(config).convert(given, target).state)
    check_ranking(case, student.decoder, questions, RankRule(int(case.config["k_test"]), first_twice=True))


def check_ranking(case: Case, decoder: AnswerDecoder, questions: Ragged, official: RankRule) -> None:
    candidates = candidates_of(case)
    questions = Ragged(questions.rows.detach(), questions.segments)
    numbers, scores = decoder.rank(questions, candidates, official, keep=official.shortlist)
    # officially in the order of the first words' probabilities
    sums = case.outputs["rank/log_probs_sum"].numpy()
    order = np.argsort(-sums, axis=1, kind="stable")
    assert np.allclose(scores, np.take_along_axis(sums, order, 1), atol=1e-4 * np.abs(sums).max())
    if "rank/max_ids" in case.outputs:
        assert numbers[:, 0].tolist() == case.outputs["rank/max_ids"].tolist()
        assert np.sort(numbers).tolist() == np.sort(case.outputs["rank/topk_ids"].numpy()).tolist()
    else:
        assert numbers.tolist() == case.outputs["rank/topk_ids"].tolist()


@pytest.mark.parametrize("path", cases("blip-vqa"), ids=lambda p: p.name)
def test_blip(path: Path) -> None:
    case = Case(path)
    vision = vision_of(case.config["vit_overrides"], case.config["constructor"]["image_size"])
    config = BlipConfig(vision=vision, **bert_of(case.config["med_config"]))
    model = BlipVqa(config.build(), depth_of(case))
    table = blip_tasks.vqa_table(config)
    model.load_state_dict(table.convert(weights_of(case), model.state_dict()).state)
    images, texts, _ = questions_of(case)
    answers = answers_of(case, config.decode_id)
    questions = model.questions(images, texts)
    logits, targets, owner = model.decoder.written(questions, answers)
    check_logits(case, logits, answers)
    each = summed(answer_loss(logits, targets, 0.1), owner, len(answers.texts))
    check(case, "answer_loss_per_answer", each)
    loss = (each * answers.weights).sum() / len(texts)
    check(case, "loss", loss)
    loss.backward()
    check_gradients(case, model, lambda given, target: table.convert(given, target).state)
    model.eval()
    check_ranking(case, model.decoder, questions, RankRule(int(case.config["k_test"]), smoothing=0.1))
    check_writing(case, model, questions)


def check_writing(case: Case, model: BlipVqa, questions: Ragged) -> None:
    """Beams of the published code, of the questions without padding: it looks at the padding too when it writes."""
    head = HeadConfig("vqa", "answers", ("yes", "no"))
    answering = AnswerModel(model.blip, head, model).eval()
    whole = [n for n, mask in enumerate(case.inputs["question.attention_mask"]) if bool(mask.all())]
    rows = Ragged(questions.rows.detach(), questions.segments).select(whole)
    sep, pad = (case.config["tokenizer"][f"{name}_token_id"] for name in ("sep", "pad"))
    expected = case.outputs["gen/ids"][whole].tolist()
    config = GenerationConfig(beams=3, min_length=1, max_length=len(expected[0]) if expected else 2)
    images, opening = EncodedImages(torch.zeros(len(whole), 0), rows), [model.decoder.start]
    found = generate(answering, images, [opening] * len(whole), sep, config, [""] * len(whole), PUBLISHED_BLIP)
    for row, (best,) in zip(expected, found, strict=True):
        ids = [*opening, *best.ids, *([sep] if best.ended else [])]
        assert ids + [pad] * (len(row) - len(ids)) == row
