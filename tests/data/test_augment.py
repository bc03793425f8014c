from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from imglish.data.augment import OPERATIONS, AugmentPolicy, policy
from imglish.data.dataset import PairDataset
from imglish.data.images import ImageTransform
from imglish.data.loader import training_batches
from imglish.data.records import Record
from tests.data.samples import records, tokenizer
from tests.data.test_decode import photo

PUBLISHED = ("albef", "blip", "vilt")


def only(operation: str, strength: float = 0.7, fill: int = 128) -> AugmentPolicy:
    return AugmentPolicy((operation,), 1, strength, 1, chance=1.0, shift=0.1, fill=fill)


def pixels(side: int = 64) -> np.ndarray:
    return np.clip(np.asarray(photo(side, side)), 20, 235)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_keeps_the_shape_and_changes_the_picture(operation: str) -> None:
    before = pixels()
    kept = before.copy()
    after = only(operation)(before, rng())
    assert after.shape == before.shape
    assert after.dtype == np.uint8
    assert np.array_equal(before, kept)
    assert np.array_equal(after, before) == (operation == "identity")


@pytest.mark.parametrize("operation", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_moves_go_both_ways_and_leave_grey(operation: str) -> None:
    white = np.full((64, 64, 3), 255, dtype=np.uint8)
    found = {only(operation)(white, rng(seed)).tobytes() for seed in range(20)}
    assert len(found) == 2
    for moved in found:
        values = np.unique(np.frombuffer(moved, dtype=np.uint8))
        assert values.min() == 128
        assert values.max() == 255


def test_a_translation_is_a_share_of_the_side() -> None:
    white = np.full((100, 50, 3), 255, dtype=np.uint8)
    sideways = only("translate_x", 1.0, fill=0)(white, rng())
    assert int((sideways[50, :, 0] == 0).sum()) == 5
    down = only("translate_y", 1.0, fill=0)(white, rng())
    assert int((down[:, 25, 0] == 0).sum()) == 10


def test_the_published_policies() -> None:
    """Two operations; ten that keep hues at 7 or 5 of 10 with chance 1/2, or fourteen at 9 of 30."""
    assert [policy(name).magnitude for name in PUBLISHED] == [7, 5, 9]  # type: ignore[arg-type]
    assert [len(policy(name).operations) for name in PUBLISHED] == [10, 10, 14]  # type: ignore[arg-type]
    for name in PUBLISHED:
        assert not {"invert", "cutout"} & set(policy(name).operations)  # type: ignore[arg-type]
    assert not {"color", "contrast", "solarize", "solarize_add", "posterize"} & set(policy("albef").operations)
    assert policy("blip", 9).strength == 0.9
    with pytest.raises(ValueError, match=r"0\.\.10"):
        policy("albef", 11)
    with pytest.raises(ValueError, match="no such operation: mirror"):
        only("mirror")


def test_operations_are_drawn_with_their_chance() -> None:
    """ALBEF: half of the draws do nothing, and one of ten is the identity."""
    before, albef = pixels(32), policy("albef")
    same = sum(np.array_equal(albef(before, rng(seed)), before) for seed in range(400)) / 400
    assert 0.55**2 - 0.06 < same < 0.55**2 + 0.08
    vilt = policy("vilt")
    assert sum(np.array_equal(vilt(before, rng(seed)), before) for seed in range(100)) < 5


def test_hues_stay() -> None:
    """Red stays red under every operation of the policy that keeps colours."""
    red = np.zeros((32, 32, 3), dtype=np.uint8)
    red[..., 0] = np.linspace(120, 250, 32)
    for operation in policy("albef").operations:
        after = only(operation, fill=0)(red, rng()).astype(int)
        assert (after[..., 0] >= after[..., 1:].max(2)).all(), operation


def augmented(augment: AugmentPolicy | None, **options: object) -> PairDataset:
    transform = ImageTransform(24, crop_scale=(0.5, 1.0), flip=True)
    return PairDataset(records(12), transform, tokenizer(), augment=augment, **options)  # type: ignore[arg-type]


def test_augmentation_belongs_to_the_sample() -> None:
    """Equal in any worker, other in the next epoch, and without influence on what else is drawn."""
    plain = [augmented(None).sample(3, 0, item) for item in range(12)]
    first = [augmented(policy("vilt")).sample(3, 0, item) for item in range(12)]
    again = [augmented(policy("vilt")).sample(3, 0, item) for item in range(12)]
    later = [augmented(policy("vilt")).sample(3, 1, item) for item in range(12)]
    for one, two in zip(first, again):
        assert np.array_equal(one.pixels, two.pixels)  # type: ignore[arg-type]
    assert any(not np.array_equal(one.pixels, two.pixels) for one, two in zip(first, plain))  # type: ignore[arg-type]
    assert any(not np.array_equal(one.pixels, two.pixels) for one, two in zip(first, later))  # type: ignore[arg-type]
    assert [s.ids for s in first] == [s.ids for s in plain]
    batches = [
        next(training_batches(augmented(policy("vilt")), 6, seed=3, workers=workers))[0].images for workers in (0, 2)
    ]
    assert torch.equal(*batches)


@pytest.mark.parametrize("side", ["the dog on the left", "左边的人", "rechts steht ein Baum"])
def test_no_picture_of_a_caption_with_a_side_is_mirrored(side: str) -> None:
    """Any caption of the picture forbids it, also one that was not drawn."""
    ramp = Image.fromarray(np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[None, :, None], 24, 0).repeat(3, 2))
    transform = ImageTransform(24, flip=True)
    for captions, mirrored in (((side, "a dog", "a cat"), 0), (("a dog", "a cat"), 10)):
        made = PairDataset([Record("a", lambda: ramp, captions, 0)], transform, tokenizer())
        found = [np.asarray(made.sample(0, epoch, 0).pixels) for epoch in range(40)]
        assert sum(int(p.reshape(3, 24, 24)[0, 0, 0] > 100) for p in found) >= mirrored
        if not mirrored:
            assert all(np.array_equal(p, found[0]) for p in found)
