"""What `imglish data inspect` finds in data that are known to hold it."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imglish.cli import main
from imglish.data.records import Record
from imglish.data.scenes import SceneConfig
from imglish.data.sources.drawn import TrainingScenes
from imglish.inspection import duplicates
from imglish.inspection.captions import read_captions
from imglish.inspection.languages import UNCLEAR, language_of, words
from imglish.inspection.page import findings, page_of, text_of
from imglish.inspection.pictures import look_at_all
from imglish.inspection.survey import Portion, survey
from tests.data.test_decode import encoded, photo


def picture(seed: int, side: int = 96) -> Image.Image:
    return photo(side, side, seed)


def record(key: str, image: Any, *captions: str, number: int = 0) -> Record:
    return Record(key, image, captions, number)


# ---- languages and captions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("A man is standing on the beach with a dog .", "English"),
        ("Ein Mann steht mit einem Hund am Strand.", "German"),
        ("Un homme est sur la plage avec un chien.", "French"),
        ("Un hombre está en la playa con un perro.", "Spanish"),
        ("Muž stojí na pláži se psem, který běží.", "Czech"),
        ("一个男人和一只狗站在海滩上", "Chinese"),
        ("男の人が犬と海辺に立っています", "Japanese"),
        ("남자가 개와 함께 해변에 서 있다", "Korean"),
        ("Мужчина стоит на пляже с собакой", "Russian or another in Cyrillic"),
        ("dog beach", UNCLEAR),
        ("123 !!", "no letters"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert language_of(text) == language


def test_words_of_scripts_without_spaces_are_pairs_of_characters() -> None:
    assert words("A dog's red hat!") == ["a", "dog's", "red", "hat"]
    assert words("红色帽子, 包") == ["红色", "色帽", "帽子", "包"]


def test_captions_are_counted() -> None:
    records = [
        record("a", None, "A red hat .", "a red hat"),
        record("b", None, "A RED hat!", "two blue shoes and a hat"),
        record("c", None, "x", "size 38", "size 39"),
    ]
    found = read_captions(records)
    assert found.lengths.tolist() == [3, 3, 3, 6, 1, 1, 1]
    assert found.per_picture.tolist() == [2, 2, 3]
    assert found.common[0] == ("hat", 4)
    assert "a" not in dict(found.common)
    assert read_captions([record("m", None, "A man with a dog.")]).common == [("man", 1), ("dog", 1)]  # Swedish: one
    assert [count for _, count in found.repeated] == [2]  # of two pictures, though three captions say it
    assert len(np.unique(found.texts)) == 5


# ---- duplicates -----------------------------------------------------------------------------------------------------


def test_near_pairs_are_those_of_a_full_comparison() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 40, dtype=np.uint64)
    noisy = base.copy()
    for i in range(40):
        for bit in rng.choice(64, int(rng.integers(0, 8)), replace=False):
            noisy[i] ^= np.uint64(1) << np.uint64(bit)
    hashes = np.unique(np.concatenate([base, noisy]))
    apart = duplicates.bits_apart(hashes[:, None], hashes[None, :])
    for distance in range(duplicates.NEAR + 1):
        expected = [(i, j) for i in range(len(hashes)) for j in range(i + 1, len(hashes)) if apart[i, j] <= distance]
        assert duplicates.near_pairs(hashes, distance) == expected
    assert len(duplicates.near_pairs(hashes)) > 10
    with pytest.raises(ValueError, match="up to 4"):
        duplicates.near_pairs(hashes, 5)


def test_groups_have_a_centre_and_no_chains() -> None:
    """Each of these is near the next one only: the middle ones join their neighbours, the ends stay apart."""
    chain = np.array([0, 0b111, 0b111111, 0b111111111, 0x7FFF << 45], dtype=np.uint64)
    assert [group.tolist() for group in duplicates.near_groups(chain)] == [[0, 1], [2, 3]]
    equal = np.array([5, 0x7FFF << 45, 5, 5, 4], dtype=np.uint64)
    assert [group.tolist() for group in duplicates.near_groups(equal)] == [[0, 2, 3, 4]]
    assert duplicates.near_groups(np.array([], dtype=np.uint64)) == []
    many = np.zeros(20_000, dtype=np.uint64)  # equal hashes are not compared with each other
    assert len(duplicates.near_groups(many)[0]) == 20_000


def test_near_shared_names_a_place_in_both() -> None:
    far = 0xFFFF << 40
    one = np.array([0, far, far, 7], dtype=np.uint64)
    two = np.array([2**63, far + 1, 2**20 * 31, 7], dtype=np.uint64)
    assert duplicates.near_shared(one, two) == [(0, 0), (1, 1), (3, 3)]


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_are_looked_at_and_what_is_broken_is_named() -> None:
    data = encoded(picture(0, 80), "PNG")
    records = [
        record("png", data),
        record("jpeg", encoded(picture(1), "JPEG")),
        record("cut", data[:100]),
        record("drawn", lambda: picture(2)),
        record("none", None),
    ]
    found = look_at_all(records, np.arange(5), workers=1)
    assert found.numbers.tolist() == [0, 1, 3]
    assert found.forms == ["PNG", "JPEG", "drawn"]
    assert found.widths.tolist() == [80, 96, 96]
    assert found.sizes[0] == len(data)
    assert [(p.key, p.reason) for p in found.problems] == [("cut", "truncated"), ("none", "missing")]


def test_processes_find_the_same() -> None:
    scenes = TrainingScenes(SceneConfig(scenes=150, size=24))
    alone, together = (look_at_all(scenes, np.arange(150), workers=n) for n in (1, 2))
    assert np.array_equal(alone.digests, together.digests)
    assert np.array_equal(alone.hashes, together.hashes)
    assert alone.forms == together.forms


def test_the_hash_survives_size_and_compression() -> None:
    records = [
        record("whole", encoded(picture(3, 200), "PNG")),
        record("small", encoded(picture(3, 200).resize((90, 90)), "JPEG", quality=40)),
        record("other", encoded(picture(4, 200), "PNG")),
    ]
    hashes = look_at_all(records, np.arange(3), workers=1).hashes
    assert duplicates.bits_apart(hashes[0], hashes[1]) <= duplicates.NEAR
    assert duplicates.bits_apart(hashes[0], hashes[2]) > 10


# ---- the whole survey -----------------------------------------------------------------------------------------------


def test_leaks_between_splits_are_found() -> None:
    shared, small = encoded(picture(5, 200), "PNG"), encoded(picture(6, 200).resize((90, 90)), "JPEG")
    train = [record(f"t{i}", encoded(picture(10 + i), "PNG"), f"a dog {i}") for i in range(4)]
    train += [record("twin", shared, "a cat"), record("large", encoded(picture(6, 200), "PNG"), "a cow")]
    val = [
        record("v", encoded(picture(30), "PNG"), "a dog 0"),
        record("leak", shared, "a hen"),
        record("s", small, "x"),
    ]
    found = survey([Portion("train", "a", train), Portion("val", "b", val)], workers=1)
    (overlap,) = found.overlaps
    assert overlap.leaks
    assert overlap.same == [(4, 1)]
    assert overlap.near == [(5, 2)]
    assert overlap.captions == 1
    assert overlap.keys == 0
    assert found.same == [[(0, 4), (1, 1)]]
    assert found.near == [[(0, 5), (1, 2)]]
    warnings = [line for line, warns in findings(found) if warns]
    assert warnings[0] == "leak: 1 picture of val stands in train too, byte for byte"
    assert warnings[1] == "possible leak: 1 picture of val looks like one of train"


def test_names_count_within_one_source_only() -> None:
    one, two = [record("1.jpg", encoded(picture(0), "PNG"), "x")], [record("1.jpg", encoded(picture(1), "PNG"), "y")]
    for source, keys in (("a", 1), ("b", 0)):
        (overlap,) = survey([Portion("train", "a", one), Portion("val", source, two)], workers=1).overlaps
        assert overlap.keys == keys
        assert overlap.leaks == bool(keys)


def test_clean_data_are_said_to_be_clean() -> None:
    made = [record(str(i), encoded(picture(i), "PNG"), f"a dog with {i} hats") for i in range(5)]
    found = survey([Portion("all", "a", made)], workers=1)
    assert [line for line, _ in findings(found)] == ["nothing is broken, double or shared between splits"]
    few = survey([Portion("all", "a", made)], most=2, workers=1)
    assert few.seen[0].looked == 2
    assert "all: 2 of 5 pictures were read, evenly spread" in [line for line, _ in findings(few)]


def test_texts_alone_have_no_pictures() -> None:
    found = survey([Portion("texts", "a", [record("1", None, "a dog"), record("2", None, "a cat")])], workers=1)
    assert found.seen[0].pictures is None
    page = page_of(found, "T", "")
    assert "Captions" in page.html()
    assert "<img" not in page.html()
    assert "texts" in text_of(found)


def test_the_page_escapes_what_the_data_say() -> None:
    made = [record("<b>key</b>", encoded(picture(0), "PNG"), "<script>alert(1)</script>\x1b[31m a dog")]
    found = survey([Portion("<i>split</i>", "a", made, ())], workers=1)
    html = page_of(found, "<u>title</u>", "").html()
    assert not any(tag in html for tag in ("<b>key", "<script>", "<i>split", "<u>title", "\x1b"))
    assert "\x1b" not in text_of(found)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Twelve lines: seven good pictures, one of them twice under other names, and five broken ones."""
    (tmp_path / "images").mkdir()
    rows: list[dict[str, Any]] = []

    def add(name: str, data: bytes | None, caption: str, split: str) -> None:
        if data is not None:
            (tmp_path / "images" / name).write_bytes(data)
        rows.append({"image": name, "caption": caption, "split": split})

    for i in range(5):
        add(f"{i}.png", encoded(picture(i), "PNG"), f"a photo of dog number {i}", "train" if i < 3 else "val")
    add("leak.png", encoded(picture(0), "PNG"), "a leak", "val")
    add("cmyk.jpg", encoded(picture(9).convert("CMYK"), "JPEG"), "一只狗", "train")
    add("cut.png", encoded(picture(1), "PNG")[:200], "cut", "train")
    add("empty.jpg", b"", "empty", "train")
    add("page.jpg", b"<html></html>", "a page", "val")
    add("gone.jpg", None, "gone", "val")
    lines = [json.dumps(row) for row in rows] + ["{not json"]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_the_command_finds_it_all(messy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = messy / "out"
    assert main(["data", "inspect", str(messy / "captions.jsonl"), "--out", str(out), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "leak: 1 picture of val stands in train too, byte for byte" in printed
    for reason in ("truncated", "empty", "not a picture", "missing", "broken line"):
        assert reason in printed
    with (out / "errors.csv").open(newline="") as file:
        broken = {(row["split"], row["reason"]) for row in csv.DictReader(file)}
    assert broken == {
        *(("train", reason) for reason in ("truncated", "empty", "broken line")),
        *(("val", reason) for reason in ("not a picture", "missing")),
    }
    with (out / "duplicates.csv").open(newline="") as file:
        doubles = [(row["kind"], row["split"], row["key"]) for row in csv.DictReader(file)]
    assert doubles == [("same bytes", "train", "0.png"), ("same bytes", "val", "leak.png")]
    held = json.loads((out / "survey.json").read_text())
    assert held["splits"]["train"]["records"] == 6
    assert held["shared"][0]["bytes"] == 1
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    assert page.count("<img") > 8
    assert page.count("<svg") >= 1


def test_a_place_for_results_that_cannot_be_written_is_said_first(
    messy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = messy / "captions.jsonl"
    assert main(["data", "inspect", str(file), "--out", str(file / "out"), "--workers", "1"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert f"cannot write to {file / 'out'}: {file} is not a folder" in said.err


def test_several_sources_are_compared_like_splits(messy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (messy / "captions.jsonl").read_text().splitlines()
    (messy / "one.jsonl").write_text("\n".join(row for row in rows[:3]))
    (messy / "two.jsonl").write_text("\n".join(row for row in rows[3:6]))
    names = [str(messy / f"{name}.jsonl") for name in ("one", "two")]
    assert main(["data", "inspect", *names, "--out", str(messy / "out"), "--workers", "1"]) == 0
    assert "leak: 1 picture of two.jsonl stands in one.jsonl too" in capsys.readouterr().out


def test_what_there_is_not_is_left_out(messy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (messy / "texts.jsonl").write_text('{"caption": "a dog in the snow"}\n{"caption": "a cat in the sun"}')
    assert main(["data", "inspect", str(messy / "texts.jsonl"), "--out", str(messy / "t")]) == 0
    assert "texts alone were looked at" in capsys.readouterr().out
    alone = messy / "alone"
    alone.mkdir()
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    (alone / "a.png").write_bytes(buffer.getvalue())
    assert main(["data", "inspect", str(alone), "--out", str(messy / "p")]) == 0
    assert "pictures alone were looked at" in capsys.readouterr().out
    assert main(["data", "inspect", str(messy / "nothing.jsonl"), "--out", str(messy / "n")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (messy / "n").exists()
    (messy / "odd.jsonl").write_text('{"en": "a dog", "de": "ein Hund"}')
    assert main(["data", "inspect", str(messy / "odd.jsonl"), "--out", str(messy / "n")]) == 2
    assert "no picture path in one of the usual fields (fields: en, de)" in capsys.readouterr().err
    assert main(["data", "inspect", str(messy / "odd.jsonl"), "--out", str(messy / "n"), "--captions", "en,de"]) == 0


def test_splits_of_tars_need_one_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(i, "train" if i < 4 else "val") for i in range(6)]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, split in rows:
            text = json.dumps({"caption": f"a dog {i}", "split": split}).encode()
            for name, data in ((f"{i}.png", encoded(picture(i % 5), "PNG")), (f"{i}.json", text)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert main(["data", "inspect", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "leak: 1 picture of val stands in train too, byte for byte" in capsys.readouterr().out
    held = json.loads((tmp_path / "out" / "survey.json").read_text())["splits"]
    assert {name: (split["records"], split["captions"]) for name, split in held.items()} == {
        "train": (4, 4),
        "val": (2, 2),
    }
    assert len(list(tmp_path.glob(".imglish-*.index"))) == 1


def test_a_name_in_two_splits_is_a_leak(messy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": "0.png", "caption": text, "split": split} for text, split in (("a", "train"), ("b", "val"))]
    (messy / "both.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["data", "inspect", str(messy / "both.jsonl"), "--out", str(messy / "o"), "--workers", "1"]) == 0
    assert "leak: 1 picture of val stands in train too, by name" in capsys.readouterr().out


def test_parts_of_a_mixture_are_compared(messy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (messy / "captions.jsonl").read_text().splitlines()
    (messy / "one.jsonl").write_text("\n".join(rows[:3]))
    (messy / "two.jsonl").write_text("\n".join(rows[3:6]))
    (messy / "mix.yaml").write_text("sources:\n- {path: one.jsonl}\n- {path: two.jsonl, weight: 2}\n")
    assert main(["data", "inspect", str(messy / "mix.yaml"), "--out", str(messy / "o"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "double in the mixture: 1 picture of two.jsonl stands in one.jsonl too, byte for byte" in printed
    assert "leak" not in printed.split("double in")[1]
    held = json.loads((messy / "o" / "survey.json").read_text())
    (shared,) = held["shared"]
    assert (shared["bytes"], shared["captions"], shared["parts_of_a_mixture"]) == (1, 0, True)
    assert "captions of the one count as wrong for the other" in (messy / "o" / "report.html").read_text(
        encoding="utf-8"
    )


def test_rows_with_several_pictures_are_looked_at_apart(messy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"images": ["0.png", "1.png"], "sentence": "one dog is red", "split": "train"},
        {"images": ["1.png", "2.png"], "sentence": "two dogs are blue", "split": "train"},
        {"images": ["3.png", "cut.png"], "sentence": "it rains", "split": "val"},
    ]
    (messy / "reasoning.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["data", "inspect", str(messy / "reasoning.jsonl"), "--out", str(messy / "o"), "--workers", "1"]) == 0
    assert "pictures and texts were looked at apart" in capsys.readouterr().out
    held = json.loads((messy / "o" / "survey.json").read_text())["splits"]
    assert {name: (split["records"], split["captions"]) for name, split in held.items()} == {
        "train": (3, 2),
        "val": (2, 1),
    }
    assert held["val"]["broken"] == {"truncated": 1}
