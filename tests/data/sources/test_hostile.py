"""What is broken or hostile is counted by reason and named; nothing crashes, hangs or leads out of its folder."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imglish.data.errors import DataError
from imglish.data.images import ImageError, decode
from imglish.data.sources import open_source
from tests.data.sources import layouts
from tests.data.sources.layouts import CAPTIONS, NAMES, picture

GOOD = [{"image": name, "captions": captions} for name, captions in zip(NAMES, CAPTIONS)]
DEEP = '{"image": "a.jpg", "caption": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"image": "b.jpg", ', "broken line"),
        (DEEP, "broken line"),
        ("[1, 2]", "wrong type"),
        ({"captions": ["x"]}, "no picture"),
        ({"image": 7, "caption": "x"}, "wrong type"),
        ('{"image": NaN, "caption": "x"}', "wrong type"),
        ({"image": "a.jpg"}, "no caption"),
        ({"image": "a.jpg", "caption": "  "}, "no caption"),
        ({"image": "a.jpg", "captions": []}, "no caption"),
        ({"image": "a.jpg", "captions": [["nested"]]}, "wrong type"),
        ({"image": "a.jpg", "caption": 7}, "wrong type"),
        ('{"image": "a.jpg", "caption": NaN}', "wrong type"),
        ({"image": "a.jpg", "caption": {"en": "x"}}, "wrong type"),
        ({"image": "a.jpg", "caption": "x" * 1_000_000}, "long caption"),
        ('{"image": "a.jpg", "caption": "half \\ud800"}', "broken text"),
        ('{"image": "\\ud800.jpg", "caption": "x"}', "no picture"),
        ({"image": "../../etc/passwd", "caption": "x"}, "outside"),
        ({"image": "a.jpg\0", "caption": "x"}, "outside"),
    ],
)
def test_a_bad_row_is_counted_and_named(tmp_path: Path, row: Any, reason: str) -> None:
    path = layouts.jsonl(tmp_path, [*GOOD, row])
    file = tmp_path / "errors.csv"
    found = open_source(path, max_errors=0.5, errors_file=file)
    assert [r.captions for r in found] == list(CAPTIONS)
    assert found.errors.counts == {reason: 1}
    with file.open(newline="") as lines:
        (named,) = csv.DictReader(lines)
    assert named["reason"] == reason
    assert named["key"].endswith("data.jsonl:4")
    with pytest.raises(DataError, match=r"1 of 4 records cannot be used \(1 .*more than the allowed share of 1\.00%"):
        open_source(path)


def test_one_bad_caption_does_not_cost_the_others(tmp_path: Path) -> None:
    path = layouts.jsonl(tmp_path, [*GOOD[1:], {"image": "a.jpg", "captions": ["good", "", 5]}])
    found = open_source(path, max_errors=0.9)
    assert found[2].captions == ("good",)
    assert found.errors.counts == {"empty caption": 1, "wrong type": 1}


def test_broken_utf8_and_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imglish.data.sources.rows.MAX_LINE", 5000)
    path = layouts.jsonl(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"image": "a.jpg", "caption": "\xff\xfe"}\n')
        file.write(b'{"image": "a.jpg", "caption": "' + b"x" * 20_000 + b'"}\n')
        file.write(b'{"image": "a.jpg", "caption": "the last one"}\n')
    found = open_source(path, max_errors=0.5)
    assert found[0].captions[-1] == "the last one"
    assert found.errors.counts == {"broken text": 1, "line too long": 1}
    table = layouts.csv_table(tmp_path / "c")
    with table.open("ab") as file:
        file.write(b"a.jpg,\xff\xfe\nb.jpg,one,too many\nc.jpg,fine\n")
    found = open_source(table, max_errors=0.5)
    assert found.errors.counts == {"broken text": 1, "broken line": 1}
    assert found[2].captions[-1] == "fine"


@pytest.mark.parametrize(
    "text", ['[{"image": "a.jpg", "caption": "x"}, {"im', "[", "", "{", '{"a": 1}', "[1 2]", "null", DEEP]
)
def test_a_damaged_json_file_is_an_end_with_its_place(tmp_path: Path, text: str) -> None:
    layouts.pictures(tmp_path)
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"list\.json"):
        open_source(path)


def test_coco_with_wrong_and_doubled_ids(tmp_path: Path) -> None:
    path = layouts.coco(tmp_path)
    data = json.loads(path.read_text())
    data["images"] += [data["images"][0], {"file_name": "x.jpg"}, 5, {"id": 99, "file_name": "alone.jpg"}]
    data["annotations"] += [
        {"image_id": 12345, "caption": "x"},
        {"image_id": [], "caption": "x"},
        None,
        {"caption": "y"},
    ]
    path.write_text(json.dumps(data))
    found = open_source(path, max_errors=0.9)
    assert [r.captions for r in found] == list(CAPTIONS)
    assert found.errors.counts == {"duplicate key": 1, "wrong type": 2, "missing member": 4, "no caption": 1}


def test_links_pipes_and_names_that_lead_out_are_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture(5))
    folder = layouts.pictures(tmp_path / "data")
    (folder / "link.jpg").symlink_to(secret)
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    names = ["a.jpg", "link.jpg", "up/secret.jpg", str(secret), "pipe.jpg", "folder.jpg", "gone.jpg"]
    path = layouts.jsonl(folder, [{"image": name, "caption": "x"} for name in names])
    found = open_source(path, images=str(folder))
    reasons = []
    for record in found:
        try:
            decode(record.image, name=record.key)
            reasons.append("read")
        except ImageError as error:
            reasons.append(error.reason)
    assert reasons == ["read", "outside", "outside", "outside", "not a picture", "not a picture", "missing"]


def test_links_in_folders_are_counted(tmp_path: Path) -> None:
    secret = layouts.pictures(tmp_path / "secret")
    folder = layouts.folder_with_texts(tmp_path / "data")
    (folder / "out").symlink_to(secret)
    (folder / "x.jpg").symlink_to(secret / "a.jpg")
    (folder / "lonely.jpg").write_bytes(picture(1))
    (folder / "b.txt").write_bytes(b"\xff\xff")
    (folder / "c.txt").write_text("\n\n")
    found = open_source(folder, max_errors=1)
    assert [r.key for r in found] == ["a.jpg"]
    assert found.errors.counts == {"link": 2, "missing member": 1, "broken text": 1, "no caption": 1}


def test_files_of_a_table_outside_of_its_folder(tmp_path: Path) -> None:
    folder = layouts.arrow(tmp_path / "a")
    for name in ("../x.arrow", "/etc/passwd", "half \ud800.arrow", "zero\0.arrow"):
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match="leads out of the folder"):
            open_source(folder)
    for text in ("{", "[]", '{"_data_files": [{"filename": 5}]}', '{"_data_files": 5}'):
        (folder / "state.json").write_text(text)
        with pytest.raises(DataError, match=r"does not say|no arrow files"):
            open_source(folder)


def test_cells_without_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"caption": "a", "base64": "!!!!"}, {"caption": "b", "base64": "QUJD"}, {"caption": "c", "base64": "A"}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    for record in open_source(path):
        with pytest.raises(ImageError):
            decode(record.image, name=record.key)
    path.write_text("{}\n" * 3)
    with pytest.raises(DataError, match=r"3 no picture"):
        open_source(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("- 5", "one key, sources"),
        ("sources: []", "one key, sources"),
        ("sources: [{weight: 1}]", "without a path"),
        ("sources: [{path: a.jsonl, wight: 2}]", "no setting 'wight'"),
        ("sources: [{path: a.jsonl, weight: much}]", "weight is 'much'"),
        ("sources: [{path: one/data.jsonl, weight: -1}]", "weight -1"),
        ("sources: [{path: one/data.jsonl, weight: .nan}]", "weight nan"),
        ("sources: [{path: none.jsonl}]", "does not exist"),
        ("sources: [!!python/object/apply:os.system [ls]]", "not YAML"),
        ("sources: [", "not YAML"),
        ("sources: " + "[" * 3000, "nested 3000 times"),
        ('sources: [{path: "half \\ud800.jsonl"}]', "does not exist"),
        ('sources: [{path: "zero \\0.jsonl"}]', "does not exist"),
        ("sources: \x01", "not YAML"),
    ],
)
def test_mixtures_that_cannot_be(tmp_path: Path, text: str, why: str) -> None:
    path = layouts.mixture(tmp_path)
    path.write_text(text)
    with pytest.raises(DataError, match=why):
        open_source(path)


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded() -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    assert decode(data).size == (64, 64)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="a JPEG of more than 200 scans") as raised:
        decode(data[:-2] + data[last:-2] * 300 + b"\xff\xd9")
    assert raised.value.reason == "too large"


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = layouts.folder_with_texts(tmp_path)
    for ending in (b".jpg", b".txt"):
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff" + ending)).write_bytes(b"x")
    for needs in ("pairs", "images"):
        found = open_source(folder, needs=needs, max_errors=0.5, errors_file=tmp_path / "errors.csv")
        assert len(found) == 3
        assert found.errors.counts == {"no picture": 1}
