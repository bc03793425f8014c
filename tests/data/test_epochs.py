"""The order of an epoch and what a mixture shows in it: exact, even, and good enough a shuffle."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from imglish.data.epochs import EpochItems, scattered
from imglish.data.loader import epoch_order
from imglish.data.sources.base import Part


def shown(items: EpochItems, seed: int, epoch: int) -> list[int]:
    return [items.item(seed, epoch, place) for place in range(len(items))]


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_scattered_is_a_permutation_that_the_key_chooses(count: int) -> None:
    one = [scattered(i, count, (5, 1, 2)) for i in range(count)]
    assert sorted(one) == list(range(count))
    if count > 16:
        assert one != list(range(count))
        assert one != [scattered(i, count, (5, 1, 3)) for i in range(count)]
        assert one != [scattered(i, count, (6, 1, 2)) for i in range(count)]


def test_scattered_moves_every_item_everywhere() -> None:
    """Chi-squared of where position 3 of 20 goes under 4,000 keys: 19 degrees of freedom, 43.8 is the 0.1 % limit."""
    counts = np.bincount([scattered(3, 20, (key, 0, 0)) for key in range(4000)], minlength=20)
    assert ((counts - 200) ** 2 / 200).sum() < 43.8


def test_one_part_is_its_own_items() -> None:
    assert shown(EpochItems((Part(0, 7),)), 3, 4) == list(range(7))


def test_whole_weights_repeat_every_record() -> None:
    items = EpochItems((Part(0, 4, 2), Part(4, 7)))
    for epoch in range(3):
        assert Counter(shown(items, 1, epoch)) == Counter({0: 2, 1: 2, 2: 2, 3: 2, 4: 1, 5: 1, 6: 1})


@pytest.mark.parametrize(("weight", "places"), [(0.5, 5), (0.3, 3), (1.5, 15), (0.01, 1), (2.7, 27)])
def test_broken_weights_show_all_of_a_part_before_any_again(weight: float, places: int) -> None:
    items = EpochItems((Part(0, 3), Part(3, 13, weight)))
    assert len(items) == 3 + places
    row: list[int] = []
    for epoch in range(20):
        now = shown(items, 9, epoch)
        assert sorted(now[:3]) == [0, 1, 2]
        row += now[3:]
    for begin in range(0, len(row) - 9, 10):  # each pass is complete
        assert sorted(row[begin : begin + 10]) == list(range(3, 13))
    assert shown(items, 9, 2) == shown(items, 9, 2)
    if weight not in (0.01, 1.5, 2.7):
        assert set(shown(items, 9, 0)) != set(shown(items, 8, 0))


def test_items_may_be_captions() -> None:
    starts = np.array([0, 2, 5, 6])  # of three records, in two parts
    items = EpochItems.of((Part(0, 2, 2), Part(2, 3)), starts)
    assert Counter(shown(items, 0, 0)) == Counter({0: 2, 1: 2, 2: 2, 3: 2, 4: 2, 5: 1})


def test_parts_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="no items"):
        EpochItems((Part(3, 3),))
    for weight in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expected a number above 0"):
            EpochItems((Part(0, 3, weight),))
    with pytest.raises(IndexError, match="beyond the 3"):
        EpochItems((Part(0, 3),)).item(0, 0, 3)


# ---- the shuffle ----------------------------------------------------------------------------------------------------


def test_every_item_comes_at_every_place() -> None:
    """Chi-squared over 60 items x 60 places of 6,000 epochs, 100 expected in each cell.

    Rows and columns add up to the same number, so there are 59 * 59 = 3,481 degrees of freedom: mean 3,481, standard
    deviation 83.4; the limits lie at 4.5 deviations.
    """
    counts = np.zeros((60, 60))
    for epoch in range(6000):
        counts[epoch_order(60, 11, epoch), np.arange(60)] += 1
    statistic = float(((counts - 100) ** 2 / 100).sum())
    assert abs(statistic - 3481) < 4.5 * 83.4


def test_neighbours_in_the_data_are_no_neighbours_in_the_order() -> None:
    """Shards hold similar samples one behind the other: how far apart two neighbours land must be as by chance."""
    count, epochs = 2000, 30
    apart, pairs = [], 0
    for epoch in range(epochs):
        place = np.argsort(epoch_order(count, 5, epoch))
        distance = np.abs(np.diff(place))
        apart.append(distance.mean())
        pairs += int((distance == 1).sum())
    # |i - j| of two places drawn at random: mean (n + 1) / 3, variance (n + 1)(n - 2) / 18
    error = ((count + 1) * (count - 2) / 18) ** 0.5 / ((count - 1) * epochs) ** 0.5
    assert abs(np.mean(apart) - (count + 1) / 3) < 4.5 * error
    assert abs(pairs - 2 * epochs) < 4.5 * (2 * epochs) ** 0.5  # adjacent ones are Poisson with mean 2 an epoch


def test_epochs_and_seeds_do_not_hang_together() -> None:
    orders = [epoch_order(5000, seed, epoch) for seed in (1, 2) for epoch in range(10)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / 5000**0.5
            assert (one == other).sum() < 10  # fixed points are Poisson with mean 1
