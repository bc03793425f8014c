from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

from imglish.data.batch import Batch
from imglish.data.dataset import PairDataset, Sample, collate
from imglish.data.images import ImageTransform
from imglish.data.loader import training_batches
from imglish.data.masking import MaskConfig
from imglish.data.mixgen import MixGen
from imglish.data.tokenizers import Tokenizer
from tests.data.samples import CAPTIONS, records, tokenizer

CLOSED = Tokenizer.train_wordpiece(CAPTIONS * 3, 60, max_length=40, append_sep=True)


def dataset(words: Tokenizer) -> PairDataset:
    made = [replace(record, swapped=record.captions[::-1]) for record in records(16)]
    return PairDataset(made, ImageTransform(16), words, mlm=MaskConfig(0.4), swapped=True)


def samples(words: Tokenizer, count: int = 8) -> list[Sample]:
    made = dataset(words)
    return [made.sample(0, 0, item) for item in range(count)]


@pytest.mark.parametrize("words", [tokenizer(), CLOSED], ids=["open", "closed"])
def test_texts_are_joined_between_their_special_tokens(words: Tokenizer) -> None:
    plain = samples(words)
    mixed = replace(MixGen.of(4, words), max_length=90).join(plain)
    end = int(words.append_sep)
    assert [a is b for a, b in zip(mixed, plain)] == [False, True, True, True] * 2
    for i in (0, 4):
        one, two = plain[i], plain[i + 1]
        assert mixed[i].ids[: len(one.ids) - end] == one.ids[: len(one.ids) - end]
        assert mixed[i].ids[len(one.ids) - end :] == two.ids[1:]
        assert mixed[i].ids[0] == words.cls_id
        assert mixed[i].ids.count(words.cls_id) == 1
        assert (mixed[i].ids[-1] == words.sep_id) == words.append_sep
        assert mixed[i].ids.count(words.sep_id) == int(words.append_sep)
        assert one.swapped is not None
        assert mixed[i].swapped == one.swapped[: len(one.swapped) - end] + two.ids[1:]
        assert mixed[i].image_id < 0
        assert mixed[i].key == f"{one.key} + {two.key}"


def test_a_prompt_opens_a_joined_text_once() -> None:
    words, prompt = tokenizer(), "a dog "
    made = PairDataset(records(4), ImageTransform(16), words, prompt=prompt)
    plain = [made.sample(0, 0, item) for item in range(4)]
    opening = words.encode([prompt])[0]
    mixed = replace(MixGen.of(2, words, prompt), max_length=90).join(plain)[0]
    assert mixed.ids == plain[0].ids + plain[1].ids[len(opening) :]


@pytest.mark.parametrize("words", [tokenizer(), CLOSED], ids=["open", "closed"])
@pytest.mark.parametrize("longest", [90, 12])
def test_masks_move_along_and_what_is_cut_off_is_not_asked_for(words: Tokenizer, longest: int) -> None:
    mixgen = replace(MixGen.of(2, words), max_length=longest)
    plain = samples(words)
    for one, two, mixed in zip(plain[::2], plain[1::2], mixgen.join(plain)[::2]):
        assert mixed.masked is not None
        ids, positions, labels = mixed.masked
        assert len(ids) == len(mixed.ids) <= longest
        assert (ids[-1] == words.sep_id) == words.append_sep
        assert [mixed.ids[p] for p in positions] == labels
        unmasked = [i for i in range(len(ids)) if i not in positions]
        assert [ids[i] for i in unmasked] == [mixed.ids[i] for i in unmasked]
        assert one.masked is not None
        assert two.masked is not None
        if longest == 90:
            assert labels == one.masked[2] + two.masked[2]


def test_pictures_are_blended_where_the_batch_lies() -> None:
    plain = collate(samples(tokenizer()))
    batch = replace(plain, mixed=4)
    blended = batch.blended()
    assert blended.mixed == 0
    assert blended.images.dtype == torch.uint8
    assert plain.blended() is plain
    for i in range(8):
        expected = plain.images[i].float()
        if i % 4 == 0:
            expected = ((expected + plain.images[i + 1].float()) / 2 + 0.25).round()  # halves go up
        assert torch.equal(blended.images[i].float(), expected)
    assert torch.equal(batch.images, plain.images)


@pytest.mark.parametrize("count", range(1, 8))
def test_an_incomplete_last_group(count: int) -> None:
    """Texts and pictures agree about which pairs are mixtures, whatever the size of the batch."""
    plain = samples(tokenizer(), count)
    joined = MixGen.of(3, tokenizer()).join(plain)
    batch = replace(collate(plain), mixed=3)
    changed = [not torch.equal(a, b) for a, b in zip(batch.blended().images, batch.images)]
    assert changed == [a is not b for a, b in zip(joined, plain)]
    assert sum(changed) == len(range(0, count - 1, 3))


def first(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.blended().images, batch.texts.ids


def test_workers_and_ranks_make_the_same_mixtures() -> None:
    words = tokenizer()
    options = {"seed": 1, "mixgen": MixGen.of(4, words)}
    whole = next(training_batches(dataset(words), 8, **options))[0]  # type: ignore[arg-type]
    by_worker = next(training_batches(dataset(words), 8, workers=1, **options))[0]  # type: ignore[arg-type]
    halves = [
        next(training_batches(dataset(words), 8, rank=rank, world_size=2, **options))[0]  # type: ignore[arg-type]
        for rank in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(first(whole), first(by_worker)))
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(first(whole), zip(*map(first, halves))))
    epochs = [batch.image_ids for batch, _ in islice(training_batches(dataset(words), 8, **options), 4)]  # type: ignore[arg-type]
    assert all(int((ids < 0).sum()) == 2 for ids in epochs)
    assert not torch.equal(epochs[0], epochs[2])


def test_every_pair_cannot_be_a_mixture() -> None:
    with pytest.raises(ValueError, match="2 is the least"):
        MixGen.of(1, tokenizer())
