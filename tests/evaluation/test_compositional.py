from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from imglish.data.errors import DataError, Errors
from imglish.data.images import decode
from imglish.data.records import Record
from imglish.evaluation.classify import ZeroShotConfig, evaluate_zeroshot
from imglish.evaluation.compositional import Item, evaluate_compositional, read_items
from imglish.evaluation.encoding import Machine
from imglish.evaluation.templates import TEMPLATES, templates_of
from tests.evaluation.fakes import Fusion, OneStream, Towers, Words, pictures_of

QUIET = Machine(image_block=3, pair_block=5, progress=False)
SUITES: dict[str, Any] = {
    "swap_att.json": {"0": {"filename": "a.png", "caption": "w1", "negative_caption": "w2"}},
    "subset.jsonl": [{"type": "add_obj", "image": "a.png", "caption": "w1", "negative_caption": "w2"}],
    "relation.json": [
        {"image_path": "a.png", "relation_name": "on", "true_caption": "w1", "false_caption": "w2"}
        | {f"bbox_{side}": value for side, value in zip("xywh", (2, 1, 4, 3), strict=True)}
    ],
    "attribution.json": [
        {"image_path": "a.png", "attributes": ["red", "old"], "true_caption": "w1", "false_caption": "w2"}
    ],
    "winoground.jsonl": [
        {"id": 0, "image_0": "a", "image_1": "b", "caption_0": "w1", "caption_1": "w2", "collapsed_tag": "Object"}
    ],
    "wapped.json": [{"image_1": "a.png", "image_2": "b.png", "caption_1": "w1", "caption_2": "w2"}],
    "cola.json": [["http://host/a.png", "w1", "http://host/b.png", "w2"]],
    "cola.jsonl": [["http://host/a.png", "w1", "http://host/b.png", "w2"]],
    "quadruples.jsonl": [
        {"images": ["a.png", "b.png"], "captions": ["w1", "w2"], "kind": "within", "language": "en", "split": "seen"}
    ],
}
GROUPS = {
    "swap_att.json": "swap_att",
    "subset.jsonl": "add_obj",
    "relation.json": "on",
    "attribution.json": "red_old",
    "winoground.jsonl": "Object",
    "wapped.json": "colorswap",
    "cola.json": "cola",
    "cola.jsonl": "cola",
    "quadruples.jsonl": "seen, within, en",
}


def _write(folder: Path, name: str, held: Any) -> Path:
    for picture in "ab":
        Image.fromarray(np.full((6, 8, 3), 200, dtype=np.uint8)).save(folder / f"{picture}.png")
    lines = "\n".join(json.dumps(entry) for entry in held) if name.endswith(".jsonl") else json.dumps(held)
    (folder / name).write_text(lines, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", SUITES)
def test_layouts(name: str, tmp_path: Path) -> None:
    (item,) = read_items(_write(tmp_path, name, SUITES[name]), None, Errors(0.0, quiet=True))
    assert item.group == GROUPS[name]
    assert item.captions == ("w1", "w2")
    assert [path.name for path, _ in item.pictures] == (["a.png", "b.png"] if name[0] in "wcq" else ["a.png"])
    assert item.pictures[0][1] == ((2, 1, 6, 4) if name == "relation.json" else None)


def test_a_folder_of_files_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    _write(tmp_path, "swap_att.json", SUITES["swap_att.json"])
    good, bad = {"image": "a.png", "caption": "w1", "negative_caption": "w2"}, {"image": "a.png", "caption": ["w1"]}
    gone = good | {"image": "gone.png"}
    out = good | {"image": "../a.png"}
    _write(tmp_path, "more.jsonl", [good, bad, gone, {"image": "a.png", "caption": "w1"}, 7, out])
    errors = Errors(1.0, quiet=True)
    assert [item.place for item in read_items(tmp_path, None, errors)] == ["more.jsonl:1", "swap_att.json, entry 1"]
    assert errors.counts == {"wrong layout": 3, "missing picture": 1, "outside": 1}
    assert [problem.key for problem in errors.named] == [f"more.jsonl:{line}" for line in range(2, 7)]
    with pytest.raises(DataError, match="more than the allowed share"):
        read_items(tmp_path, None, Errors(0.0, quiet=True))
    (tmp_path / "more.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="not JSON"):
        read_items(tmp_path, None, Errors(1.0, quiet=True))


def _items() -> tuple[list[Item], dict[str, Tensor], Fusion]:
    model = Fusion()
    true = ["w1 w2", "w3 w4", "w5 w6 w7", "w8", "w9 w10", "w11"]
    pictures = dict(zip("abcdef", pictures_of(model, true, 0.05), strict=True))
    pairs = [
        Item(f"x:{i}", "swap" if i < 3 else "add", ((Path("abcdef"[i]), None),), (true[i], true[(i + 3) % 6]))
        for i in range(4)
    ]
    two = ((Path("e"), None), (Path("f"), None))
    return [*pairs, Item("x:4", "quads", two, (true[4], true[5]))], pictures, model


def test_pairs_and_quadruples_in_one_pass() -> None:
    items, pictures, model = _items()
    result = evaluate_compositional(model, Words(), items, lambda r: pictures[Path(r.key).name], QUIET)
    found = {one.name: (one.count, one.fusion) for one in result.groups}
    right = {"text": 100.0, "image": 100.0, "group": 100.0}
    assert found == {
        "add": (1, {"accuracy": 100.0}),
        "swap": (3, {"accuracy": 100.0}),
        "quads": (1, right),
    }
    assert all(result.right)
    assert [(one.name, one.count) for one in result.means] == [("mean of pairs", 4)]
    assert model.calls["pairs"] == 4 * 2 + 4  # no pair is scored twice
    assert "mean of pairs" in result.text()
    crossed = [Item(i.place, i.group, i.pictures, (i.captions[1], i.captions[0])) for i in items]
    wrong = evaluate_compositional(model, Words(), crossed, lambda r: pictures[Path(r.key).name], QUIET)
    assert not any(wrong.right)


def test_equal_captions_are_ties_and_wrong() -> None:
    items, pictures, model = _items()
    same = [Item(i.place, i.group, i.pictures, (i.captions[0],) * 2) for i in items]
    result = evaluate_compositional(model, Words(), same, lambda r: pictures[Path(r.key).name], QUIET)
    assert not any(result.right)
    assert result.margin[:4] == [0.0] * 4
    assert result.ties == 80.0  # of the quadruple one picture prefers the caption


def test_a_box_of_the_picture_is_shown(tmp_path: Path) -> None:
    (item,) = read_items(_write(tmp_path, "relation.json", SUITES["relation.json"]), None, Errors(quiet=True))
    sizes = []

    def load(record: Record) -> Tensor:
        sizes.append(decode(record.image).size)
        return torch.ones(6, 2, 3)

    evaluate_compositional(Towers(), Words(), [item], load, QUIET)
    assert sizes == [(4, 3)]


def _classes(model: Towers) -> tuple[list[Record], dict[int, Tensor]]:
    names = ["w1 w2", "w3 w4", "w5 w6 w7"]
    records = [Record(f"p{i}", b"", (names[i % 3],), i) for i in range(9)]
    shown = pictures_of(model, [record.captions[0] for record in records], 0.05)
    return records, dict(enumerate(shown))


@pytest.mark.parametrize("make", [Towers, Fusion, OneStream])
def test_zero_shot_by_towers_and_fusion(make: type[Any]) -> None:
    model = make()
    records, pictures = _classes(model.inner if isinstance(model, OneStream) else model)
    config = ZeroShotConfig(("{}", "{} w20"), rerank=2, machine=QUIET)
    result = evaluate_zeroshot(model, Words(), records, lambda r: pictures[r.image_id], config)
    assert (result.towers is None) == (make is OneStream)
    assert (result.fusion is None) == (make is Towers)
    assert result.best.top1 == 100.0 if make is not Towers else result.best.top1 > 50  # features that lost something
    assert [one.pictures for one in result.best.classes] == [3, 3, 3]
    if make is Fusion:
        assert model.calls["pairs"] == 9 * 2
    renamed = ZeroShotConfig(("{}",), 2, {"w1 w2": "w3 w4", "w3 w4": "w1 w2"}, machine=QUIET)
    other = evaluate_zeroshot(model, Words(), records, lambda r: pictures[r.image_id], renamed)
    assert [one.recall for one in other.best.classes[:2]] == [0.0, 0.0]
    assert other.best.classes[0].taken_for == "w3 w4"


def test_zero_shot_needs_one_class_a_picture() -> None:
    model = Towers()
    records, pictures = _classes(model)
    config = ZeroShotConfig(("{}",), machine=QUIET)
    with pytest.raises(ValueError, match="2 captions in place of the name of a class"):
        evaluate_zeroshot(model, Words(), [Record("p", b"", ("w1", "w2"), 0)], lambda r: pictures[0], config)
    with pytest.raises(ValueError, match="nothing to choose from"):
        evaluate_zeroshot(model, Words(), records[:1], lambda r: pictures[0], config)


def test_templates(tmp_path: Path) -> None:
    for templates in TEMPLATES.values():
        assert all(template.count("{}") == 1 for template in templates)
    (tmp_path / "own.txt").write_text("eine {}\n\nzwei {}\n", encoding="utf-8")
    assert templates_of(str(tmp_path / "own.txt")) == ("eine {}", "zwei {}")
    (tmp_path / "own.txt").write_text("eine {}\nzwei\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own\.txt:2"):
        templates_of(str(tmp_path / "own.txt"))
    with pytest.raises(ValueError, match="neither a file"):
        templates_of("fr")
