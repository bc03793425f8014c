"""What the golden metrics do not hold: errors, ties, training targets, the pointing game, per-class reports."""

from __future__ import annotations

import pytest
import torch

from imglish.evaluation.grounding import GroundingError, choose, points_at
from imglish.evaluation.metrics import ScoreError, pairwise_correct, percent_by_group
from imglish.evaluation.nlvr2 import ReasoningError, reasoning_scores
from imglish.evaluation.vqa import (
    AnsweredQuestion,
    VqaError,
    answer_weights,
    normalise_answer,
    soft_targets,
    vqa_scores,
)
from imglish.evaluation.zeroshot import class_features, classification


def test_contractions_and_periods() -> None:
    assert normalise_answer("The dog, he isnt 1,000\n") == "dog he isn't 1000"
    assert normalise_answer("somebody'd") == "somebodyd"
    assert normalise_answer("yall'd've") == "y'all'd've"
    assert normalise_answer("lets") == "lets"
    assert normalise_answer("." * 40 + "x") == "." * 8 + "x"  # the script removes 32 periods at most


def test_answers_of_equal_people_are_not_lost() -> None:
    """The script compares annotations as dictionaries: without ids, equal answers would take each other out."""
    question = AnsweredQuestion(7, ("yes",) * 10)
    assert vqa_scores([question], {7: "yes"}).overall == 100.0


def test_vqa_errors_name_the_question() -> None:
    question = AnsweredQuestion(7, ("yes", "no"))
    with pytest.raises(VqaError, match="7 has no prediction"):
        vqa_scores([question], {})
    with pytest.raises(VqaError, match="7 comes twice"):
        vqa_scores([question, question], {7: "yes"})
    with pytest.raises(VqaError, match="7: the answers are one string"):
        AnsweredQuestion(7, "yes")  # type: ignore[arg-type]
    with pytest.raises(VqaError, match="no questions"):
        vqa_scores([], {})


def test_targets_of_training() -> None:
    answers = ["a dog"] * 2 + ["dog"] + ["cat"] * 7
    assert soft_targets(answers) == pytest.approx({"dog": 0.9, "cat": 1.0})
    assert answer_weights(answers) == pytest.approx({"a dog": 0.2, "dog": 0.1, "cat": 0.7})


def test_reasoning() -> None:
    labels: dict[str, str | bool] = {"dev-1-0-0": "True", "dev-1-1-0": "False", "dev-2-0-1": True}
    scores = reasoning_scores(labels, {"dev-1-0-0": "true", "dev-1-1-0": "true", "dev-2-0-1": True})
    assert scores.accuracy == pytest.approx(200 / 3)
    assert (scores.consistency, scores.sentences) == (50.0, 2)
    with pytest.raises(ReasoningError, match="dev-1-0-0 has no prediction"):
        reasoning_scores(labels, {})
    with pytest.raises(ReasoningError, match="neither true nor false"):
        reasoning_scores({"dev-1-0-0": "maybe"}, {"dev-1-0-0": "true"})
    with pytest.raises(ReasoningError, match="comes twice"):
        reasoning_scores([("dev-1-0-0", True)] * 2, {"dev-1-0-0": True})


def test_pointing_game_and_no_positive_score() -> None:
    heat = torch.zeros(4, 4)
    heat[0, 3] = 1.0
    assert points_at(heat, (40, 40), [(30, 0, 10, 10)])
    assert not points_at(heat, (40, 40), [(0, 30, 10, 10)])
    assert not points_at(heat, (40, 40), [(20, 0, 12, 10)])
    assert points_at(heat, (40, 40), [(20, 0, 12, 10)], tolerance=15)
    choice = choose(-torch.ones(4, 4), (40, 40), [(0, 0, 20, 20), (20, 20, 4, 4)], (20, 20, 4, 4))
    assert choice.chosen == 1
    assert choice.right
    with pytest.raises(GroundingError, match="no proposals"):
        choose(heat, (40, 40), [], (0, 0, 1, 1))
    with pytest.raises(GroundingError, match="not a number"):
        choose(heat.log() * 0, (40, 40), [(0, 0, 4, 4)], (0, 0, 1, 1))


def test_a_constant_scorer_classifies_nothing() -> None:
    found = classification(torch.ones(4, 3), torch.tensor([0, 1, 2, 0]), ["a", "b", "c"])
    assert (found.top1, found.mean_recall, found.ties) == (0.0, 0.0, 100.0)


def test_report_of_classes() -> None:
    scores = torch.tensor([[3.0, 1, 0], [1, 3, 0], [1, 3, 0], [0, 3, 1]])
    found = classification(scores, torch.tensor([0, 0, 0, 1]), ["a", "b", "c"])
    first, second, third = found.classes
    assert first.recall == pytest.approx(100 / 3)
    assert (first.pictures, first.taken_for, first.taken) == (3, "b", 2)
    assert (second.recall, second.taken_for) == (100.0, "")
    assert third.pictures == 0
    assert found.mean_recall == pytest.approx((100 / 3 + 100) / 2)  # without the class that has no picture
    assert found.top5 == 100.0
    with pytest.raises(ValueError, match="labels reach"):
        classification(scores, torch.tensor([0, 0, 0, 3]), ["a", "b", "c"])


def test_templates_weigh_the_same() -> None:
    texts = torch.tensor([[[100.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(class_features(texts), torch.full((1, 2), 0.5**0.5))


def test_pairs_and_groups() -> None:
    true, false = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    assert pairwise_correct(true, false).tolist() == [True, False, False]
    assert pairwise_correct(true, false, "optimistic").tolist() == [True, True, False]
    assert percent_by_group(pairwise_correct(true, false), ["on", "in", "on"]) == {"in": 0.0, "on": 50.0}
    assert percent_by_group(pairwise_correct(true, false), ["on", "in", "on"], least=2) == {"on": 50.0}
    with pytest.raises(ScoreError, match="pair 1 has a score"):
        pairwise_correct(torch.tensor([0.0, torch.nan]), torch.zeros(2))
