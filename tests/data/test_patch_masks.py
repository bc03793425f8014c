"""Block-wise masks: never more than asked for, blocks of several patches, the same for the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

from imglish.data.patch_masks import PatchMaskConfig, block_mask, pack_patch_masks


def test_share_and_blocks() -> None:
    rng = np.random.default_rng(0)
    masks = [block_mask((14, 14), 75, rng) for _ in range(200)]
    counts = np.array([mask.sum() for mask in masks])
    assert counts.max() == 75
    assert counts.mean() > 73
    lonely = 0  # masked patches without a masked neighbour: rare in blocks, usual in noise of this density
    for mask in masks:
        padded = np.pad(mask, 1)
        near = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        lonely += int((mask & ~near).sum())
    assert lonely / counts.sum() < 0.01


def test_same_numbers_same_mask() -> None:
    config = PatchMaskConfig()
    first, again, other = (config.draw((14, 14), np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_small_grid_has_a_mask() -> None:
    config = PatchMaskConfig(ratio=0.4, min_patches=2)
    counts = [config.draw((5, 5), np.random.default_rng(seed)).sum() for seed in range(100)]
    assert max(counts) == 10
    assert np.mean(counts) > 9


def test_packing() -> None:
    masks = [np.zeros((2, 3), dtype=bool) for _ in range(3)]
    masks[0][1, 2] = masks[2][0, 0] = masks[2][1, 1] = True
    packed = pack_patch_masks(masks)
    assert packed is not None
    assert packed.patches == 6
    assert packed.rows.tolist() == [5, 12, 16]
    assert packed.counts == (1, 0, 2)
    assert pack_patch_masks([]) is None


@pytest.mark.parametrize("wrong", [{"ratio": 0.0}, {"ratio": 1.0}, {"min_patches": 0}, {"aspect": 2.0}])
def test_impossible_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        PatchMaskConfig(**wrong)  # type: ignore[arg-type]
