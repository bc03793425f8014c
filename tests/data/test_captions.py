"""Several captions of one picture in one sample."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

from imglish.data.dataset import PairDataset, collate
from imglish.data.images import ImageTransform
from imglish.data.loader import training_batches
from imglish.data.masking import MaskConfig
from tests.data.samples import CAPTIONS, records, tokenizer

TRANSFORM = ImageTransform(16, crop_scale=(0.3, 1.0), flip=True)


def dataset(captions: int, given: tuple[str, ...] = CAPTIONS, count: int = 6) -> PairDataset:
    return PairDataset(records(count, given), TRANSFORM, tokenizer(), captions=captions)


def test_a_sample_holds_different_captions_of_its_picture() -> None:
    data = dataset(3)
    assert len(data) == 6
    known = {tuple(ids) for ids in tokenizer().encode(list(CAPTIONS))}
    seen = set()
    for epoch in range(20):
        sample = data.sample(7, epoch, 2)
        ids = [tuple(x) for x in (sample.ids, *sample.more)]
        assert len(ids) == len(set(ids)) == 3
        assert set(ids) <= known
        seen.add(tuple(ids))
    assert len(seen) > 10  # which and in which order changes with the epoch


def test_a_picture_with_fewer_captions_repeats_some() -> None:
    few = records(1, CAPTIONS[:2])
    data = PairDataset([*records(1), *few], TRANSFORM, tokenizer(), captions=4)
    sample = data.sample(0, 0, 1)
    ids = [tuple(x) for x in (sample.ids, *sample.more)]
    assert len(ids) == 4
    assert len(set(ids)) == 2


def test_the_batch_counts_captions_and_keeps_them_beside_their_picture() -> None:
    data = dataset(2)
    samples = [data.sample(0, 0, item) for item in range(4)]
    batch = collate(samples)
    assert (len(batch), batch.captions, len(batch.texts), batch.images.shape[0]) == (4, 2, 8, 4)
    expected = [ids for sample in samples for ids in (sample.ids, *sample.more)]
    assert batch.texts.ids.tolist() == [i for ids in expected for i in ids]
    assert batch.to("cpu").captions == 2


def test_order_and_choices_do_not_depend_on_ranks() -> None:
    whole = [batch for batch, _ in islice(training_batches(dataset(2), 4, seed=3), 3)]
    ranks = [
        [batch for batch, _ in islice(training_batches(dataset(2), 4, seed=3, rank=rank, world_size=2), 3)]
        for rank in range(2)
    ]
    for number, batch in enumerate(whole):
        assert torch.equal(batch.texts.ids, torch.cat([r[number].texts.ids for r in ranks]))


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="5 captions a picture are wanted, the records have up to 4"):
        dataset(5)
    swapped = [replace(record, swapped=record.captions) for record in records(3)]
    with pytest.raises(ValueError, match="one caption a picture"):
        PairDataset(swapped, TRANSFORM, tokenizer(), captions=2, swapped=True)


def test_every_caption_is_masked_by_itself() -> None:
    data = PairDataset(records(3), TRANSFORM, tokenizer(), captions=2, mlm=MaskConfig(0.5))
    batch = collate([data.sample(0, 0, item) for item in range(3)])
    assert batch.masked is not None
    assert len(batch.masked.counts) == len(batch.texts) == 6
    assert torch.equal(batch.texts.ids[batch.masked.rows], batch.masked.labels)
    assert min(batch.masked.counts[1::2]) > 0
