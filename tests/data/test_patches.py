"""Pictures of several sizes: shapes, cutting, choice of patches, batches, and the same through the data set."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imglish.data.aspect import AspectTransform
from imglish.data.dataset import PairDataset
from imglish.data.loader import training_batches
from imglish.data.patches import PatchBatch, cut_pixels
from imglish.data.pictures import picture_of, stack
from imglish.data.records import Record
from imglish.data.tokenizers import Tokenizer
from imglish.models.vilt_pictures import AspectInput, PatchRows
from imglish.nn.embed import grid_positions
from imglish.training.step import split

SIZES = [(60, 40), (40, 60), (50, 50), (200, 20), (33, 47), (90, 30), (41, 40), (64, 48)]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def records() -> list[Record]:
    made = []
    for number, size in enumerate(SIZES):
        file = io.BytesIO()
        photo(*size, seed=number).save(file, "PNG")
        made.append(Record(f"p{number}", file.getvalue(), (f"a photo number {number}",), image_id=number))
    return made


def tokenizer() -> Tokenizer:
    return Tokenizer.train_wordpiece(["a photo number 0 1 2 3 4 5 6 7"], 60, max_length=16)


def test_patches_are_the_picture() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    made = cut_pixels(pixels, 8)
    assert made.grid == (2, 3)
    assert made.kept is None
    for number, patch in enumerate(made.pixels):
        row, column = divmod(number, 3)
        expected = pixels[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        assert np.array_equal(patch.permute(1, 2, 0).numpy(), expected)
    whole = PatchBatch.cut(torch.from_numpy(pixels).permute(2, 0, 1)[None], 8)
    assert torch.equal(whole.pixels, made.pixels)
    with pytest.raises(ValueError, match="do not divide"):
        PatchBatch.cut(torch.zeros(1, 3, 15, 24), 8)


def test_patches_that_stay_are_drawn_anew_and_in_evaluation_all_stay() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    one, two = (cut_pixels(pixels, 8, most=10, rng=np.random.default_rng(seed)) for seed in (1, 2))
    assert one.kept is not None
    assert two.kept is not None
    assert len(one.pixels) == len(set(one.kept.tolist())) == 10
    assert one.kept.tolist() != two.kept.tolist()
    everything = cut_pixels(pixels, 8, most=10)
    assert everything.kept is None
    assert torch.equal(everything.pixels[one.kept], one.pixels)


def test_shapes_keep_the_aspect_to_less_than_a_patch() -> None:
    transform = AspectTransform(48, 80, 8)
    for width, height in SIZES:
        down, across = transform.shape(width, height)
        assert down % 8 == across % 8 == 0
        assert max(down, across) <= 80
        if max(width, height) <= 80 / 48 * min(width, height):
            assert min(down, across) == 48
            assert abs(across / down - width / height) < (8 + 1) / down * max(1, width / height)
    assert transform.shape(5000, 10) == (8, 80)
    with pytest.raises(ValueError, match="exceed"):
        AspectTransform(48, 40, 8)


def test_pixels_do_not_depend_on_cache_or_reduced_decoding() -> None:
    transform = AspectTransform(48, 80, 8, crop_scale=(0.5, 1.0))
    image = photo(600, 400)
    straight = transform(image, np.random.default_rng(3)).astype(int)
    reduced = transform(image.resize((300, 200)), np.random.default_rng(3), original=(600, 400)).astype(int)
    squashed = Image.fromarray(transform.squashed(image))
    cached = transform(squashed, np.random.default_rng(3), original=(600, 400)).astype(int)
    assert straight.shape == reduced.shape == cached.shape
    assert np.abs(straight - reduced).mean() < 2
    assert np.abs(straight - cached).mean() < 2
    across, down = transform.least(600, 400, np.random.default_rng(3))
    assert across >= straight.shape[1]
    assert down >= straight.shape[0]


def test_batches_of_several_sizes() -> None:
    transform = AspectTransform(24, 40, 8, most=12)
    dataset = PairDataset(records(), transform, tokenizer(), cache=True)
    batch = next(training_batches(dataset, 8, seed=1))[0]
    assert isinstance(batch.images, PatchBatch)
    assert len(batch) == 8
    assert len(set(batch.images.grids)) > 2
    assert max(batch.images.segments.lengths) == 12
    for whole, part in zip((batch.images[2:4], batch.images[6:8]), (split(batch, 4)[1], split(batch, 4)[3])):
        assert isinstance(part.images, PatchBatch)
        assert torch.equal(part.images.pixels, whole.pixels)
        assert part.images.grids == whole.grids
    again = next(training_batches(PairDataset(records(), transform, tokenizer()), 8, seed=1, workers=2))[0]
    assert isinstance(again.images, PatchBatch)
    assert again.keys == batch.keys
    assert all(np.array_equal(a, b) for a, b in zip(again.images.kept, batch.images.kept))  # drawn by the sample alone
    with pytest.raises(TypeError, match="one size"):
        _ = batch.squares
    moved = batch.to("cpu")
    assert isinstance(moved.images, PatchBatch)
    assert moved.images.segments == batch.images.segments


def test_forms_do_not_mix() -> None:
    patches = picture_of(np.zeros((16, 16, 3), dtype=np.uint8), AspectTransform(16, 16, 8))
    with pytest.raises(TypeError, match="different forms"):
        stack([patches, torch.zeros(3, 16, 16)])


def test_positions_are_those_of_bilinear_interpolation() -> None:
    rows = PatchRows(AspectInput(40, 64, 8), width=6, dropout=0.0)
    pictures = PatchBatch.of(
        [cut_pixels(np.zeros((h * 8, w * 8, 3), np.uint8), 8) for h, w in [(5, 5), (3, 8), (1, 4)]]
    )
    found = grid_positions(rows.positions[1:], pictures).split(list(pictures.segments.lengths))
    torch.testing.assert_close(found[0], rows.positions[1:])
    table = rows.positions[1:].T.reshape(1, 6, 5, 5)
    for made, (h, w) in zip(found[1:2], pictures.grids[1:2]):
        expected = torch.nn.functional.interpolate(table, (h, w), mode="bilinear", align_corners=True)
        torch.testing.assert_close(made, expected[0].flatten(1).T)
    found[1].sum().backward()
    assert rows.positions.grad is not None
    assert float(rows.positions.grad[1:].sum()) == pytest.approx(24 * 6, rel=1e-5)  # each row's shares add up to one


def test_decoded_files_reach_the_batch(tmp_path: Path) -> None:
    photo(90, 60).save(tmp_path / "a.jpg")
    record = Record("a", tmp_path / "a.jpg", ("a photo",), image_id=0)
    sample = PairDataset([record], AspectTransform(24, 40, 8), tokenizer()).sample(0, 0, 0)
    assert getattr(sample.pixels, "grid", None) == (3, 4)
