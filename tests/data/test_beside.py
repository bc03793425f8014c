"""Pictures alone and texts alone beside the pairs: masked, in orders of their own, the same for any ranks."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from imglish.data.batch import Batch
from imglish.data.dataset import PairDataset
from imglish.data.images import ImageTransform
from imglish.data.loader import Beside, Position, training_batches
from imglish.data.masking import MaskConfig
from imglish.data.patch_masks import PatchMaskConfig
from tests.data.samples import records, tokenizer

TRANSFORM = ImageTransform(16, crop_scale=(0.3, 1.0), flip=True)
MASKS = PatchMaskConfig(0.4, 2)


def pairs() -> PairDataset:
    return PairDataset(records(9), TRANSFORM, tokenizer(), mlm=MaskConfig(0.5), mim=MASKS, patch=4)


def beside(pictures: int = 4, texts: int = 6) -> Beside:
    alone = PairDataset(records(10), TRANSFORM, None, mim=MASKS, patch=4)
    words = PairDataset(records(8), None, tokenizer(), captions="all", mlm=MaskConfig())
    return Beside(alone, words, pictures, texts)


START = Position()


def some(count: int, position: Position = START, rank: int = 0, world: int = 1, workers: int = 0) -> list[Batch]:
    batches = training_batches(
        pairs(), 4, position, seed=3, rank=rank, world_size=world, workers=workers, beside=beside()
    )
    return [batch for batch, _ in islice(batches, count)]


def test_a_batch_has_all_kinds() -> None:
    (batch,) = some(1)
    assert batch.unpaired is not None
    assert batch.unpaired.sizes == (4, 6)
    assert len(batch) == 4
    assert batch.patches is not None
    assert batch.patches.patches == batch.unpaired.patches.patches == 16
    assert 0 < max(batch.unpaired.patches.counts) <= 6
    masked, texts = batch.unpaired.masked, batch.unpaired.texts
    assert torch.equal(texts.ids[masked.rows], masked.labels)


def test_masking_of_pairs_and_of_texts_alone_differs() -> None:
    batches = some(20)
    alone = [b.unpaired for b in batches if b.unpaired is not None]
    of_pairs = sum(sum(b.masked.counts) for b in batches if b.masked is not None)
    share = of_pairs / sum(b.texts.segments.total - 2 * len(b.texts) for b in batches)
    share_alone = sum(sum(u.masked.counts) for u in alone) / sum(
        u.texts.segments.total - 2 * len(u.texts) for u in alone
    )
    assert 0.4 < share < 0.6
    assert 0.08 < share_alone < 0.25


def test_every_picture_comes_once_before_any_comes_again() -> None:
    seen = [u.images for b in some(5) if (u := b.unpaired) is not None]
    first = torch.cat(seen[:2])  # 10 pictures, 4 a batch: two whole batches an epoch
    assert len({tuple(picture.flatten().tolist()) for picture in first}) == 8


def same(one: Batch, other: Batch) -> None:
    assert one.unpaired is not None
    assert other.unpaired is not None
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.unpaired.images, other.unpaired.images)
    assert torch.equal(one.unpaired.patches.rows, other.unpaired.patches.rows)
    assert torch.equal(one.unpaired.masked.ids, other.unpaired.masked.ids)


def test_position_workers_and_ranks_change_nothing() -> None:
    whole = some(6)
    for start, position in ((1, Position(0, 4)), (3, Position(1, 4))):  # 9 pairs: two batches an epoch
        for one, other in zip(whole[start:], some(6 - start, position), strict=True):
            same(one, other)
    for one, other in zip(whole, some(6, workers=2), strict=True):
        same(one, other)
    ranks = [some(6, rank=rank, world=2) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert batch.unpaired is not None
        parts = [ranks[rank][number].unpaired for rank in range(2)]
        images = torch.cat([part.images for part in parts if part is not None])
        ids = torch.cat([part.texts.ids for part in parts if part is not None])
        assert torch.equal(images, batch.unpaired.images)
        assert torch.equal(ids, batch.unpaired.texts.ids)


def test_sizes_that_cannot_be_given() -> None:
    with pytest.raises(ValueError, match="11 pictures a batch"):
        beside(11).sizes(1)
    with pytest.raises(ValueError, match="2 ranks"):
        beside(4, 5).sizes(2)
