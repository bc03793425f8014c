"""Teacher, queue, hard negatives and masked-language loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from imglish.objectives.itm import draw_negatives, has_negative, itm_loss, itm_prior_entropy, negative_weights
from imglish.objectives.mlm import mlm_loss
from imglish.objectives.momentum import FeatureQueue, MomentumTeacher, TeacherConfig, distilled_itc


@given(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_queue_keeps_the_last_entries_for_any_batch_size(size: int, batches: list[int]) -> None:
    queue = FeatureQueue(size, 2, torch.device("cpu"))
    seen = 0
    for count in batches:
        ids = torch.arange(seen, seen + count)
        queue.push(ids[:, None].repeat(1, 2).float(), -ids[:, None].repeat(1, 2).float(), ids)
        seen += count
    image, text, ids = queue.content()
    assert sorted(ids.tolist()) == list(range(max(0, seen - size), seen))
    assert torch.equal(image[:, 0], ids.float())
    assert torch.equal(text[:, 1], -ids.float())


def test_alpha_ramps_linearly() -> None:
    teacher = MomentumTeacher(torch.nn.Linear(2, 2), TeacherConfig(alpha=0.4, ramp_epochs=2, queue_size=4), 2)
    assert teacher.alpha == 0
    seen = []
    for epochs in (0.0, 0.5, 1.0, 2.0, 7.0):
        teacher.at(epochs)
        seen.append(round(teacher.alpha, 6))
    assert seen == [0.0, 0.1, 0.2, 0.4, 0.4]


def test_blend_is_a_moving_average_and_the_student_stays() -> None:
    student = torch.nn.Linear(3, 3)
    teacher = MomentumTeacher(student, TeacherConfig(momentum=0.9, queue_size=0), 3)
    start = student.weight.detach().clone()
    with torch.no_grad():
        student.weight.add_(1.0)
    teacher.blend(student)
    torch.testing.assert_close(teacher.model.weight, start + 0.1)
    torch.testing.assert_close(student.weight, start + 1.0)
    assert not teacher.model.weight.requires_grad


def test_state_round_trip_and_queue_after_update() -> None:
    student = torch.nn.Linear(2, 2)
    config = TeacherConfig(queue_size=3)
    teacher = MomentumTeacher(student, config, 2)
    teacher.remember(torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([5, 6]))
    assert teacher.queue is not None
    assert teacher.queue.filled == 0  # nothing enters before the update
    restored = MomentumTeacher(torch.nn.Linear(2, 2), config, 2)
    restored.load_state_dict(teacher.state_dict())
    assert restored.queue is not None
    assert restored.queue.content()[2].tolist() == [5, 6]
    torch.testing.assert_close(restored.model.weight, student.weight)
    with pytest.raises(ValueError, match="queue"):
        MomentumTeacher(student, TeacherConfig(queue_size=5), 2).load_state_dict(teacher.state_dict())


def test_distilled_itc_by_hand() -> None:
    torch.manual_seed(0)
    image, text, image_m, text_m = (F.normalize(torch.randn(3, 4), dim=1) for _ in range(4))
    teacher = MomentumTeacher(torch.nn.Linear(1, 1), TeacherConfig(queue_size=2, ramp_epochs=0, alpha=0.3), 4)
    queue = teacher.queue
    assert queue is not None
    queue.push(F.normalize(torch.randn(2, 4), dim=1), F.normalize(torch.randn(2, 4), dim=1), torch.tensor([1, 9]))
    ids, tau = torch.tensor([1, 2, 3]), torch.tensor(0.2)
    found = distilled_itc(image, text, image_m, text_m, ids, tau, teacher)
    total = 0.0
    for student, momentum, bank in (
        (image, image_m, torch.cat([text_m, queue.text])),
        (text, text_m, torch.cat([image_m, queue.image])),
    ):
        columns = torch.tensor([1, 2, 3, 1, 9])
        for b in range(3):
            hard = (columns == ids[b]).float()
            target = 0.3 * (momentum[b] @ bank.T / tau).softmax(0) + 0.7 * hard / hard.sum()
            total = total - (target * (student[b] @ bank.T / tau).log_softmax(0)).sum() / 6
    torch.testing.assert_close(found.loss, torch.as_tensor(total))


def test_negatives_follow_their_weights_and_never_share_an_id() -> None:
    similarity = torch.tensor([[9.0, 1.0, 0.0, -1.0], [0.0, 9.0, 2.0, 1.0]])
    ids, candidates = torch.tensor([0, 1]), torch.tensor([0, 1, 1, 3])
    weights = negative_weights(similarity, ids, candidates)
    torch.testing.assert_close(weights[0, 1:], torch.tensor([1.0, 0.0, -1.0]).softmax(0))
    assert weights[0, 0] == 0
    assert weights[1, 1:3].tolist() == [0, 0]
    draws = torch.linspace(0, 0.9999, 4000)
    counts = torch.bincount(draw_negatives(weights[:1].expand(4000, 4), draws), minlength=4) / 4000
    torch.testing.assert_close(counts, weights[0], atol=1e-3, rtol=0)
    nothing = negative_weights(similarity, ids, torch.zeros(4, dtype=torch.int64))
    assert has_negative(nothing).tolist() == [False, True]


def test_huge_similarities_still_give_a_negative() -> None:
    weights = negative_weights(torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([0]), torch.tensor([0, 1, 2]))
    assert draw_negatives(weights, torch.tensor([0.0])).item() == 1


def test_itm_counts_only_what_exists_and_knows_its_prior() -> None:
    logits = torch.randn(4, 2)
    labels = torch.tensor([1, 0, 0, 0])
    counted = torch.tensor([True, True, False, True])
    torch.testing.assert_close(itm_loss(logits, labels, counted), F.cross_entropy(logits[counted], labels[counted]))
    assert math.isclose(itm_prior_entropy(2), 0.6365, abs_tol=1e-4)
    share = torch.tensor([1 / 3, 2 / 3])
    torch.testing.assert_close(torch.tensor(itm_prior_entropy(2)), -(share * share.log()).sum())


def test_mlm_loss_mixes_and_survives_nothing_masked() -> None:
    logits, soft = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
    labels = torch.tensor([1, 4, 6])
    hard = F.cross_entropy(logits, labels)
    distilled = -(logits.log_softmax(1) * soft.softmax(1)).sum(1).mean()
    torch.testing.assert_close(mlm_loss(logits, labels), hard)
    torch.testing.assert_close(mlm_loss(logits, labels, soft, 0.4), 0.6 * hard + 0.4 * distilled)
    empty = mlm_loss(logits[:0], labels[:0])
    assert empty.item() == 0
    empty.backward()
