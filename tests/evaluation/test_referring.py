"""Grounding: references are read, maps are judged by hand-made boxes, numbers do not depend on blocks or ranks."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imglish.data.errors import DataError, Errors
from imglish.data.images import ImageTransform
from imglish.data.scene_boxes import garment_boxes
from imglish.data.scene_world import Person, Scene
from imglish.data.tokenizers import Tokenizer
from imglish.evaluation.encoding import Machine
from imglish.evaluation.explain import Explanation
from imglish.evaluation.referring import GroundingResult, Reference, _judge, evaluate_grounding, read_references
from imglish.models import registry
from tests.ranks import run_ranks

LEFT, RIGHT = (0.0, 0.0, 40.0, 60.0), (60.0, 0.0, 40.0, 60.0)


def _picture(folder: Path, name: str = "a.png") -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def _lines(folder: Path, *lines: object) -> Path:
    path = folder / "boxes.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_both_layouts(tmp_path: Path) -> None:
    _picture(tmp_path)
    things = [{"label": label, "bbox_xywh": box} for label, box in (("dog", LEFT), ("cat", RIGHT), ("dog", RIGHT))]
    path = _lines(
        tmp_path,
        {"image": "a.png", "text": ["the left one", "not the cat"], "bbox": LEFT, "proposals": [LEFT, RIGHT]},
        {"image": "a.png", "objects": things, "orig_size": [100, 60]},
        {"image": "a.png", "objects": things[:1]},
    )
    found = read_references(path, None, Errors(0.0), "a photo of a {}")
    assert [one.text for one in found] == [
        *("the left one", "not the cat", "a photo of a dog", "a photo of a cat", "a photo of a dog")
    ]
    assert [len(one.boxes) for one in found] == [1, 1, 2, 1, 1]
    assert [len(one.proposals) for one in found] == [2, 2, 3, 3, 0]  # one label alone is no choice
    assert found[2].size == (100, 60)
    with pytest.raises(ValueError, match="template"):
        read_references(path, None, Errors(), "no place")


def test_what_is_wrong_is_named_and_counted(tmp_path: Path) -> None:
    _picture(tmp_path)
    good = {"image": "a.png", "text": "it", "bbox": LEFT}
    wrong = [
        {**good, "bbox": [1, 2, -3, 4]},
        {**good, "text": 5},
        {**good, "image": "none.png"},
        {"image": "a.png", "objects": []},
        {"text": "it", "bbox": LEFT},
        [],
        {**good, "bbox": [1, 2, 3]},
        {**good, "image": "/etc/passwd"},
    ]
    path, errors = _lines(tmp_path, good, *wrong), Errors(0.9)
    assert len(read_references(path, None, errors)) == 1
    assert [problem.key for problem in errors.named] == [f"boxes.jsonl:{n}" for n in range(2, 10)]
    assert errors.named[-2].message == "boxes.jsonl:8: a box [1, 2, 3]: expected left, top, width, height"
    assert "lies outside" in errors.named[-1].message
    assert "positive sides" in errors.named[0].message
    with pytest.raises(DataError, match=r"boxes\.jsonl"):
        read_references(path, None, Errors(0.01))
    with pytest.raises(DataError, match="no reference"):
        read_references(_lines(tmp_path, []), None, Errors(1.0))
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="not JSON"):
        read_references(path, None, Errors())


def test_a_map_is_judged_by_its_highest_point_and_by_the_proposal_that_it_fills() -> None:
    heat = torch.zeros(3, 5)
    heat[1, 4] = 1.0
    words = torch.stack([heat.flip(1), heat.flip(1)])
    found = Explanation("grad-cam", ("a", "dog"), words, heat, 0.7)
    image = Image.new("RGB", (50, 30))
    reference = Reference("f:1", Path("a"), "a dog", (RIGHT,), (LEFT, RIGHT), (100, 60))  # boxes of twice the size
    judged = _judge(reference, found, image, ImageTransform(48))
    assert judged.points == {"whole text": True, "words": False}
    assert judged.chosen == {"whole text": 1, "words": 0}
    assert judged.right == {"whole text": True, "words": False}
    assert judged.chance["centre"] == 0
    assert judged.chance["any"] == pytest.approx(0.4)
    assert judged.chance["any proposal"] == 0.5
    assert _judge(replace(reference, proposals=()), found, image, ImageTransform(48)).chosen == {}


def _result(block: int, folder: str, broken: bool = False) -> GroundingResult:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train_wordpiece(["the left one", "a dog"], 60, max_length=16)
    model = registry.build(replace(registry.named("albef-tiny"), vocab_size=tokenizer.vocab_size))
    picture = _picture(Path(folder), f"{block}.png")
    references = [
        Reference(f"f:{n}", picture, text, (box,), (LEFT, RIGHT), group=text)
        for n, (text, box) in enumerate([("the left one", LEFT), ("a dog", RIGHT), ("dog", LEFT), ("a left dog", LEFT)])
    ]
    if broken:
        (Path(folder) / "broken.png").write_bytes(b"nothing")
        references[1] = replace(references[1], image=Path(folder) / "broken.png")
    machine = Machine(image_block=block, progress=False)
    return evaluate_grounding(model, tokenizer, references, machine, errors=Errors(1.0))


def work(rank: int) -> tuple[dict[str, float], dict[str, float], list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        found = _result(1, folder, broken=True)
    return found.pointing, found.choice, list(found.notes)


def test_numbers_depend_neither_on_blocks_nor_on_ranks(tmp_path: Path) -> None:
    one, all_together = (_result(block, str(tmp_path)) for block in (1, 4))
    assert (one.pointing, one.choice, one.groups) == (all_together.pointing, all_together.choice, all_together.groups)
    scores = [[found.score for found in result.judged if found] for result in (one, all_together)]
    assert scores[0] == pytest.approx(scores[1])
    assert run_ranks(2, work) == [work(0)] * 2
    pointing, _, notes = work(0)
    assert notes == ["1 references left out: their pictures cannot be read"]
    assert pointing["any point"] == pytest.approx(40.0)


def test_garments_are_where_they_are_drawn() -> None:
    scene = Scene((Person("woman", "red", "blue", hat="green"), Person("man", "black", "white")), look=3)
    found = garment_boxes(scene, 96)
    assert [label for label, _ in found] == ["red top", "blue trousers", "green hat", "black top", "white trousers"]
    boxes = dict(found)
    assert boxes["green hat"][1] < boxes["red top"][1] < boxes["blue trousers"][1]
    for person in (("red top", "blue trousers"), ("black top", "white trousers")):
        middles = [boxes[label][0] + boxes[label][2] / 2 for label in person]
        assert abs(middles[0] - middles[1]) < 5
