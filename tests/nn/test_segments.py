"""Index tensors of packed rows, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imglish.nn.segments import Grid, HostCopy, Segments

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=8).map(tuple)
CPU = torch.device("cpu")


@given(LENGTHS)
def test_indices_follow_from_the_lengths(lengths: tuple[int, ...]) -> None:
    segments = Segments(lengths)
    rows = [(n, p) for n, length in enumerate(lengths) for p in range(length)]
    assert segments.total == len(rows)
    assert segments.indices(CPU).tolist() == [n for n, _ in rows]
    assert segments.positions(CPU).tolist() == [p for _, p in rows]
    assert segments.slots(CPU).tolist() == [n * segments.longest + p for n, p in rows]
    assert segments.valid(CPU).sum(1).tolist() == list(lengths)
    assert segments.offsets(CPU).tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]


@given(LENGTHS, st.data())
def test_rows_of_an_order(lengths: tuple[int, ...], data: st.DataObject) -> None:
    segments = Segments(lengths)
    order = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=10))
    rows = np.arange(segments.total)
    expected = [row for n in order for row in rows[segments.bounds[n] : segments.bounds[n + 1]]]
    assert segments.rows_of(order).tolist() == expected
    assert segments.select(order).total == len(expected)


def test_host_copy_keeps_the_values() -> None:
    assert HostCopy(torch.tensor([[1, 2], [3, 4]])).numpy().tolist() == [[1, 2], [3, 4]]


def test_a_grid_knows_its_texts_by_a_mask_alone() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    grid = Grid(2, 3, mask)
    assert (grid.count, grid.total, grid.longest) == (2, 6, 3)
    assert grid.starts(CPU).tolist() == [0, 3]
    assert grid.ends(CPU).tolist() == [2, 3]
    assert grid.positions(CPU).tolist() == [0, 1, 2, 0, 1, 2]
    assert grid.indices(CPU).tolist() == [0, 0, 0, 1, 1, 1]
    assert grid.filled
    assert not Grid(2, 3).filled
    assert Grid(2, 3).ends(CPU).tolist() == [2, 5]
    assert grid == Grid(2, 3, mask)
    assert grid != Grid(2, 3)
    with pytest.raises(TypeError, match="cannot be traced"):
        grid.rows_of([0])
    with pytest.raises(TypeError, match="cannot be traced"):
        grid + grid
