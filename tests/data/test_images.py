from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imglish.data.images import ImageError, ImageTransform, decode


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=2).astype(np.uint8))


def test_file_bytes_and_function_give_the_same_picture(tmp_path: Path) -> None:
    image = gradient(20, 10)
    path = tmp_path / "a.png"
    image.save(path)
    for source in (path, path.read_bytes(), lambda: image):
        assert np.array_equal(decode(source), image)


def test_broken_missing_and_wrong_files_are_named(tmp_path: Path) -> None:
    whole = encoded(gradient(64, 64), "JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"cut\.jpg: cannot be read"):
        decode(cut)
    with pytest.raises(ImageError, match=r"gone\.jpg: the picture does not exist"):
        decode(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match="the seventh: cannot be read"):
        decode(b"<svg></svg>", name="the seventh")
    with pytest.raises(ImageError, match="cannot be read"):
        decode(tmp_path)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    bomb = encoded(Image.new("1", (9000, 9000)), "PNG")
    assert len(bomb) < 20_000
    with pytest.raises(ImageError, match="9000x9000 pixels are more than the limit"):
        decode(bomb)
    huge = encoded(Image.new("1", (20_000, 20_000)), "PNG")  # Pillow itself refuses this one
    with pytest.raises(ImageError, match="decompression bomb"):
        decode(huge)


def test_modes_become_rgb_and_transparency_white() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert decode(encoded(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("L", (4, 4), 90), "PNG")).getpixel((0, 0)) == (90, 90, 90)
    deep = Image.fromarray(np.full((4, 4), 90 * 256, dtype=np.uint16))
    assert decode(encoded(deep, "PNG")).getpixel((0, 0)) == (90, 90, 90)


def test_exif_orientation_turns_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    assert decode(encoded(gradient(40, 20), "JPEG", exif=exif)).size == (20, 40)


def test_a_jpeg_that_shrinks_is_decoded_smaller_but_at_least_twice_the_side() -> None:
    data = encoded(gradient(1600, 1600), "JPEG")
    assert decode(data).size == (1600, 1600)
    assert decode(data, shrink_to=100).size == (200, 200)


def test_evaluation_squashes_or_cuts_the_centre() -> None:
    image = gradient(80, 40)
    squashed = ImageTransform(20)(image)
    centre = ImageTransform(20, "center")(image)
    assert squashed.shape == centre.shape == (20, 20, 3)
    assert squashed.dtype == np.uint8
    assert squashed[:, :, 0].min() < 10
    assert squashed[:, :, 0].max() > 245
    assert centre[:, :, 0].min() > 55
    assert centre[:, :, 0].max() < 200
    assert np.array_equal(squashed, ImageTransform(20, crop_scale=(0.1, 1.0), flip=True)(image))  # no rng, no chance


def test_random_crops_keep_to_scale_and_ratio() -> None:
    transform = ImageTransform(8, crop_scale=(0.5, 0.9))
    for seed in range(200):
        left, upper, right, lower = transform.box(100, 60, np.random.default_rng(seed))
        assert 0 <= left < right <= 100
        assert 0 <= upper < lower <= 60
        assert (right - left) * (lower - upper) <= 0.9 * 6000 + 1e-6
        assert 0.5 < (right - left) / (lower - upper) < 1.4


def test_crops_from_the_squashed_cache_look_like_crops_from_the_original() -> None:
    transform = ImageTransform(16, crop_scale=(0.3, 0.9), flip=True)
    image = gradient(90, 50)
    kept = Image.fromarray(transform.squashed(image))
    assert kept.size == (20, 20)
    for seed in range(20):
        direct = transform(image, np.random.default_rng(seed))
        cached = transform(kept, np.random.default_rng(seed), original=image.size)
        assert np.abs(direct.astype(int) - cached).mean() < 6


def test_half_are_mirrored_where_allowed() -> None:
    image = gradient(10, 10)
    transform = ImageTransform(10, flip=True)
    straight = np.asarray(image)
    mirrored = [not np.array_equal(transform(image, np.random.default_rng(s)), straight) for s in range(200)]
    assert 70 < sum(mirrored) < 130
    assert all(np.array_equal(transform(image, np.random.default_rng(s), may_flip=False), straight) for s in range(20))


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="crop_scale"):
        ImageTransform(8, crop_scale=(0.5, 1.5))
    with pytest.raises(ValueError, match="side 0"):
        ImageTransform(0)
