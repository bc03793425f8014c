from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imglish.data.records import Record, RecordError, read_records


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_jsonl_with_lists_strings_splits_and_repeated_pictures(folder: Path) -> None:
    path = jsonl(
        folder,
        {"image": "a.png", "captions": ["one", "two"], "split": "train"},
        "",
        {"image": "b.png", "caption": "a string stays one caption", "split": "train"},
        {"image": "c.png", "captions": ["other"], "split": "val"},
        {"image": "a.png", "captions": ["三"], "split": "train"},
    )
    found = read_records(path, split="train")
    assert [(r.key, r.captions, r.image_id) for r in found] == [
        ("a.png", ("one", "two", "三"), 0),
        ("b.png", ("a string stays one caption",), 1),
    ]
    assert found[0].image == folder / "images" / "a.png"
    assert [r.key for r in read_records(path)] == ["a.png", "b.png", "c.png"]


def test_chosen_and_nested_caption_fields(folder: Path) -> None:
    path = jsonl(folder, {"picture": "a.png", "captions": ["en"], "de": ["eins"], "more": {"fr": "un"}})
    assert read_records(path, image="picture", captions=("de", "more.fr"))[0].captions == ("eins", "un")


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_csv_with_rows_and_columns(folder: Path, suffix: str, separator: str) -> None:
    path = folder / f"data{suffix}"
    rows = [["image", "caption", "second"], ["a.png", '"one, two"', ""], ["b.png", "three", "four"], ["a.png", "x", ""]]
    path.write_text("\n".join(separator.join(row) for row in rows), encoding="utf-8")
    found = read_records(path, captions=("caption", "second"))
    assert [(r.key, r.captions) for r in found] == [("a.png", ("one, two", "x")), ("b.png", ("three", "four"))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": "b.png", ', "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ({"captions": ["x"]}, "no picture path"),
        ({"image": "b.png"}, "no caption"),
        ({"image": "b.png", "caption": "  "}, "no caption"),
        ({"image": "b.png", "captions": ["good", ""]}, "caption 2 .* is empty"),
        ({"image": "b.png", "captions": [["nested"]]}, "not a text"),
        ({"image": "b.png", "captions": 7}, "neither a text nor a list"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(folder: Path, row: Any, message: str) -> None:
    path = jsonl(folder, {"image": "a.png", "captions": ["fine"]}, row)
    with pytest.raises(RecordError, match=rf"data\.jsonl:2: .*{message}"):
        read_records(path)


def test_csv_with_a_wrong_number_of_cells(folder: Path) -> None:
    path = folder / "data.csv"
    path.write_text("image,caption\na.png,fine\nb.png,one,too many\n", encoding="utf-8")
    with pytest.raises(RecordError, match=r"data\.csv:3: the number of cells"):
        read_records(path)


def test_unknown_split_names_those_there_are(folder: Path) -> None:
    path = jsonl(folder, {"image": "a.png", "captions": ["x"], "split": "train"})
    with pytest.raises(RecordError, match=r'split "test" .*train'):
        read_records(path, split="test")


def test_a_wrong_image_folder_is_noticed_at_once(folder: Path) -> None:
    path = jsonl(folder, {"image": "missing.png", "captions": ["x"]})
    with pytest.raises(FileNotFoundError, match=r"none of the first 1 pictures .*missing\.png"):
        read_records(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_records(path, images=folder / "elsewhere")


def test_a_record_does_not_take_one_string_as_captions() -> None:
    with pytest.raises(TypeError, match="not one string"):
        Record("key", b"", "text", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 swapped captions for 1"):
        Record("key", b"", ("text",), 0, swapped=("a", "b"))
