"""`imglish caption` and `imglish eval captioning` with a model that has learned nothing, on pictures of noise."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imglish
from imglish.checkpoints import native
from imglish.cli import main
from imglish.data.tokenizers import Tokenizer
from imglish.models import registry
from imglish.models.capabilities import MissingCapabilityError

WORDS = ["a red hat", "two blue shoes on a chair", "a dog in the snow", "a bag and a house"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that write and that do not, five pictures with captions, a file that is no picture."""
    folder = tmp_path_factory.mktemp("captions")
    plain = Tokenizer.train_wordpiece(WORDS, 90, max_length=16, append_sep=True)
    for name in ("blip-tiny", "clip-tiny"):
        torch.manual_seed(0)
        config = registry.named(name)
        tokenizer = plain.with_special(config.special_tokens) if hasattr(config, "special_tokens") else plain
        model = registry.build(dataclasses.replace(config, vocab_size=tokenizer.vocab_size))
        native.export(folder / name, model, tokenizer)
    rng = np.random.default_rng(0)
    (folder / "photos" / "more").mkdir(parents=True)
    lines = []
    for i in range(5):
        name = f"more/{i}.png" if i > 3 else f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / "photos" / name)
        lines.append(json.dumps({"image": name, "captions": [WORDS[i % 4], WORDS[(i + 1) % 4]]}))
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    return folder


def _call(folder: Path, *more: str) -> list[str]:
    return ["caption", *more, "--model", str(folder / "blip-tiny"), "--device", "cpu", "--max-length", "9"]


def test_a_folder_and_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_call(folder, str(folder / "photos"), str(folder / "photos" / "1.png"), "--batch", "2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line.split("\t")[0]).name for line in lines] == [f"{i}.png" for i in range(5)]  # each once


def test_unreadable_pictures_are_named_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(folder / "photos" / "0.png"), str(folder / "broken.jpg"), str(folder / "missing.jpg")]
    assert main(_call(folder, *given, str(folder / "photos" / "1.png"))) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "broken.jpg" in err
    assert "missing.jpg" in err
    assert "captions of 2 pictures; 2 could not be read" in err


def test_samples_as_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--top-p", "0.9", "--n", "3", "--seed", "4"]
    assert main(_call(folder, str(folder / "photos"), *options, "--json")) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(len(one["captions"]) == 3 for one in printed)
    assert (
        main(_call(folder, str(folder / "photos"), *options, "--batch", "1", "--out", str(tmp_path / "x.jsonl"))) == 0
    )
    again = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    texts = [[[c["caption"] for c in one["captions"]] for one in some] for some in (printed, again)]
    assert texts[0] == texts[1]  # whatever the block size


def test_wrong_use(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = str(folder / "photos")
    assert main(["caption", photos, "--model", str(folder / "clip-tiny")]) == 2
    assert "Families that do: " in (err := capsys.readouterr().err)
    assert "blip" in err
    assert main(_call(folder, photos, "--beams", "2", "--top-k", "5")) == 2
    assert "either sample" in capsys.readouterr().err
    assert main(_call(folder, str(tmp_path))) == 2
    assert "no picture in this folder" in capsys.readouterr().err


def test_the_interface_gives_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = imglish.load(folder / "blip-tiny", "cpu")
    photos = sorted((folder / "photos").glob("*.png"))
    config = imglish.GenerationConfig(beams=3, min_length=5, max_length=9)
    found = model.caption(photos, config)
    assert main(_call(folder, *map(str, photos))) == 0
    printed = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    assert [captions[0].text for captions in found] == printed
    prompted = model.caption([photos[0].read_bytes(), Image.open(photos[0])], config, prompt="a red")
    assert prompted[0] == prompted[1]
    with pytest.raises(TypeError, match="list of pictures"):
        model.caption(str(photos[0]))
    with pytest.raises(MissingCapabilityError, match="captions"):
        imglish.load(folder / "clip-tiny", "cpu").caption(photos)


def test_evaluation(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(folder / "captions.jsonl"), "--images", str(folder / "photos"), "--device", "cpu"]
    command = ["eval", "captioning", "--model", str(folder / "blip-tiny"), *data, "--max-length", "9"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "5 pictures, 10 references" in printed
    assert "CIDEr-D" in printed
    held = json.loads((tmp_path / "captioning.json").read_text())
    assert set(held["metrics"]) == {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"}
    assert held["generation"]["beams"] == 3
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["0.png", "1.png", "2.png", "3.png", "more/4.png"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image") >= 15  # at random, best and worst
    assert "Furthest from the references" in page
    judged = ["--judge", str(folder / "clip-tiny"), "--limit", "3", "--out", str(tmp_path / "z")]
    assert main([*command, *judged]) == 0
    assert "CLIPScore" in capsys.readouterr().out
    by_towers = json.loads((tmp_path / "z" / "captioning.json").read_text())["metrics"]
    assert set(by_towers) == {*held["metrics"], "clip_score"}
    model = imglish.load(folder / "clip-tiny", "cpu")
    written = [
        json.loads(line)["captions"][0] for line in (tmp_path / "z" / "predictions.jsonl").read_text().splitlines()
    ]
    photos = [folder / "photos" / f"{i}.png" for i in range(3)]
    cosine = (model.encode_images(photos) * model.encode_texts(written)).sum(1).clamp(min=0).mean()
    assert by_towers["clip_score"] == pytest.approx(250 * float(cosine), rel=1e-4)
    judged[1] = str(folder / "blip-tiny")
    assert main([*command, *judged]) == 0
    by_both = json.loads((tmp_path / "z" / "captioning.json").read_text())["metrics"]
    match = imglish.load(folder / "blip-tiny", "cpu").match(photos, written).diagonal().mean()
    assert by_both["match"] == pytest.approx(100 * float(match), rel=1e-4)
    capsys.readouterr()
    assert main([*command, "--java", "spicy"]) == 2
    assert "choose of meteor, spice" in capsys.readouterr().err
    assert main([*command[:3], str(folder / "clip-tiny"), *command[4:], "--out", str(tmp_path / "y")]) == 2
    assert "Families that do" in capsys.readouterr().err
