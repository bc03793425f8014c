"""Files of tasks: layouts, and everything that can be wrong with them, named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imglish.data.errors import DataError, Errors
from imglish.data.tasks import READERS, TaskData, hold_out
from imglish.data.tasks.examples import Example


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    return tmp_path


def lines(folder: Path, *entries: Any, name: str = "x.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries) + "\n", encoding="utf-8")
    return path


def read(task: str, path: Path, share: float = 1.0, **more: Any) -> tuple[list[Example], Errors]:
    errors = Errors(share, what="examples", quiet=True)
    return READERS[task](TaskData(path, **more), errors), errors


GOOD = {"image": "a.png", "question": "what is it ?", "answers": ["dog", "cat"]}


def test_questions_as_lines(folder: Path) -> None:
    found, errors = read("vqa", lines(folder, GOOD, "", {**GOOD, "split": "val", "question_id": 7}))
    assert [example.key for example in found] == ["x.jsonl:1", "7"]
    assert found[0].answers == ("dog", "cat")
    assert found[0].images == (folder / "images" / "a.png",)
    assert not len(errors)
    only, _ = read("vqa", folder / "x.jsonl", split="val")
    assert [example.key for example in only] == ["x.jsonl:1", "7"]  # a line without a split is of every split


@pytest.mark.parametrize(
    ("entry", "reason", "message"),
    [
        ({**GOOD, "answers": "dog"}, "answers are one string", "x.jsonl:2: the field 'answers' is one string"),
        ({**GOOD, "answers": []}, "no answers", "x.jsonl:2: the field 'answers' holds a list"),
        ({**GOOD, "answers": ["a", 3]}, "wrong layout", "x.jsonl:2: an answer in 'answers' is a int"),
        ({**GOOD, "image": "none.png"}, "missing picture", "x.jsonl:2: there is no"),
        ({**GOOD, "image": "../secret.png"}, "outside", "x.jsonl:2: the picture '../secret.png' lies outside"),
        ({**GOOD, "image": "/etc/passwd"}, "outside", "x.jsonl:2"),
        ({**GOOD, "image": "a" * 5000}, "missing picture", "x.jsonl:2: there is no"),
        ({"image": "a.png", "answers": ["dog"]}, "wrong layout", "x.jsonl:2: no field 'question'"),
        ({**GOOD, "question": " "}, "wrong layout", "x.jsonl:2: the field 'question' holds an empty text"),
        ([1, 2], "wrong layout", "x.jsonl:2: a list in place of an object"),
        ({**GOOD, "question_id": 1}, "comes twice", "x.jsonl:2: '1' was at x.jsonl:1 before"),
    ],
)
def test_what_is_wrong_is_counted_and_named(folder: Path, entry: Any, reason: str, message: str) -> None:
    path = lines(folder, {**GOOD, "question_id": 1}, entry)
    found, errors = read("vqa", path)
    assert len(found) == 1
    assert errors.counts == {reason: 1}
    assert errors.named[0].message.startswith(message)
    with pytest.raises(DataError, match="1 of 2 examples cannot be used"):
        read("vqa", path, share=0.01)


def test_files_that_are_no_data(folder: Path) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl:2: not JSON"):
        read("vqa", lines(folder, GOOD, "{"))
    with pytest.raises(DataError, match=r"x\.jsonl:1: JSON that is nested too deeply"):
        read("vqa", lines(folder, "[" * 100_000))
    with pytest.raises(DataError, match=r"x\.json:3: not JSON"):
        read("nlvr2", lines(folder, "{", '"a": 1,', "}", name="x.json"))
    with pytest.raises(DataError, match="cannot be read"):
        read("vqa", folder / "nothing.jsonl")
    with pytest.raises(DataError, match=r"of split 'test' that can be used .*its splits: val"):
        read("vqa", lines(folder, {**GOOD, "split": "val"}), split="test")
    with pytest.raises(DataError, match=r"no list 'annotations'|without a list 'questions'"):
        read("vqa", lines(folder, {"annotations": []}, name="x.json"))


def test_the_two_files_of_vqa_v2(folder: Path) -> None:
    pictures = folder / "images" / "train2014"
    pictures.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "COCO_train2014_000000000009.jpg")
    questions = [{"image_id": 9, "question": "Is it?", "question_id": n} for n in (90, 91, 92)]
    head = {"data_subtype": "train2014", "questions": questions}
    path = lines(folder, head, name="v2_OpenEnded_mscoco_train2014_questions.json")
    people = [{"answer": "yes", "answer_id": n} for n in range(10)]
    held = [{"question_id": 90, "answers": people, "answer_type": "yes/no"}]
    held += [{"question_id": 90, "answers": people[:1]}, {"answers": people}, {"question_id": 92, "answers": people}]
    lines(folder, {"annotations": held}, name="v2_mscoco_train2014_annotations.json")
    examples, errors = read("vqa", path)
    found = [(example.key, example.kind, len(example.answers)) for example in examples]
    assert found == [("90", "yes/no", 10), ("92", "", 10)]
    assert examples[0].shows == "9"
    assert errors.counts == {"comes twice": 1, "wrong layout": 1, "no answers": 1}
    assert "annotations.json, entry 2: question 90" in errors.named[0].message
    assert "questions.json, entry 2: " in errors.named[2].message
    (folder / "v2_mscoco_train2014_annotations.json").unlink()
    examples, _ = read("vqa", path)
    assert examples[0].answers == ()


def test_statements(folder: Path) -> None:
    listed = {"images": ["a.png", "b.png", "c.png"], "sentence": "It is so.", "label": "True", "identifier": "7-0"}
    found, _ = read("nlvr2", lines(folder, listed), pictures=2)
    assert [path.name for path in found[0].images] == ["a.png", "b.png"]
    assert found[0].answers == ("true",)
    for number in (0, 1):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"dev-850-0-img{number}.png")
    official = {"identifier": "dev-850-0-1", "sentence": "Both.", "label": "False", "writer": "1"}
    found, _ = read("nlvr2", lines(folder, official, {**official, "identifier": "dev-850-0-0"}, name="dev.json"))
    assert [example.place for example in found] == ["dev.json:1", "dev.json:2"]  # lines, whatever the name says
    assert [path.name for path in found[0].images] == ["dev-850-0-img0.png", "dev-850-0-img1.png"]
    assert found[0].shows == "dev-850"
    _, errors = read(
        "nlvr2", lines(folder, listed, {**listed, "label": "maybe"}, {**listed, "images": ["a.png"]}), pictures=2
    )
    assert errors.counts == {"unknown label": 1, "too few pictures": 1}


def test_entailment(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "images" / "123.jpg")
    entry = {
        "Flickr30K_ID": "123",
        "pairID": "123#0r1e",
        "sentence1": "premise",
        "sentence2": "A dog.",
        "gold_label": "neutral",
    }
    found, errors = read("entailment", lines(folder, entry, {**entry, "pairID": "x", "gold_label": "-"}))
    assert found[0].images[0].name == "123.jpg"
    assert (found[0].text, found[0].answers) == ("A dog.", ("neutral",))
    assert errors.counts == {"unknown label": 1}


def test_held_out_pictures_are_on_one_side_and_stay_there() -> None:
    examples = [Example(str(n), "", (), "", ("a",), shows=f"picture {n // 5}") for n in range(500)]
    held, kept = (hold_out(examples, 0.2, side) for side in (True, False))
    assert len(held) + len(kept) == 500
    assert 50 < len(held) < 160
    assert not {e.shows for e in held} & {e.shows for e in kept}
    assert [e.key for e in hold_out(examples[:250], 0.2, True)] == [e.key for e in held if int(e.key) < 250]


def test_classes_are_the_names_of_folders(folder: Path) -> None:
    for split, number in (("train", 3), ("val", 2)):
        for label in ("cat", "dog"):
            (folder / "pets" / split / label).mkdir(parents=True)
            for n in range(number):
                Image.new("RGB", (8, 8)).save(folder / "pets" / split / label / f"{n}.JPEG")
    found, errors = read("classification", folder / "pets", split="val")
    assert [(example.key, example.answers) for example in found] == [
        ("cat/0.JPEG", ("cat",)),
        ("cat/1.JPEG", ("cat",)),
        ("dog/0.JPEG", ("dog",)),
        ("dog/1.JPEG", ("dog",)),
    ]
    assert all(example.images[0].is_file() and example.text == "" for example in found)
    assert not len(errors)
    assert len(read("classification", folder / "pets" / "train")[0]) == 6
    with pytest.raises(DataError, match=r"pets has no folder 'test'; its folders: train, val"):
        read("classification", folder / "pets", split="test")
    (folder / "pets" / "val" / "dog" / "link.png").symlink_to(folder / "images" / "a.png")
    Image.new("RGB", (8, 8)).save(folder / "pets" / "val" / "alone.png")
    found, errors = read("classification", folder / "pets", split="val")
    assert len(found) == 4
    assert errors.counts == {"link": 1, "no class": 1}
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures below it; expected a folder for each class"):
        read("classification", folder / "empty")


def test_classes_in_a_file(folder: Path) -> None:
    good = {"image": "a.png", "label": "dog"}
    path = lines(
        folder, good, {"file_name": "b.png", "class": 7}, {"image": "c.png", "label": ""}, {**good, "label": True}
    )
    found, errors = read("classification", path)
    assert [example.answers for example in found] == [("dog",), ("7",)]
    assert [problem.message for problem in errors.named] == [
        "x.jsonl:3: the label is empty",
        "x.jsonl:4: the label True is neither a name nor a number",
    ]
