from __future__ import annotations

import numpy as np
import pytest

from imglish.data.dataset import pack_masked
from imglish.data.masking import MaskConfig, mask_tokens
from tests.data.samples import CAPTIONS, tokenizer


def test_shares_of_masking() -> None:
    ids = tokenizer().encode(["a dog runs over the snow"])[0] * 4000
    text = ~tokenizer().is_special[np.asarray(ids)]
    masked, positions, labels = mask_tokens(ids, np.random.default_rng(0), tokenizer())
    assert len(positions) / text.sum() == pytest.approx(0.15, abs=0.01)
    assert labels == [ids[p] for p in positions]
    assert set(np.flatnonzero(np.asarray(masked) != np.asarray(ids))) <= set(positions)
    new = np.asarray([masked[p] for p in positions])
    same = (new == np.asarray(labels)).mean()
    assert (new == tokenizer().mask_id).mean() == pytest.approx(0.8, abs=0.02)
    assert 0.09 < same < 0.14  # 10 % stay, a few random tokens are the old one
    assert not tokenizer().is_special[new[new != tokenizer().mask_id]].any()


def test_special_tokens_are_never_masked() -> None:
    t = tokenizer()
    ids = [t.cls_id, t.ordinary_ids[3], t.sep_id, t.pad_id]
    _, positions, _ = mask_tokens(ids, np.random.default_rng(0), t, probability=1.0)
    assert positions == [1]


def test_whole_words_share_one_fate() -> None:
    t = tokenizer()
    ids = t.encode(["snowstorm playing snowstorm trousers"])[0]
    starts = np.asarray(t.word_starts(ids))
    assert not starts.all(), "the test needs words of several pieces"
    words = np.cumsum(starts)
    some_split = False
    for seed in range(300):
        masked, positions, _ = mask_tokens(ids, np.random.default_rng(seed), t, 0.5, whole_word=True)
        chosen = np.isin(np.arange(len(ids)), positions)
        hidden = np.asarray(masked) == t.mask_id
        for word in np.unique(words):
            assert len(set(chosen[words == word])) == 1
            assert len(set(hidden[words == word])) == 1
        _, single, _ = mask_tokens(ids, np.random.default_rng(seed), t, 0.5)
        loose = np.isin(np.arange(len(ids)), single)
        some_split |= any(len(set(loose[words == word])) > 1 for word in np.unique(words))
    assert some_split


def test_nothing_to_mask_is_well_defined() -> None:
    t = tokenizer()
    assert mask_tokens([t.cls_id], np.random.default_rng(0), t, 1.0) == ([t.cls_id], [], [])
    assert mask_tokens([], np.random.default_rng(0), t, 1.0, whole_word=True) == ([], [], [])
    assert mask_tokens(t.encode([CAPTIONS[0]])[0], np.random.default_rng(0), t, 0.0)[1:] == ([], [])
    packed = pack_masked([([1, 2], [], []), ([3], [], [])])
    assert packed is not None
    assert (packed.ids.tolist(), packed.rows.shape, packed.labels.shape, packed.counts) == (
        [1, 2, 3],
        (0,),
        (0,),
        (0, 0),
    )
    assert pack_masked([]) is None


def test_packing_moves_positions_to_rows() -> None:
    packed = pack_masked([([9, 4, 9], [0, 2], [1, 3]), ([5], [], []), ([9, 6], [0], [7])])
    assert packed is not None
    assert packed.rows.tolist() == [0, 2, 4]
    assert packed.labels.tolist() == [1, 3, 7]
    assert packed.counts == (2, 0, 1)


def test_impossible_probability() -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        MaskConfig(1.5)
