"""Every kind of picture that people have: read right, or refused with a reason."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imglish.data.dataset import Purpose, stream
from imglish.data.images import ImageError, ImageTransform, decode, decode_sized


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some texture, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    texture = rng.normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(coarse) + texture, 0, 255).astype(np.uint8))


def distance(one: Image.Image | np.ndarray, two: Image.Image | np.ndarray) -> float:
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(two, dtype=float)).mean())


def refused(source: bytes | Path) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        decode(source, name="it")
    assert str(caught.value).startswith("it: ")
    return caught.value.reason, str(caught.value)


# ---- kinds of pictures --------------------------------------------------------------------------------------------


def test_cmyk_looks_like_its_rgb() -> None:
    image = photo(60, 40)
    assert distance(decode(encoded(image.convert("CMYK"), "JPEG", quality=95)), image) < 6
    assert distance(decode(encoded(image.convert("CMYK"), "TIFF")), image) < 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_upper_bits(kind: str) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    found = np.asarray(decode(encoded(Image.fromarray(values), kind)))
    assert np.array_equal(found, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


def png(header: bytes, rows: bytes) -> bytes:
    """By hand; Pillow writes no 16-bit colour, nothing interlaced and no wrong sizes."""
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def test_16_bit_colour() -> None:
    rows = b"".join(b"\0" + struct.pack(">12H", *[(x * 20000) % 65536 for x in range(12)]) for _ in range(4))
    data = png(struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0), rows)
    assert decode(data).getpixel((0, 0)) == (0, 20000 >> 8, 40000 >> 8)


def test_values_of_unknown_range_are_refused() -> None:
    floating = encoded(Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)), "TIFF")
    assert refused(floating)[0] == "unknown colours"
    wide = encoded(Image.fromarray(np.full((4, 4), 10**6, dtype=np.int32)), "TIFF")
    assert refused(wide)[0] == "unknown colours"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert decode(encoded(Image.new(mode, (5, 4)), "TIFF")).mode == "RGB"


def test_palettes_and_transparency_lie_on_white() -> None:
    palette = photo(20, 20).quantize(8)
    assert distance(decode(encoded(palette, "PNG")), palette.convert("RGB")) == 0
    for kind, mode in (("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA"), ("TIFF", "RGBA")):
        clear = Image.new(mode, (8, 8), (0,) * len(mode))
        options = {"lossless": True} if kind == "WEBP" else {}
        assert decode(encoded(clear, kind, **options)).getpixel((3, 3)) == (255, 255, 255), (kind, mode)
    hole = Image.new("P", (4, 4), 0)
    hole.putpalette([10, 20, 30, 200, 100, 50])
    hole.putpixel((1, 1), 1)
    found = decode(encoded(hole, "PNG", transparency=0))
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((1, 1)) == (200, 100, 50)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 10, 10), (10, 250, 10), (10, 10, 250))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    red, green, blue = decode(data).getpixel((8, 8))  # type: ignore[misc]
    assert red > 200
    assert green < 60 > blue


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shrink", [None, 10])
def test_exif_orientations_are_applied(orientation: int, shrink: int | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = photo(160, 80)
    data = encoded(stored, "JPEG", exif=exif, quality=95)
    found, size = decode_sized(data, shrink)
    wide = orientation < 5
    assert size == ((160, 80) if wide else (80, 160))
    assert (found.width > found.height) == wide
    assert found.size == (size if shrink is None else (size[0] // 4, size[1] // 4))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the turn that brings the upright picture back as stored
    again = found if orientation == 1 else found.transpose(Image.Transpose(back[orientation]))
    assert distance(again, stored.resize(again.size, Image.Resampling.BOX)) < 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_leaves_the_picture_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encoded(photo(40, 20), "JPEG", exif=exif))
    start = data.index(b"Exif\0\0") + 6
    data[start : start + 12] = b"MM\0*\xff\xff\xff\xf0\xff\xff\xff\xff"
    assert decode(bytes(data)).size == (40, 20)


def test_one_pixel_is_a_picture() -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"):
        found = decode(encoded(Image.new("RGB", (1, 1), (250, 250, 250)), kind), 224)
        assert found.size == (1, 1)
        assert ImageTransform(8, crop_scale=(0.1, 1.0))(found, np.random.default_rng(0)).shape == (8, 8, 3)
    thin = decode(encoded(photo(900, 1), "PNG"))
    for seed in range(20):
        assert ImageTransform(8, "center", crop_scale=(0.1, 1.0))(thin, np.random.default_rng(seed)).shape == (8, 8, 3)


# ---- what is no picture -------------------------------------------------------------------------------------------


def test_each_refusal_has_its_reason(tmp_path: Path) -> None:
    whole = encoded(photo(200, 200), "JPEG")
    assert refused(b"")[0] == "empty"
    (tmp_path / "empty.jpg").touch()
    assert refused(tmp_path / "empty.jpg")[0] == "empty"
    assert refused(tmp_path / "gone.jpg")[0] == "missing"
    (tmp_path / "text.jpg").write_text("<html>404 not found</html>")
    assert refused(tmp_path / "text.jpg")[0] == "not a picture"
    assert refused(b'<svg xmlns="http://www.w3.org/2000/svg"/>')[0] == "not a picture"
    assert refused(tmp_path)[0] == "not a picture"
    assert refused(whole[: len(whole) // 2])[0] == "truncated"
    assert refused(encoded(photo(64, 64), "PNG")[:400])[0] == "truncated"
    assert refused(encoded(Image.new("1", (9000, 9000)), "PNG"))[0] == "too large"
    assert refused(tmp_path / "text.jpg" / "inner.jpg")[0] == "not readable"
    assert refused(Path("a\0b.jpg"))[0] == "damaged"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert refused(tmp_path / "pipe.jpg")[0] == "not a picture"


def test_lying_headers() -> None:
    """Sizes in the header that the data do not have: refused for what they claim, or for what is missing."""
    data = bytearray(encoded(photo(64, 64), "PNG"))

    def claiming(width: int, height: int) -> bytes:
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)

    assert refused(claiming(30_000, 30_000))[0] == "too large"
    assert refused(claiming(2**31 - 1, 2**31 - 1))[0] in ("too large", "not a picture")
    assert refused(claiming(64, 6400))[0] == "truncated"
    assert refused(claiming(0, 64))[0] in ("not a picture", "damaged")
    frame = bytearray(encoded(photo(64, 64).quantize(16), "GIF"))
    frame[6:10] = struct.pack("<HH", 65535, 65535)  # the screen of a GIF
    assert refused(bytes(frame))[0] == "too large"
    jpeg = bytearray(encoded(photo(64, 64), "JPEG"))
    size = jpeg.index(b"\xff\xc0") + 5
    jpeg[size : size + 4] = struct.pack(">HH", 30_000, 30_000)
    assert refused(bytes(jpeg))[0] == "too large"


JPEG_KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "usual": ("RGB", {}),
    "grey": ("L", {}),
    "cmyk": ("CMYK", {}),
    "progressive": ("RGB", {"progressive": True}),
    "restarts": ("RGB", {"restart_marker_blocks": 3}),
    "all colours": ("RGB", {"subsampling": 0, "optimize": True}),
}


@pytest.mark.parametrize("kind", JPEG_KINDS)
@pytest.mark.parametrize("shrink", [None, 10])
def test_a_jpeg_with_less_data_than_rows_is_refused(kind: str, shrink: int | None) -> None:
    """Decoders fill what is missing with grey. Grey that the data do say is well."""
    mode, options = JPEG_KINDS[kind]
    data = encoded(photo(200, 160).convert(mode), "JPEG", **options)
    frame = data.index(b"\xff\xc2" if kind == "progressive" else b"\xff\xc0")
    tall = data[: frame + 5] + struct.pack(">H", 480) + data[frame + 7 :]
    ended = data[: len(data) * 2 // 3] + b"\xff\xd9"
    for short in (tall, *([ended] if kind != "progressive" else [])):
        with pytest.raises(ImageError, match="data end before") as caught:
            decode(short, shrink)
        assert caught.value.reason == "truncated"
    padded = photo(200, 160).convert("RGB")
    padded.paste((128, 128, 128), (0, 100, 200, 160))
    whole = encoded(padded.convert(mode), "JPEG", **options)
    assert decode(whole, shrink).getpixel((3, -1 + decode(whole, shrink).height)) == (128, 128, 128)
    assert decode(whole + b"behind the end", shrink).mode == "RGB"


def rgb_png(pixels: np.ndarray, interlaced: bool, height: int | None = None) -> bytes:
    """uint8 ``(H, W, 3)``; height: what the header says."""
    steps = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    passes = [pixels[y::down, x::across] for x, y, across, down in steps] if interlaced else [pixels]
    rows = b"".join(b"\0" + row.tobytes() for part in passes for row in part if part.shape[1])
    return png(struct.pack(">IIBBBBB", pixels.shape[1], height or len(pixels), 8, 2, 0, 0, int(interlaced)), rows)


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_with_less_data_than_rows_is_refused(interlaced: bool) -> None:
    """Decoders leave what is missing black. Black that the data do say is well."""
    pixels = np.asarray(photo(40, 33)).copy()
    assert np.array_equal(np.asarray(decode(rgb_png(pixels, interlaced))), pixels)
    for height in (34, 35, 64, 330):
        reason = refused(rgb_png(pixels, interlaced, height))[0]
        assert reason == "truncated" or (interlaced and reason == "damaged"), height  # passes begin in other rows
    pixels[20:] = 0
    assert np.array_equal(np.asarray(decode(rgb_png(pixels, interlaced))), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16"])
def test_pictures_that_end_in_zeros_are_complete(mode: str) -> None:
    empty = Image.new(mode, (30, 20), 0 if len(Image.new(mode, (1, 1)).getbands()) == 1 else None)
    for kind in ("PNG", "TIFF"):
        assert decode(encoded(empty, kind)).size == (30, 20)
        data = bytearray(encoded(empty, "PNG"))
    data[20:24] = struct.pack(">I", 200)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    assert refused(bytes(data))[0] == "truncated"


def test_a_tiff_with_fewer_strips_than_rows_is_refused() -> None:
    data = bytearray(encoded(photo(30, 20), "TIFF"))
    entry = data.index(struct.pack("<HHI", 257, 4, 1))  # ImageLength
    data[entry + 8 : entry + 12] = struct.pack("<I", 200)
    assert refused(bytes(data))[0] == "truncated"


def test_hundreds_of_scans_are_refused(tmp_path: Path) -> None:
    data = encoded(photo(32, 32), "JPEG", progressive=True)
    scan = data.index(b"\xff\xda")
    (tmp_path / "many.jpg").write_bytes(data[:scan] + data[scan:-2] * 300 + data[-2:])
    assert refused(tmp_path / "many.jpg") == ("too large", "it: a JPEG of more than 200 scans")


def test_a_function_that_fails_is_named() -> None:
    def vanished() -> Image.Image:
        raise FileNotFoundError("gone")

    with pytest.raises(ImageError, match="member 7: ") as caught:
        decode(vanished, name="member 7")
    assert caught.value.reason == "missing"


# ---- reduced decoding ---------------------------------------------------------------------------------------------


def test_good_detail_is_close_to_full_and_fast_is_smaller() -> None:
    data = encoded(photo(1200, 900), "JPEG", quality=87)
    full = decode(data)
    sides = {detail: decode(data, 100, detail=detail).size for detail in ("full", "good", "fast")}
    assert sides == {"full": (1200, 900), "good": (300, 225), "fast": (150, 113)}
    transform = ImageTransform(100)
    assert distance(transform(decode(data, 100)), transform(full)) < 0.8
    assert distance(transform(decode(data, 100, detail="fast")), transform(full)) < 2.5
    assert decode_sized(data, 100)[1] == (1200, 900)


def test_a_small_crop_gets_the_detail_that_it_needs() -> None:
    """The part that is cut out has at least twice the wanted side, however small a part it is."""
    data = encoded(photo(1600, 1200), "JPEG", quality=90)
    transform = ImageTransform(64, crop_scale=(0.05, 1.0))
    full = decode(data)
    sizes = set()
    for item in range(30):

        def needed(width: int, height: int, item: int = item) -> tuple[float, float]:
            return transform.least(width, height, stream(0, 0, item, Purpose.IMAGE))

        found, size = decode_sized(data, needed)
        box = transform.box(*size, stream(0, 0, item, Purpose.IMAGE))
        assert (box[2] - box[0]) * found.width / size[0] > 2 * 64 - 1
        assert (box[3] - box[1]) * found.height / size[1] > 2 * 64 - 1
        reduced = transform(found, stream(0, 0, item, Purpose.IMAGE), original=size)
        assert distance(reduced, transform(full, stream(0, 0, item, Purpose.IMAGE))) < 1.5
        sizes.add(found.size)
    assert len(sizes) > 1


# ---- fuzz ---------------------------------------------------------------------------------------------------------


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One to eight bytes changed, a stretch cut out, doubled or overwritten, or the end gone."""
    changed = bytearray(data)
    kind = int(rng.integers(5))
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
    if kind == 0:
        for place in rng.integers(len(data), size=rng.integers(1, 9)):
            changed[place] = int(rng.integers(256))
    elif kind == 1:
        del changed[at : at + length]
    elif kind == 2:
        changed[at:at] = data[at : at + length]
    elif kind == 3:
        changed[at : at + length] = rng.bytes(length)
    else:
        del changed[at:]
    return bytes(changed)


def fuzz(rounds: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo(48, 32)
    originals = [
        encoded(image, "JPEG", exif=exif),
        encoded(image, "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "PNG", exif=exif),
        encoded(image.quantize(16), "PNG", transparency=3),
        encoded(image, "GIF", save_all=True, append_images=[photo(48, 32, 1)]),
        encoded(image, "WEBP", exif=exif.tobytes()),
        encoded(image, "WEBP", lossless=True),
        encoded(image, "BMP"),
        encoded(image, "TIFF"),
        encoded(image, "TIFF", compression="tiff_lzw"),
    ]
    for number in range(rounds):
        rng = np.random.default_rng(number)
        data = mutated(originals[number % len(originals)], rng)
        with contextlib.suppress(ImageError):
            found = decode(data, 10 if number % 2 else None)
            assert found.mode == "RGB"
            assert found.width * found.height <= 50_000_000


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_or_refused() -> None:
    fuzz(1500)


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_files_are_read_or_refused() -> None:
    fuzz(100_000)
