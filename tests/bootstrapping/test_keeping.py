"""`imglish filter`: a keep-list that is data, shards, and the question why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imglish.bootstrapping.stage import Shard, Stage
from imglish.cli import main
from imglish.data.shards import ShardConfig, shard
from imglish.data.sources import Source, SourceConfig, open_source

SCORES = [0.9, 0.2, 0.6, 0.7, 0.1, 0.3]


def scored(out: Path, source: Path, tars: bool = False) -> Path:
    """Scores as `imglish score` writes them: web captions of the first pictures, 0.9 and 0.2, 0.6 and 0.7, ..."""

    def work(_: Shard, records: Source) -> Any:
        rows = [
            {
                "key": record.key,
                "root": None if tars else str(source.parent / "images"),
                "image": None if tars else record.key,
                "record": number,
                "origin": "web",
                "text": text,
                "itm": SCORES[2 * number + place] if number < 3 else float("nan"),
            }
            for number, record in enumerate(records)
            for place, text in enumerate(record.captions)
        ]
        kinds = dict.fromkeys(("key", "root", "image", "origin", "text", "problem"), pa.string())
        kinds |= {"record": pa.int32()} | dict.fromkeys(("itm", "itc", "ranker_itm", "ranker_itc"), pa.float32())
        return pa.Table.from_pylist(rows, schema=pa.schema(list(kinds.items())))

    Stage.begin(out, "scores", {}, SourceConfig(path=str(source)), 100).run(work)
    return out


def test_the_keep_list_is_data(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = scored(tmp_path / "scores", photos)
    assert main(["filter", str(scores), "--out", str(tmp_path / "kept"), "--no-report"]) == 0
    said = capsys.readouterr().out
    assert "8" in said
    assert "itm is not a number" in said
    records = open_source(tmp_path / "kept" / "keep.yaml")
    whole = open_source(photos)
    assert [(r.key, r.captions) for r in records] == [("0.png", whole[0].captions[:1]), ("1.png", whole[1].captions)]
    assert callable(records[0].image)
    assert records[0].image() == (photos.parent / "images" / "0.png").read_bytes()  # type: ignore[union-attr]
    row = json.loads((tmp_path / "kept" / "keep.jsonl").read_text().splitlines()[1])
    assert row["itm"] == [0.6, 0.7]
    assert row["origins"] == ["web", "web"]


def test_every_row_can_be_asked_why(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = scored(tmp_path / "scores", photos)
    assert main(["filter", str(scores), "--min-itm", "0.65", "--out", str(tmp_path / "kept"), "--no-report"]) == 0
    capsys.readouterr()
    assert main(["filter", str(tmp_path / "kept"), "--why", "1.png"]) == 0  # with the settings of that filter
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("dropped: itm below 0.65")
    assert second.startswith("kept")
    assert main(["filter", str(scores), "--why", "no.png"]) == 2


def test_nothing_kept_is_said_and_not_written(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = scored(tmp_path / "scores", photos)
    assert main(["filter", str(scores), "--min-itm", "0.95", "--out", str(tmp_path / "kept"), "--no-report"]) == 1
    assert "no row is kept" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


def test_pictures_in_tars_become_new_shards(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(open_source(photos), tmp_path / "tars", ShardConfig(max_errors=0.5))
    before = (tmp_path / "tars" / "00000.tar").read_bytes()
    scores = scored(tmp_path / "scores", tmp_path / "tars", tars=True)
    options = ["--out", str(tmp_path / "kept"), "--format", "parquet", "--no-report"]
    assert main(["filter", str(scores), *options]) == 0
    assert "--shards" in capsys.readouterr().out
    assert len(pq.read_table(tmp_path / "kept" / "keep.parquet")) == 2
    assert main(["filter", str(scores), *options, "--shards", str(tmp_path / "new")]) == 0
    records = open_source(tmp_path / "new")
    assert [len(r.captions) for r in records] == [1, 2]
    assert (tmp_path / "tars" / "00000.tar").read_bytes() == before


def test_unfinished_scores_are_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = scored(tmp_path / "scores", photos)
    (scores / "00000.parquet").unlink()
    assert main(["filter", str(scores)]) == 2
    assert "not scored yet" in capsys.readouterr().err


def test_the_report(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = scored(tmp_path / "scores", photos)
    assert main(["filter", str(scores), "--out", str(tmp_path / "kept"), "--truth", str(photos)]) == 0
    text = (tmp_path / "kept" / "report.html").read_text()
    assert "3 of 14 texts are kept" in text
    assert "script-src" in text
    assert 'type="range"' in text
    assert "Next to the border" in text
    assert "area under the curve" in text
    assert "itm is not a number" in text
    assert text.count("data:image/") >= 6


def test_a_full_disk_leaves_no_list(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = scored(tmp_path / "scores", photos)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("imglish.atomic.os.fsync", full)
        assert main(["filter", str(scores), "--out", str(tmp_path / "kept"), "--no-report"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "kept").iterdir()] == []
    assert main(["filter", str(scores), "--out", str(tmp_path / "kept"), "--no-report"]) == 0


def test_texts_do_no_harm_in_terminal_and_report(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in photos.read_text().splitlines()]
    lines[0]["captions"] = ["a \x1b[31mred\x07 hat", "<script>alert(1)</script> a hat"]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "images").symlink_to(photos.parent / "images")
    scores = scored(tmp_path / "scores", tmp_path / "captions.jsonl")
    assert main(["filter", str(scores), "--min-itm", "0.1", "--out", str(tmp_path / "kept")]) == 0
    assert "control characters" in capsys.readouterr().out
    assert main(["filter", str(tmp_path / "kept"), "--why", "0.png"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("dropped: control characters")
    assert "\x1b" not in said
    page = (tmp_path / "kept" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert "Texts of several pictures" in page
