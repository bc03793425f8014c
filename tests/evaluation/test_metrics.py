from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imglish.evaluation.metrics import ScoreError, Ties, binding_scores, ranks, recalls, recalls_within


def _by_sorting(scores: Tensor, owner: Tensor, k: int) -> tuple[float, float]:
    """Recalls the slow way, for scores without ties."""
    texts = scores.argsort(1, descending=True)[:, :k]
    i2t = (owner[texts] == torch.arange(len(scores))[:, None]).any(1)
    images = scores.T.argsort(1, descending=True)[:, :k]
    t2i = (images == owner[:, None]).any(1)
    return 100 * i2t.double().mean().item(), 100 * t2i.double().mean().item()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_recalls_equal_sorting(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    owner = torch.randperm(90, generator=generator) % 30
    scores = torch.randn(30, 90, generator=generator)
    scores[owner, torch.arange(90)] += 1.5
    table = recalls(scores, owner, (1, 3, 10), chunk=chunk)
    for k in (1, 3, 10):
        assert (table[f"i2t_r{k}"], table[f"t2i_r{k}"]) == pytest.approx(_by_sorting(scores, owner, k))
    assert table["r_mean"] == pytest.approx((table["i2t_mean"] + table["t2i_mean"]) / 2)
    lazily = recalls(lambda a, b: scores[a:b], owner, (1, 3, 10), scores_t2i=lambda a, b: scores.T[a:b], images=30)
    assert lazily == table


@pytest.mark.parametrize("ties, expected", [("pessimistic", 0.0), ("optimistic", 100.0), ("stable_reversed", 25.0)])
def test_a_constant_scorer(ties: Ties, expected: float) -> None:
    table = recalls(torch.zeros(4, 4), torch.arange(4), (1, 2, 4), ties)
    assert table["i2t_r1"] == table["t2i_r1"] == expected
    assert table["i2t_ties"] == table["t2i_ties"] == 100.0


def test_the_tie_rate_counts_only_ties_that_touch_a_right_answer() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0], [2.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    assert recalls(scores, torch.arange(3), (1,))["i2t_ties"] == pytest.approx(100 / 3)


def test_text_queries_may_have_their_own_scores() -> None:
    table = recalls(torch.eye(3), torch.arange(3), (1,), scores_t2i=-torch.eye(3))
    assert (table["i2t_r1"], table["t2i_r1"]) == (100.0, 0.0)


def test_bad_scores_are_refused() -> None:
    scores = torch.eye(3)
    scores[1, 2] = float("nan")
    with pytest.raises(ScoreError, match="query 1 and candidate 2"):
        recalls(scores, torch.arange(3))
    with pytest.raises(ScoreError, match="shape"):
        recalls(torch.eye(3), torch.tensor([0, 1]))
    with pytest.raises(ScoreError, match="picture 2 has no caption"):
        recalls(torch.eye(3), torch.tensor([0, 1, 1]))
    with pytest.raises(ScoreError, match="owner"):
        recalls(torch.eye(3), torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="ties"):
        recalls(torch.eye(3), torch.arange(3), ties="random")  # type: ignore[arg-type]


def test_a_k_beyond_the_set_is_said() -> None:
    with pytest.warns(UserWarning, match=r"R@5, R@10 over 3 candidates"):
        assert recalls(torch.eye(3), torch.arange(3))["i2t_r10"] == 100.0


def test_within_a_set_a_member_does_not_find_itself() -> None:
    features = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    table = recalls_within(features, torch.tensor([5, 5, 7, 8]), "i2i", (1,))
    assert table is not None
    assert table["i2i_r1"] == 100.0  # itself would always come first and be no partner
    assert table["i2i_queries"] == 2
    assert recalls_within(features, torch.arange(4), "i2i") is None
    rank, _ = ranks(features @ features.T, torch.tensor([5, 5, 7, 8]), torch.tensor([5, 5, 7, 8]), not_itself=True)
    assert rank.tolist() == [0, 0, -1, -1]


def test_binding_scores_are_strict() -> None:
    right, wrong_text = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [0.0, 3.0]]
    assert binding_scores(torch.tensor([right, wrong_text])) == {"text": 50.0, "image": 100.0, "group": 50.0}
    assert binding_scores(torch.ones(2, 2, 2)) == {"text": 0.0, "image": 0.0, "group": 0.0}
    with pytest.raises(ScoreError):
        binding_scores(torch.full((1, 2, 2), float("nan")))
