from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imglish.cli import main
from imglish.data import shards
from imglish.data.errors import DataError, read_errors
from imglish.data.images import decode
from imglish.data.records import Record
from imglish.data.shards import ShardConfig, shard
from imglish.data.sources import open_source
from tests.data.sources import layouts
from tests.data.sources.layouts import picture

CONFIG = ShardConfig(side=64, per_shard=3, max_errors=0.5)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8))


def turned() -> bytes:
    """200 x 100 as stored, to be turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(smooth(200, 100), exif=exif)


def records() -> list[Record]:
    pictures = [
        picture(0),
        encoded(smooth(300, 200)),
        turned(),
        b"broken",
        encoded(Image.new("RGBA", (80, 100), (9, 200, 9, 0)), "PNG"),
        lambda: smooth(90, 90),
        encoded(smooth(100, 500)),
    ]
    return [
        Record(
            f"r{i}",
            image,
            (f"caption {i}", "你好"),
            i,
            swapped=("no", "nein") if i == 1 else (),
            group="g" if i else "",
        )
        for i, image in enumerate(pictures)
    ]


def sums(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if "index" not in p.name}


@pytest.mark.parametrize("sidecar", ["parquet", "jsonl"])
def test_what_is_written_can_be_read(tmp_path: Path, sidecar: str) -> None:
    config = replace(CONFIG, sidecar=sidecar)  # type: ignore[arg-type]
    report = shard(records(), tmp_path, config)
    assert (report.shards, report.written, report.errors.counts) == (3, 6, {"not a picture": 1})
    assert [p.key for p in read_errors(tmp_path / "errors.csv")] == ["r3"]
    found = open_source(tmp_path)
    kept = [record for record in records() if record.key != "r3"]
    assert [(r.captions, r.swapped, r.group) for r in found] == [(r.captions, r.swapped, r.group) for r in kept]
    sizes = [decode(r.image).size for r in found]
    assert sizes == [(24, 16), (96, 64), (64, 128), (64, 80), (64, 64), (64, 320)]
    assert callable(found[0].image)
    assert found[0].image() == picture(0)  # small and upright already: the same bytes
    straight = np.asarray(decode(turned()).resize((64, 128)), dtype=float)
    assert np.abs(np.asarray(decode(found[2].image), dtype=float) - straight).mean() < 3
    assert decode(found[3].image).getpixel((9, 9)) == (255, 255, 255)  # transparency on white


def test_checksums_and_tables(tmp_path: Path) -> None:
    shard(records(), tmp_path, replace(CONFIG, sidecar="jsonl"))
    rows = [json.loads(line) for n in range(3) for line in (tmp_path / f"{n:05d}.jsonl").read_text().splitlines()]
    found = open_source(tmp_path)
    for row, record in zip(rows, found, strict=True):
        assert callable(record.image)
        data = record.image()
        assert isinstance(data, bytes)
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert (row["width"], row["height"]) == decode(data).size
        assert record.key.endswith(row["key"])
    assert (rows[2]["source"], rows[2]["original_width"], rows[2]["original_height"]) == ("r2", 100, 200)
    for line in (tmp_path / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(records(), tmp_path / "whole", CONFIG)
    real, made = shards._sample, []

    def stopping(record: Record, key: str, config: ShardConfig) -> object:
        made.append(record.key)
        if len(made) == 5:
            raise KeyboardInterrupt
        return real(record, key, config)

    monkeypatch.setattr(shards, "_sample", stopping)
    with pytest.raises(KeyboardInterrupt):
        shard(records(), tmp_path / "stopped", CONFIG)
    assert not list((tmp_path / "stopped").glob("*.writing"))
    assert [p.name for p in (tmp_path / "stopped").glob("*.tar")] == ["00000.tar"]
    shard(records(), tmp_path / "stopped", CONFIG)
    assert made[5:] == ["r3", "r4", "r5", "r6"]
    assert sums(tmp_path / "stopped") == sums(tmp_path / "whole")
    (tmp_path / "stopped" / "00001.tar").write_bytes(b"cut")
    shard(records(), tmp_path / "stopped", CONFIG)
    assert sums(tmp_path / "stopped") == sums(tmp_path / "whole")


def test_processes_change_nothing(tmp_path: Path) -> None:
    path = layouts.tars(tmp_path / "t", 3)
    shard(open_source(path), tmp_path / "one", CONFIG)
    shard(open_source(path), tmp_path / "two", replace(CONFIG, workers=2))
    assert sums(tmp_path / "one") == sums(tmp_path / "two")


def test_other_records_and_settings_are_refused(tmp_path: Path) -> None:
    shard(records(), tmp_path, CONFIG)
    with pytest.raises(DataError, match="side differ"):
        shard(records(), tmp_path, replace(CONFIG, side=32))
    with pytest.raises(DataError, match="records, digest differ"):
        shard(records()[:-1], tmp_path, CONFIG)
    with pytest.raises(DataError, match="were not written by this command"):
        shard(records(), layouts.tars(tmp_path / "other"), CONFIG)
    with pytest.raises(DataError, match="no records"):
        shard([], tmp_path / "none", CONFIG)
    with pytest.raises(DataError, match="quality is 0"):
        ShardConfig(quality=0)


def test_too_many_errors_stop_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 7 records cannot be used .*r3"):
        shard(records(), tmp_path, replace(CONFIG, max_errors=0.1))


def test_texts_and_pictures_alone(tmp_path: Path) -> None:
    shard(open_source(layouts.lines(tmp_path / "l"), needs="texts"), tmp_path / "texts", CONFIG)
    assert [r.captions for r in open_source(tmp_path / "texts", needs="texts")] == [(c[0],) for c in layouts.CAPTIONS]
    shard(open_source(layouts.pictures(tmp_path / "p"), needs="images"), tmp_path / "pictures", CONFIG)
    assert len(open_source(tmp_path / "pictures", needs="images")) == 3


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = layouts.jsonl(tmp_path / "d", [{"image": n, "caption": "x"} for n in (*layouts.NAMES, "gone.jpg")])
    arguments = ["data", "shard", str(path), str(tmp_path / "out"), "--side", "8", "--per-shard", "2"]
    assert main(arguments) == 1
    assert "1 missing" in capsys.readouterr().err
    assert main([*arguments, "--max-errors", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "3 records in 2 shards" in out
    assert "1 records could not be used (1 missing)" in out
    assert main(["data", "shard", str(tmp_path / "nowhere"), str(tmp_path / "o")]) == 1
