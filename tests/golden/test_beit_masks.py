"""BEiT's block-wise masks against the official generator, number for number."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imglish.data.patch_masks import block_mask
from tests.golden.support import Case, cases


class Standard:
    """The standard library's generator, which the official code draws from, under the names of ours."""

    def __init__(self, seed: int) -> None:
        self.inner = random.Random(seed)

    def random(self) -> float:
        return self.inner.random()

    def integers(self, low: int, /) -> int:
        return self.inner.randint(0, low - 1)  # called with one bound, as numpy's generator, that bound is the upper


def setting(config: dict[str, Any]) -> tuple[tuple[int, int], int, int]:
    side = config["input_size"]
    grid = (side, side) if isinstance(side, int) else tuple(side)
    return grid, config["num_masking_patches"], config["min_num_patches"]


@pytest.mark.parametrize("path", cases("beit-mask"), ids=lambda p: p.name)
def test_block_masks(path: Path) -> None:
    case = Case(path)
    for name, config in case.config.items():
        assert config.get("max_num_patches") is None, "no published setting limits the size of a block"
        grid, count, least = setting(config)
        expected = case.outputs[f"{name}.masks"].numpy().astype(bool)
        for seed, mask in enumerate(expected):
            assert np.array_equal(block_mask(grid, count, Standard(seed), least), mask), f"{name}, seed {seed}"
        draws = Standard(12345)
        calls = int(case.outputs[f"{name}.count_histogram"].sum())
        masks = np.stack([block_mask(grid, count, draws, least) for _ in range(calls)])
        counts = masks.sum((1, 2))
        histogram = np.bincount(counts, minlength=count + 1)
        assert np.array_equal(histogram, case.outputs[f"{name}.count_histogram"].numpy())
        assert np.allclose(masks.mean(0), case.outputs[f"{name}.mean_map"].numpy())
        assert np.isclose(counts.mean(), float(case.outputs[f"{name}.mean_count"]))
