"""VQA accuracy, NLVR2, grounding, zero-shot and pairwise scores against the official code (recorded numbers)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from imglish.evaluation.grounding import choose, overlap
from imglish.evaluation.metrics import binding_scores, pairwise_correct
from imglish.evaluation.nlvr2 import reasoning_scores
from imglish.evaluation.vqa import (
    VQA_VARIANTS,
    AnsweredQuestion,
    VqaVariant,
    answer_accuracy,
    simplify_words,
    strip_punctuation,
    vqa_scores,
)
from imglish.evaluation.zeroshot import class_features, class_scores, classification
from tests.golden.support import golden_root


def _files(name: str) -> list[Path]:
    return sorted(golden_root().rglob(name))


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


VQA = [path.parent for path in _files("normalisation.json")]
NLVR2 = [(path, case["name"]) for path in _files("nlvr2.json") for case in _load(path)["cases"]]


def _questions(folder: Path) -> list[AnsweredQuestion]:
    return [
        AnsweredQuestion(
            one["question_id"],
            tuple(answer["answer"] for answer in one["answers"]),
            one["answer_type"],
            one["question_type"],
        )
        for one in _load(folder / "annotations.json")["annotations"]
    ]


@pytest.mark.parametrize("folder", VQA, ids=lambda p: p.name)
def test_answers_are_normalised_as_officially(folder: Path) -> None:
    for case in _load(folder / "normalisation.json"):
        assert strip_punctuation(case["raw"]) == case["punct"], case["raw"]
        assert simplify_words(case["punct"]) == case["full"], case["raw"]


@pytest.mark.parametrize("variant", VQA_VARIANTS)
@pytest.mark.parametrize("folder", VQA, ids=lambda p: p.name)
def test_vqa_accuracy(folder: Path, variant: VqaVariant) -> None:
    predictions = {one["question_id"]: one["answer"] for one in _load(folder / "results.json")}
    ours = vqa_scores(_questions(folder), predictions, variant)
    expected = _load(folder / "expected.json")[variant]
    assert ours.overall == pytest.approx(expected["overall"], abs=1e-4)
    assert ours.by_answer_type == pytest.approx(expected["perAnswerType"], abs=1e-4)
    assert ours.by_question_type == pytest.approx(expected["perQuestionType"], abs=1e-4)
    for number, value in expected["per_question"].items():
        assert ours.of_question[int(number)] == pytest.approx(value, abs=1e-4), number


@pytest.mark.parametrize("folder", VQA, ids=lambda p: p.name)
def test_matches_of_ten(folder: Path) -> None:
    for count, percent in _load(folder / "loo_table.json")["table"].items():
        answers = ["yes"] * int(count) + ["no"] * (10 - int(count))
        assert 100 * answer_accuracy("yes", answers) == pytest.approx(percent)


@pytest.mark.parametrize(("path", "name"), NLVR2)
def test_nlvr2(path: Path, name: str) -> None:
    held = _load(path)
    (case,) = (one for one in held["cases"] if one["name"] == name)
    labels = {one["identifier"]: one["label"] for one in held["examples"]}
    ours = reasoning_scores(labels, case["predictions"])
    assert ours.accuracy == pytest.approx(100 * case["expected"]["accuracy"], abs=1e-6)
    assert ours.consistency == pytest.approx(100 * case["expected"]["consistency"], abs=1e-6)


@pytest.mark.parametrize("path", _files("grounding.json"), ids=lambda p: p.parent.name)
def test_overlap(path: Path) -> None:
    for pair in _load(path)["iou_pairs"]:
        one, other = pair["box1_xywh"], pair["box2_xywh"]
        assert overlap(one, other, pixels=True) == pytest.approx(pair["iou_albef"], abs=1e-9)
        assert overlap(one, other) == pytest.approx(pair["iou_continuous"], abs=1e-9)


@pytest.mark.parametrize("path", _files("grounding.json"), ids=lambda p: p.parent.name)
def test_choice_among_proposals(path: Path) -> None:
    held = _load(path)
    known = {one["ref_id"]: one for one in held["per_ref_alpha0_5"]}
    for alpha, expected in held["expected_by_alpha"].items():
        right: dict[str, list[bool]] = {}
        for ref in held["refs"]:
            size = (ref["width"], ref["height"])
            heat = torch.tensor(ref["heatmap_24x24"])
            choice = choose(heat, size, ref["proposals_xywh"], ref["gt_box_xywh"], float(alpha))
            right.setdefault(f"{ref['split']}_d", []).append(choice.right)
            if float(alpha) == 0.5 and ref["ref_id"] in known:
                official = known[ref["ref_id"]]
                assert choice.scores == pytest.approx(official["scores_alpha0_5"], rel=1e-4, abs=1e-4)
                assert choice.chosen == official["chosen"]
                assert choice.overlap == pytest.approx(official["iou"], abs=1e-6)
        assert {name: sum(hits) / len(hits) for name, hits in right.items()} == pytest.approx(expected)


@pytest.mark.parametrize("path", _files("zeroshot.json"), ids=lambda p: p.parent.name)
def test_zero_shot(path: Path) -> None:
    held = _load(path)
    texts = torch.tensor(held["text_embeddings_class_template_dim"])
    scores = class_scores(torch.tensor(held["image_embeddings"]), class_features(texts))
    torch.testing.assert_close(100 * scores[0], torch.tensor(held["first_logits"]), rtol=1e-4, atol=1e-3)
    ours = classification(scores, torch.tensor(held["labels"]), [str(i) for i in range(len(texts))])
    assert ours.top1 == pytest.approx(100 * held["expected"]["acc1"])
    assert ours.top5 == pytest.approx(100 * held["expected"]["acc5"])
    assert ours.mean_recall == pytest.approx(100 * held["expected"]["mean_per_class_recall"])


@pytest.mark.parametrize("path", _files("compositional.json"), ids=lambda p: p.parent.name)
def test_pairs_of_captions_and_cola(path: Path) -> None:
    held = _load(path)
    true, false = (torch.tensor([one[side] for one in held["pairwise"]["items"]]) for side in ("pos", "neg"))
    strict = 100 * float(pairwise_correct(true, false).double().mean())
    assert strict == pytest.approx(held["pairwise"]["sugarcrepe_strict_gt"])
    assert strict == pytest.approx(held["pairwise"]["aro_vg_argmax_ties_to_negative"])
    kind = 100 * float(pairwise_correct(true, false, "optimistic").double().mean())
    assert kind == pytest.approx(held["pairwise"]["clip_benchmark_argmax_ties_to_positive"])
    scores = torch.tensor([one["scores_image_by_caption"] for one in held["winoground"]["items"]])
    assert binding_scores(scores)["image"] == pytest.approx(held["winoground"]["cola"])
