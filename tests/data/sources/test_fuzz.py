"""Damaged files of every layout: read, counted or refused, never a crash or a hang, and nothing is lost without a word.

The short version damages each layout some dozens of times, the long one (`make fuzz`) thousands of times.
"""

from __future__ import annotations

import faulthandler
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from imglish.data.errors import DataError
from imglish.data.images import ImageError, decode
from imglish.data.sources import open_source
from tests.data.sources.layouts import PAIRS, lines

LIMIT = 30  # seconds for one damaged file
HOSTILE = (
    b"\0", b"\xff\xfe", b"\n", b'"', b"'", b"{", b"[" * 3000, b"]", b"NaN", b"null", b"1e999", b"-1", b"\\ud800",
    b"../../../etc/passwd", b"/etc/passwd", b"a" * 70_000, b",,,,", b"\t\t", b"\r", b"\xef\xbb\xbf", b"PAR1", b"ustar",
    b"\xff" * 8, b"\x80" + b"\0" * 11, b"77777777777\0", b"9" * 5000, b"&a [*a, *a]", b"!!python/object:x", b"\x1b[2J",
)  # fmt: skip


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """``data`` with one to four changes."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(changed) + 1))
        size = int(min(rng.integers(1, 600), rng.integers(1, 600)))
        other = int(rng.integers(len(changed) + 1))
        match int(rng.integers(9)):
            case 0 if changed:
                changed[min(at, len(changed) - 1)] ^= 1 << int(rng.integers(8))
            case 1:
                changed[at : at + size] = rng.bytes(size)
            case 2:
                del changed[at : at + size]
            case 3:
                del changed[at:]
            case 4:
                changed[at:at] = changed[other : other + size]
            case 5:
                changed[at:at] = HOSTILE[int(rng.integers(len(HOSTILE)))]
            case 6:
                token = HOSTILE[int(rng.integers(len(HOSTILE)))]
                changed[at : at + len(token)] = token
            case 7:
                changed[at : at + 512] = bytes(512)
            case 8:
                changed += changed[other:]
    return bytes(changed)


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        faulthandler.dump_traceback()
        raise AssertionError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(path: Path, needs: str, expected: int) -> str:
    """Read everything; what became of it in a word."""
    try:
        found = open_source(path, needs=needs, max_errors=1)  # type: ignore[arg-type]
    except DataError:
        return "refused"
    broken = 0
    for record in found:
        assert needs == "images" or record.captions
        assert all(text.strip() and text.isprintable is not None for text in record.captions)
        repr(record).encode("utf-8", "strict")
        if record.image is not None:
            try:
                decode(record.image, name=record.key)
            except ImageError:
                broken += 1
    assert len(found) <= 4 * expected
    return "counted" if broken or len(found.errors) else "read"


def fuzz(make: Callable[[Path], Path], folder: Path, rounds: int, seed: int, needs: str = "pairs") -> dict[str, int]:
    whole = folder / "whole"
    path = make(whole)
    files = sorted(p for p in whole.rglob("*") if p.is_file())
    expected = len(open_source(path, needs=needs))  # type: ignore[arg-type]
    for index in whole.rglob(".imglish-*"):
        index.unlink()
    outcomes = {"read": 0, "counted": 0, "refused": 0}
    for number in range(rounds):
        rng = np.random.default_rng([seed, number])
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        chosen = files[int(rng.integers(len(files)))]
        if rng.random() < 0.6 and path.is_file():  # the file that the source is about, more often
            chosen = path
        target = copy / chosen.relative_to(whole)
        target.write_bytes(damaged(chosen.read_bytes(), rng))
        with limit(LIMIT):
            try:
                outcomes[read(copy / path.relative_to(whole), needs, expected)] += 1
            except Exception as error:
                raise AssertionError(f"round {number}, {chosen.name}: {type(error).__name__}: {error}") from error
    return outcomes


@pytest.mark.parametrize("layout", PAIRS)
def test_damaged_layouts(layout: str, tmp_path: Path) -> None:
    outcomes = fuzz(PAIRS[layout], tmp_path, 40, seed=1)
    assert outcomes["counted"] + outcomes["refused"] >= 10


def test_damaged_texts(tmp_path: Path) -> None:
    fuzz(lines, tmp_path, 40, seed=1, needs="texts")


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", PAIRS)
def test_damaged_layouts_at_length(layout: str, tmp_path: Path) -> None:
    began = time.perf_counter()
    outcomes = fuzz(PAIRS[layout], tmp_path, 3000, seed=2)
    print(f"\n{layout}: {outcomes} in {time.perf_counter() - began:.0f} s")
    assert outcomes["counted"] + outcomes["refused"] > 500


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("needs", ["texts", "images"])
def test_damaged_layouts_for_other_jobs_at_length(needs: str, tmp_path: Path) -> None:
    for layout in ("jsonl", "tars", "coco", "texts beside", "arrow"):
        fuzz(PAIRS[layout], tmp_path / layout.replace(" ", "-"), 500, seed=3, needs=needs)
