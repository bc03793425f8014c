"""Cached decoding equals the whole forward pass, for sequences of any lengths, reordered, multiplied and dropped."""

from __future__ import annotations

import pytest
import torch
from tests.generation.toy import ToyCaptioner, pictures

from imglish.data.batch import TextBatch
from imglish.models.captioning import CaptionState
from imglish.nn.cache import SequenceCache
from imglish.nn.segments import Segments


class Check:
    """Feeds a model and compares with what it computes without a cache."""

    def __init__(self, count: int, room: int = 12) -> None:
        self.model, self.images = ToyCaptioner(), pictures(count)
        self.state = self.model.start_captions(self.model.encode_images(self.images), room)
        self.owner, self.texts = list(range(count)), [[] for _ in range(count)]

    @torch.no_grad()
    def feed(self, *new: list[int]) -> None:
        self.texts = [old + more for old, more in zip(self.texts, new, strict=True)]
        logits = self.model.continue_captions(self.state, TextBatch.of(new))
        wanted = [self.model.whole(self.images[o], ids) for o, ids in zip(self.owner, self.texts, strict=True)]
        torch.testing.assert_close(logits, torch.stack(wanted))

    def select(self, *order: int) -> None:
        self.state.select(order)
        self.owner, self.texts = [self.owner[i] for i in order], [self.texts[i] for i in order]


def test_equal_lengths_token_by_token() -> None:
    check = Check(2)
    check.feed([1, 2, 3], [4, 5, 6])
    check.feed([7], [8])
    check.feed([9, 1], [2, 3])


def test_prompts_of_different_lengths() -> None:
    check = Check(3)
    check.feed([1, 2, 3], [4], [5, 6])
    check.feed([7], [8, 9, 2], [1])
    check.feed([7], [8], [1])


def test_beams_are_multiplied_reordered_and_dropped() -> None:
    check = Check(3)
    check.feed([1, 2], [3, 4], [5, 6])
    check.select(0, 0, 1, 1, 1, 2, 2)
    check.feed(*([i] for i in range(7)))
    check.select(1, 1, 3, 2, 3, 5)
    check.feed([1], [2], [3], [4], [5], [6])
    check.select(0, 1, 5, 5)  # the second picture is finished and leaves the memory
    assert check.state.memory.segments.count == 2
    check.feed([7], [8], [9], [1])
    check.select(3)
    assert check.state.memory.segments.count == 1
    check.feed([4])


def test_a_finished_picture_may_stay_for_a_while() -> None:
    check = Check(5)
    check.feed(*([i] for i in range(5)))
    check.select(0, 1, 3, 4)
    assert check.state.memory.segments.count == 5  # one of five: letting go would cost more than it saves
    check.feed([1], [2], [3], [4])


def test_reordering_copies_only_what_moves() -> None:
    check = Check(4)
    check.feed([1], [2], [3], [4])
    pair = check.state.cache._buffers[0]
    assert pair is not None
    address, kept = pair[0].data_ptr(), pair[0][1].clone()
    check.select(0, 1, 2)
    check.feed([1], [2], [3])
    after = check.state.cache._buffers[0]
    assert after is not None
    assert after[0].data_ptr() == address
    assert torch.equal(after[0][1, :1], kept[:1])


def test_forget_takes_back_a_row() -> None:
    check = Check(2)
    check.feed([1, 2], [3])
    check.feed([9], [9])
    check.state.cache.forget(1)
    check.texts = [ids[:-1] for ids in check.texts]
    check.feed([4], [5])
    with pytest.raises(ValueError, match="fewer"):
        check.state.cache.forget(5)


def test_errors() -> None:
    cache = SequenceCache(layers=1, sequences=2, room=3)
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="3 sequences"):
        cache.extend(Segments((1, 1, 1)), cpu)
    with pytest.raises(ValueError, match="one new row"):
        cache.extend(Segments((1, 0)), cpu)
    with pytest.raises(ValueError, match="room for 3"):
        cache.extend(Segments((1, 4)), cpu)
    model = ToyCaptioner()
    state: CaptionState = model.start_captions(model.encode_images(pictures(2)), 4)
    with pytest.raises(ValueError, match="order of their pictures"):
        state.select([1, 0])
