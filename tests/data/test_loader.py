from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imglish.data.batch import Batch
from imglish.data.dataset import PairDataset, PictureCache, Purpose, stream
from imglish.data.errors import DataError, Errors
from imglish.data.images import ImageError, ImageTransform
from imglish.data.loader import Position, epoch_order, training_batches
from imglish.data.masking import MaskConfig
from imglish.data.records import Record
from tests.data.samples import Noise, records, tokenizer

TRANSFORM = ImageTransform(16, crop_scale=(0.3, 1.0), flip=True)


def dataset(count: int = 11, *, cache: bool = False, captions: str = "one", swapped: bool = True) -> PairDataset:
    made = [replace(record, swapped=record.captions[::-1]) for record in records(count)]
    return PairDataset(
        made,
        TRANSFORM,
        tokenizer(),
        captions=captions,  # type: ignore[arg-type]
        mlm=MaskConfig(0.3),
        swapped=swapped,
        cache=cache,
    )


def equal(one: Batch, two: Batch) -> bool:
    assert one.masked is not None
    assert two.masked is not None
    assert one.swapped is not None
    assert two.swapped is not None
    return (
        one.keys == two.keys
        and one.texts.segments == two.texts.segments
        and one.masked.counts == two.masked.counts
        and all(
            torch.equal(a, b)
            for a, b in (
                (one.images, two.images),
                (one.texts.ids, two.texts.ids),
                (one.image_ids, two.image_ids),
                (one.draws, two.draws),
                (one.masked.ids, two.masked.ids),
                (one.masked.rows, two.masked.rows),
                (one.masked.labels, two.masked.labels),
                (one.swapped.ids, two.swapped.ids),
            )
        )
    )


START = Position()


def run(count: int, position: Position = START, **options: int) -> list[tuple[Batch, Position]]:
    return list(islice(training_batches(dataset(), 4, position, seed=7, **options), count))


def test_a_batch_holds_what_the_model_expects() -> None:
    batch, after = run(1)[0]
    assert after == Position(0, 4)
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous()
    assert len(batch.texts) == len(batch.keys) == 4
    assert batch.draws.shape == (4, 2)
    assert batch.draws.dtype == torch.float32
    assert 0 <= batch.draws.min() <= batch.draws.max() < 1
    assert batch.masked is not None
    assert batch.masked.ids.shape == batch.texts.ids.shape
    assert torch.equal(batch.texts.ids[batch.masked.rows], batch.masked.labels)
    assert batch.swapped is not None
    assert len(batch.swapped) == 4
    assert batch.keys == tuple(f"picture-{i}" for i in batch.image_ids.tolist())


def test_workers_change_nothing() -> None:
    for (one, at), (two, there) in zip(run(5), run(5, workers=2), strict=True):
        assert at == there
        assert equal(one, two)


def test_ranks_share_the_batches_of_one_process() -> None:
    whole, left, right = run(5), run(5, rank=0, world_size=2), run(5, rank=1, world_size=2)
    for (batch, at), (first, one), (second, two) in zip(whole, left, right, strict=True):
        assert at == one == two
        assert batch.keys == first.keys + second.keys
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert torch.equal(batch.texts.ids, torch.cat([first.texts.ids, second.texts.ids]))
        assert torch.equal(batch.draws, torch.cat([first.draws, second.draws]))


def test_resuming_anywhere_continues_the_stream() -> None:
    whole = run(7)
    for done in range(1, 6):
        for (batch, at), (again, there) in zip(whole[done:], run(7 - done, whole[done - 1][1]), strict=True):
            assert at == there
            assert equal(batch, again)


def test_an_epoch_shows_every_item_at_most_once_and_in_its_own_order() -> None:
    batches = run(6)  # 11 items: two batches of 4 an epoch, 3 items left out
    assert [after for _, after in batches] == [
        Position(0, 4), Position(1, 0), Position(1, 4), Position(2, 0), Position(2, 4), Position(3, 0)
    ]  # fmt: skip
    epochs = [batches[i][0].keys + batches[i + 1][0].keys for i in (0, 2, 4)]
    assert all(len(set(keys)) == 8 for keys in epochs)
    assert len(set(epochs)) == 3
    for epoch in range(3):
        assert sorted(epoch_order(11, 7, epoch)) == list(range(11))
    assert not np.array_equal(epoch_order(11, 7, 0), epoch_order(11, 8, 0))


def test_random_choices_differ_between_epochs_and_purposes() -> None:
    data = dataset()
    first, later = data.sample(7, 0, 3), data.sample(7, 1, 3)
    assert not np.array_equal(first.pixels, later.pixels)
    assert not np.array_equal(first.draws, later.draws)
    assert len({tuple(data.sample(7, epoch, 3).ids) for epoch in range(30)}) == 4  # all captions have their turn
    assert stream(1, 2, 3, Purpose.MASK).random() != stream(1, 2, 3, Purpose.DRAW).random()
    assert stream(1, 2, 3, Purpose.MASK).random() != stream(1, 3, 2, Purpose.MASK).random()


def test_all_captions_as_items() -> None:
    data = dataset(3, captions="all")
    assert len(data) == 12
    samples = [data.sample(0, 0, item) for item in range(12)]
    assert [s.image_id for s in samples] == [i for i in range(3) for _ in range(4)]
    assert len({tuple(s.ids) for s in samples}) == 4


def test_the_swapped_caption_belongs_to_the_chosen_one() -> None:
    data = dataset()
    captions = data.records[0].captions
    for epoch in range(10):
        sample = data.sample(0, epoch, 2)
        texts = tokenizer().encode(captions)
        assert sample.swapped == texts[::-1][texts.index(sample.ids)]


def test_the_cache_is_filled_once_and_changes_no_choice(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.asarray(Noise(1)())).save(path)
    plain, cached = (
        PairDataset([Record("a", path, ("x",), 0)], ImageTransform(16, flip=True), tokenizer(), cache=cache)
        for cache in (False, True)
    )
    first = [(plain.sample(0, e, 0).pixels, cached.sample(0, e, 0).pixels) for e in range(8)]
    assert all(np.array_equal(one, two) for one, two in first)
    path.unlink()
    assert np.array_equal(cached.sample(0, 3, 0).pixels, first[3][0])
    with pytest.raises(ImageError, match="does not exist"):
        plain.sample(0, 3, 0)


def test_a_cached_run_with_workers_equals_one_without() -> None:
    one, two = (
        list(islice(training_batches(dataset(cache=True), 4, seed=7, workers=workers), 6)) for workers in (0, 2)
    )
    assert all(equal(a, b) for (a, _), (b, _) in zip(one, two, strict=True))


def test_a_cache_larger_than_memory_is_refused_and_a_pickled_one_starts_empty() -> None:
    with pytest.raises(ValueError, match="GiB"):
        PictureCache(10**9, 224)
    cache = PictureCache(2, 4)
    cache.put(1, np.ones((4, 4, 3), dtype=np.uint8), (9, 7))
    kept = cache.get(1)
    assert kept is not None
    assert kept[1] == (9, 7)
    assert cache.get(0) is None
    assert pickle.loads(pickle.dumps(cache)).get(1) is None


@pytest.mark.parametrize("side", ["the dog on the left", "左边的狗"])
def test_pictures_with_sides_in_a_caption_are_never_mirrored(side: str) -> None:
    transform = ImageTransform(30, flip=True)
    image = Noise(0, 30, 30)
    free = PairDataset([Record("a", image, ("a dog",), 0)], transform, tokenizer())
    bound = PairDataset([Record("a", image, ("a dog", side), 0)], transform, tokenizer())
    straight = np.asarray(image())
    assert all(np.array_equal(bound.sample(0, epoch, 0).pixels, straight) for epoch in range(20))
    assert any(not np.array_equal(free.sample(0, epoch, 0).pixels, straight) for epoch in range(20))


def broken(count: int, bad: tuple[int, ...]) -> PairDataset:
    made = [replace(record, image=b"broken") if i in bad else record for i, record in enumerate(records(count))]
    return PairDataset(made, TRANSFORM, tokenizer())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_readable_picture_stands_in_and_the_broken_one_is_logged_once(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        batches = list(islice(training_batches(broken(8, (3, 4)), 8, workers=workers, errors=Errors(0.3)), 3))
    for batch, _ in batches:
        assert sorted(batch.image_ids.tolist()) == [0, 1, 2, 5, 5, 5, 6, 7]
    lines = sorted(record.getMessage() for record in caplog.records)
    assert len(lines) == 2
    assert "picture-3: cannot be read" in lines[0]
    assert "picture-4: cannot be read" in lines[1]


def test_too_many_broken_pictures_stop_the_run() -> None:
    with pytest.raises(DataError, match=r"2 of 8 pictures cannot be used .*not a picture.* 12\.50% .*picture-"):
        list(islice(training_batches(broken(8, (3, 4)), 8, errors=Errors(0.125)), 1))
    with pytest.raises(ImageError, match="8 pictures in a row"):
        broken(8, tuple(range(8))).sample(0, 0, 0)


def test_the_loader_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(training_batches(dataset(), 4))
    assert torch.equal(before, torch.get_rng_state())


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="larger than the data set"):
        next(training_batches(dataset(), 12))
    with pytest.raises(ValueError, match="cannot be divided"):
        next(training_batches(dataset(), 4, world_size=3))
    with pytest.raises(ValueError, match="position 99"):
        next(training_batches(dataset(), 4, Position(0, 99)))
    with pytest.raises(ValueError, match="without records"):
        PairDataset([], TRANSFORM, tokenizer())
    with pytest.raises(ValueError, match="picture-0 has none"):
        PairDataset(records(2), TRANSFORM, tokenizer(), swapped=True)
