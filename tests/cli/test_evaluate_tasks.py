from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imglish.checkpoints import native
from imglish.cli import main
from imglish.data.tokenizers import Tokenizer
from imglish.models import registry
from imglish.models.heads import HeadConfig, with_head
from tests.training.support import COLOURS, records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, two classes of pictures, and items of which one lacks its picture."""
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer = Tokenizer.train_wordpiece(["a photo of a red hat", "一张红帽子的照片"], 90, max_length=16)
    torch.manual_seed(0)
    model = registry.build(dataclasses.replace(registry.named("albef-tiny"), vocab_size=tokenizer.vocab_size))
    native.export(folder / "model", model, tokenizer)
    rng = np.random.default_rng(0)
    for name in ("hat", "shoe<b>"):
        (folder / "classes" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "classes" / name / f"{i}.png")
    items = [
        {"image": f"hat/{i}.png", "caption": "a red hat", "negative_caption": "a <b>blue hat"} for i in (0, 1, 2, 9)
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    return folder


def test_compositional(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *("eval", "compositional", "--model", str(folder / "model"), "--data", str(folder / "items.jsonl")),
        *("--images", str(folder / "classes"), "--device", "cpu", "--out", str(tmp_path)),
    ]
    assert main(arguments) == 2
    assert "hat/9.png" in capsys.readouterr().err
    assert main([*arguments, "--max-errors", "0.5"]) == 0
    assert "accuracy" in capsys.readouterr().out
    held = json.loads((tmp_path / "compositional.json").read_text(encoding="utf-8"))
    assert held["groups"]["items"]["count"] == 3
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") >= 3
    assert "&lt;b&gt;blue" in page
    assert "<b>blue" not in page


def test_compositional_with_exchanged_pictures(folder: Path, tmp_path: Path) -> None:
    """Captions that tell of their pictures do not, with those of others."""
    names = ("hat/0.png", "hat/1.png", "shoe<b>/2.png")
    rows = [
        {"image": name, "caption": f"a red {'hat ' * n}", "negative_caption": "a photo"} for n, name in enumerate(names)
    ]
    other = [row | {"image": name} for row, name in zip(rows, names[1:] + names[:1], strict=True)]
    held = {}
    for kind, items, flags in (("own", rows, []), ("hand", other, []), ("control", rows, ["--exchange-pictures"])):
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
        arguments = ["eval", "compositional", "--model", str(folder / "model"), "--images", str(folder / "classes")]
        arguments += [
            "--data",
            str(tmp_path / f"{kind}.jsonl"),
            "--device",
            "cpu",
            "--out",
            str(tmp_path / kind),
            *flags,
        ]
        assert main(arguments) == 0
        page = (tmp_path / kind / "report.html").read_text(encoding="utf-8")
        held[kind] = sorted(re.findall(r"against: a photo \(([^)]*)\)", page))
    assert held["control"] == held["hand"] != held["own"]
    found = json.loads((tmp_path / "control" / "compositional.json").read_text(encoding="utf-8"))
    assert found["notes"] == [
        "control: every text has the pictures of another one, so what is right here needs no pictures"
    ]


def test_zeroshot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"hat": "帽子"}), encoding="utf-8")
    arguments = [
        *("eval", "zeroshot", "--model", str(folder / "model"), "--data", str(folder / "classes")),
        *("--device", "cpu", "--out", str(tmp_path), "--templates", "zh", "--names", str(names)),
    ]
    assert main(arguments) == 0
    assert "mean recall" in capsys.readouterr().out
    held = json.loads((tmp_path / "zeroshot.json").read_text(encoding="utf-8"))
    assert [one["pictures"] for one in held["fusion"]["classes"]] == [3, 3]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "一张{}的照片" in page
    assert "shoe<b>" not in page
    assert main([*arguments[:-4], "--templates", "fr"]) == 2
    assert "neither a file nor one of" in capsys.readouterr().err
    for held, message in (("{", "names.json:1: not JSON"), ('{"hat": 3}', "names.json: expected an object from class")):
        names.write_text(held, encoding="utf-8")
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_grounding(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    things = [{"label": label, "bbox_xywh": [x, 5, 20, 20]} for label, x in (("red hat", 5), ("<b>photo", 28))]
    rows = [{"image": f"hat/{i}.png", "objects": things} for i in range(3)]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = ["eval", "grounding", "--model", str(folder / "model"), "--data", str(tmp_path / "boxes.jsonl")]
    arguments += ["--images", str(folder / "classes"), "--device", "cpu", "--template", "a {}"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "map of the words" in capsys.readouterr().out
    held = json.loads((tmp_path / "grounding.json").read_text(encoding="utf-8"))
    assert (held["references"], held["choices"], held["method"]) == (6, 6, "grad-cam")
    assert held["choice"]["any box"] == 50
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 6
    assert "&lt;b&gt;photo" in page
    assert "<b>photo" not in page
    assert main([*arguments, "--layer", "1", "--out", str(tmp_path)]) == 0
    assert "map of the words" not in capsys.readouterr().out
    assert main([*arguments, "--layer", "5", "--out", str(tmp_path)]) == 2
    assert "fusion layers 0 to 1" in capsys.readouterr().err


def test_classification(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model with 30 classes, of which the data show four: the table has the lowest, the JSON all."""
    torch.manual_seed(0)
    names = tuple(sorted({*"abcdefghijklmnopqrstuvwxyz", *COLOURS}))
    head = HeadConfig("classification", classes=names, texts=False)
    model: Any = with_head(registry.build(registry.named("beit-tiny")), head)
    torch.nn.init.normal_(model.inner.head.weight)
    path = native.export(tmp_path / "model", model, None)
    for number, record in enumerate(records(48)):
        assert isinstance(record.image, bytes)
        label = list(COLOURS)[number % 4] if number < 8 else names[number % 22]
        (tmp_path / "data" / "val" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "val" / label / f"{number}.png").write_bytes(record.image)
    out = tmp_path / "out"
    command = ["eval", "classification", "--model", str(path), "--data", str(tmp_path / "data"), "--split", "val"]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "classification.json").read_text())
    lines = (out / "predictions.jsonl").read_text().splitlines()[1:]
    said = {entry["key"]: entry["answers"][0][0] for entry in map(json.loads, lines)}
    right = [said[key] == key.split("/")[0] for key in said]
    assert len(said) == found["examples"] == 48
    assert any(right)
    assert found["metrics"]["accuracy"] == pytest.approx(100 * sum(right) / 48)
    assert found["metrics"]["mean recall"] == pytest.approx(np.mean(list(found["groups"].values())))
    assert len(found["groups"]) == 23
    assert printed.count("\nmodel, ") == 20
    assert "the 20 lowest of 23 groups are shown, the JSON has all" in printed
    (tmp_path / "data" / "other").mkdir()
    (tmp_path / "data" / "val" / "red").rename(tmp_path / "data" / "other" / "crimson")
    assert main([*command[:-2], "--split", "other", "--out", str(tmp_path / "o")]) == 2
    assert "no example has an answer among the model's 30, which are a, b, blue, ...; the examples' are crimson" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main([*command, "--exchange-pictures"])


def test_linear_probe(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    for part, count in (("train", 10), ("val", 4)):
        for name, shade in (("dark<b>", 40), ("light", 200)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(shade - 30, shade + 30, (48, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    arguments = ["eval", "linear-probe", "--model", str(folder / "model"), "--data", str(tmp_path / "train")]
    arguments += ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--test", str(tmp_path / "val")]) == 0
    assert "most frequent class" in capsys.readouterr().out
    held = json.loads((tmp_path / "out" / "linear-probe.json").read_text(encoding="utf-8"))
    assert (held["train"], held["test"], held["majority"]) == (20, 8, 50)
    assert held["found"]["top1"] == 100
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "dark&lt;b&gt;" in page
    assert "dark<b>" not in page
    assert main([*arguments, "--test", str(tmp_path / "train")]) == 2
    assert "20 test pictures are training pictures too" in capsys.readouterr().err
