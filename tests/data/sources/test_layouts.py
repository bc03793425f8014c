from __future__ import annotations

import gzip
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from imglish.data.errors import DataError
from imglish.data.images import ImageError, decode
from imglish.data.sources import SourceConfig, kind_of, open_source
from imglish.data.sources.base import caption_counts, digest
from tests.data.sources import layouts
from tests.data.sources.layouts import CAPTIONS, NAMES, PAIRS, picture

FIRST = tuple((captions[0],) for captions in CAPTIONS)
EXPECTED = {
    "jsonl": CAPTIONS,
    "csv": CAPTIONS,
    "tsv with bytes": FIRST,
    "list": CAPTIONS,
    "coco": CAPTIONS,
    "karpathy": CAPTIONS,
    "metadata": CAPTIONS,
    "texts beside": CAPTIONS,
    "classes": (("red fox",), ("red fox",), ("wolf",)),
    "tars": FIRST + FIRST,
    "parquet": (CAPTIONS[2], *CAPTIONS[:2]),  # test comes before train
    "arrow": FIRST,
    "mixture": CAPTIONS + FIRST + FIRST,
}
KINDS = {
    "jsonl": "table",
    "csv": "table",
    "tsv with bytes": "table",
    "list": "list",
    "coco": "coco",
    "karpathy": "karpathy",
    "metadata": "folder",
    "texts beside": "folder",
    "classes": "folder",
    "tars": "tars",
    "parquet": "parquet",
    "arrow": "arrow",
    "mixture": "mixture",
}


@pytest.mark.parametrize("layout", PAIRS)
def test_every_layout_is_recognised_and_read(layout: str, tmp_path: Path) -> None:
    path = PAIRS[layout](tmp_path / "data")
    assert kind_of(str(path)) == KINDS[layout]
    found = open_source(path)
    assert tuple(record.captions for record in found) == EXPECTED[layout]
    assert caption_counts(found).tolist() == [len(captions) for captions in EXPECTED[layout]]
    assert len({record.image_id for record in found}) == len(found)
    order = [2, 0, 1] if layout == "parquet" else [0, 1, 2] * 3
    for number, record in enumerate(found):
        assert np.array_equal(decode(record.image), decode(picture(order[number]))), record.key
    assert not len(found.errors)


@pytest.mark.parametrize("layout", PAIRS)
def test_a_source_goes_to_other_processes_and_has_views(layout: str, tmp_path: Path) -> None:
    found = open_source(PAIRS[layout](tmp_path))
    again = pickle.loads(pickle.dumps(found))
    assert again.digest() == found.digest() == digest(found)
    for number in (0, len(found) - 1, -1):
        assert again[number].captions == found[number].captions
        assert again[number].key == found[number].key
        assert callable(again[number].image)
        assert again[number].image() == found[number].image()
    assert [r.key for r in found[1:]] == [r.key for r in found][1:]
    assert found[1:].caption_counts().tolist() == found.caption_counts().tolist()[1:]
    assert [r.key for r in found[::-1]] == [r.key for r in found][::-1]
    with pytest.raises(IndexError):
        found[len(found)]


@pytest.mark.parametrize("layout", sorted(set(PAIRS) - {"mixture"}))
def test_jobs_that_need_only_one_side(layout: str, tmp_path: Path) -> None:
    path = PAIRS[layout](tmp_path)
    texts = open_source(path, needs="texts")
    if layout not in ("csv", "metadata", "coco"):  # there a row is a text
        assert tuple(record.captions for record in texts) == EXPECTED[layout]
    assert all(record.image is None for record in texts)
    images = open_source(path, needs="images")
    assert all(record.captions == () and callable(record.image) for record in images)
    assert len(images) == len(EXPECTED[layout])


def test_texts_alone(tmp_path: Path) -> None:
    path = layouts.lines(tmp_path)
    assert [record.captions for record in open_source(path, needs="texts")] == list(FIRST)
    with pytest.raises(DataError, match="has no pictures"):
        open_source(path)
    packed = tmp_path / "more.txt.gz"
    packed.write_bytes(gzip.compress(b"eins\nzwei\n"))
    found = open_source(packed, needs="texts")
    assert [(record.key, record.captions) for record in found] == [
        ("more.txt.gz:1", ("eins",)),
        ("more.txt.gz:2", ("zwei",)),
    ]
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(DataError, match="damaged or cut off"):
        open_source(packed, needs="texts")


def test_pictures_alone_in_one_folder(tmp_path: Path) -> None:
    layouts.pictures(tmp_path)
    assert [record.key for record in open_source(tmp_path, needs="images")] == list(NAMES)
    with pytest.raises(DataError, match=r"Add metadata\.csv"):
        open_source(tmp_path)


def test_splits(tmp_path: Path) -> None:
    path = layouts.karpathy(tmp_path / "k")
    for split, expected in (("train", "a"), ("train+restval", "ab"), ("not test", "ab"), ("test", "c")):
        assert [r.key[-5] for r in open_source(path, split=split)] == list(expected)
    with pytest.raises(DataError, match=r'no row has split "val" \(there are: restval, test, train\)'):
        open_source(path, split="val")
    parquet = layouts.parquet(tmp_path / "p")
    assert [r.captions for r in open_source(parquet, split="train")] == list(CAPTIONS[:2])
    for name in ("train", "val"):
        layouts.folder_with_metadata(tmp_path / "f" / name)
    assert len(open_source(tmp_path / "f")) == 6
    assert [r.key for r in open_source(tmp_path / "f", split="val")] == list(NAMES)
    for name in ("train", "val"):
        layouts.arrow(tmp_path / "d" / name)
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "val"]}')
    assert len(open_source(tmp_path / "d")) == 6
    assert len(open_source(tmp_path / "d", split="val")) == 3
    with pytest.raises(DataError, match=r'no split "test" \(there are: train, val\)'):
        open_source(tmp_path / "d", split="test")


def test_languages(tmp_path: Path) -> None:
    rows = [
        {"image": "a.jpg", "captions": {"en": ["one"], "de": ["eins", "ein"]}},
        {"image": "b.jpg", "caption": "two", "language": "en"},
        {"image": "c.jpg", "caption": "drei", "lang": "de"},
    ]
    path = layouts.jsonl(tmp_path, rows)
    assert [r.captions for r in open_source(path, language="de")] == [("eins", "ein"), ("drei",)]
    assert [r.captions for r in open_source(path, language="en")] == [("one",), ("two",)]


def test_fields_by_name_wrong_captions_and_groups(tmp_path: Path) -> None:
    rows = [
        {"picture": "a.jpg", "t": {"fr": "un"}, "negative_caption": "deux", "shop": 5},
        {"picture": "b.jpg", "t": {"fr": "trois"}, "negative_caption": "quatre", "shop": 5},
    ]
    found = open_source(
        layouts.jsonl(tmp_path, rows), image_field="picture", caption_fields=("t.fr",), group_field="shop"
    )
    assert [(r.captions, r.swapped, r.group) for r in found] == [
        (("un",), ("deux",), "5"),
        (("trois",), ("quatre",), "5"),
    ]
    alone = open_source(layouts.jsonl(tmp_path, rows), image_field="picture", needs="images")
    assert [(r.captions, r.swapped) for r in alone] == [((), ())] * 2


def test_rows_of_one_picture_are_one_record(tmp_path: Path) -> None:
    rows = [{"image": NAMES[i % 3], "caption": f"caption {i}", "swapped": f"wrong {i}"} for i in (2, 0, 1, 0, 2, 0)]
    numbered = [{**row, "caption": f"{i} {row['caption']}"} for i, row in enumerate(rows)]
    found = open_source(layouts.jsonl(tmp_path, numbered))
    assert [r.key for r in found] == ["c.jpg", "a.jpg", "b.jpg"]
    assert [[c[0] for c in r.captions] for r in found] == [["0", "4"], ["1", "3", "5"], ["2"]]
    assert [r.swapped[-1] for r in found] == ["wrong 2", "wrong 0", "wrong 1"]
    assert [r.image_id for r in found] == [0, 1, 2]


def test_the_table_in_a_folder(tmp_path: Path) -> None:
    layouts.jsonl(tmp_path, name="captions.jsonl")
    assert len(open_source(tmp_path)) == 3
    shutil.copy(tmp_path / "captions.jsonl", tmp_path / "other.jsonl")
    assert len(open_source(tmp_path)) == 3
    (tmp_path / "captions.jsonl").rename(tmp_path / "more.jsonl")
    with pytest.raises(DataError, match=r"which of these is meant: more\.jsonl, other\.jsonl"):
        open_source(tmp_path)


def test_class_names_in_a_template(tmp_path: Path) -> None:
    found = open_source(layouts.folder_of_classes(tmp_path), template="a photo of a {}.")
    assert [(r.captions[0], r.group) for r in found] == [
        ("a photo of a red fox.", "red_fox"),
        ("a photo of a red fox.", "red_fox"),
        ("a photo of a wolf.", "wolf"),
    ]


def test_absolute_names_of_another_machine(tmp_path: Path) -> None:
    rows = [{"image": f"/export/share/coco/{name}", "caption": "x"} for name in NAMES]
    path = tmp_path / "list.json"
    layouts.pictures(tmp_path / "images")
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match="absolute: take a part off with strip"):
        open_source(path)
    assert decode(open_source(path, strip="/export/share/coco/")[1].image).size == (24, 16)
    here = [{"image": str(tmp_path / "images" / name), "caption": "x"} for name in NAMES]
    path.write_text(json.dumps(here))
    assert decode(open_source(path, images=str(tmp_path))[1].image).size == (24, 16)


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl does not exist"):
        open_source(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match=r"the image folder .* does not exist"):
        open_source(layouts.jsonl(tmp_path), images=str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match=r"none of the first 1 pictures .*missing\.png"):
        open_source(layouts.jsonl(tmp_path, [{"image": "missing.png", "caption": "x"}]))
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="unpack it"):
        open_source(tmp_path / "x.tar.gz")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read \.bin; known: \.json"):
        open_source(tmp_path / "x.bin")
    with pytest.raises(DataError, match="there is no kind of source 'photos'"):
        SourceConfig(path="x", kind="photos")  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no tar files"):
        open_source(tmp_path / "empty", kind="tars")


def test_a_kind_can_be_said(tmp_path: Path) -> None:
    folder = layouts.tars(tmp_path)
    assert len(open_source(folder, kind="parquet", needs="texts", caption_fields=("better",))) == 6


def test_object_storage(tmp_path: Path) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    for layout in ("jsonl", "tars", "texts beside", "parquet", "list"):
        made = PAIRS[layout](tmp_path / layout.replace(" ", "-"))
        root = tmp_path / layout.replace(" ", "-")
        for file in root.rglob("*"):
            if file.is_file():
                files.pipe_file(f"/{layout}/{file.relative_to(root)}", file.read_bytes())
        url = f"memory://{layout}" + ("" if made == root else f"/{made.relative_to(root)}")
        found = open_source(url, index=str(tmp_path / "index"))
        assert tuple(record.captions for record in found) == EXPECTED[layout]
        order = [2, 0, 1] if layout == "parquet" else [0, 1, 2] * 2
        for number, record in enumerate(found):
            assert np.array_equal(decode(record.image), decode(picture(order[number])))


def test_cells_with_a_path_in_place_of_the_bytes(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    folder = layouts.pictures(tmp_path / "data" / "pictures")
    paths = [f"pictures/{NAMES[0]}", str(folder / NAMES[1]), "../secret.jpg", "pictures/none.jpg"]
    (tmp_path / "secret.jpg").write_bytes(picture(3))
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "caption": list("abcd")}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pa.parquet.write_table(
        pa.table({"image": pa.array(rows["image"], kind), "caption": rows["caption"]}), tmp_path / "data" / "x.parquet"
    )
    found = open_source(tmp_path / "data" / "x.parquet")
    assert [decode(record.image).size for record in found[:2]] == [(24, 16)] * 2
    for record, reason in zip(found[2:], ("outside", "missing")):
        with pytest.raises(ImageError) as raised:
            decode(record.image)
        assert raised.value.reason == reason


def test_columns_of_vectors_are_not_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    layouts.pictures(tmp_path)
    table = pa.table({"path": list(NAMES), "text": list("abc"), "embedding": [[0.5] * 8] * 3, "ids": [[1, 2]] * 3})
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    assert [record.captions for record in open_source(tmp_path / "x.parquet")] == [("a",), ("b",), ("c",)]
    with pytest.raises(DataError, match=r"no caption in 'embedding' \(fields: path, text\)"):
        open_source(tmp_path / "x.parquet", caption_fields=("embedding",))
