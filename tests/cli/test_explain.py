"""`imglish explain` with models that have learned nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imglish.checkpoints import native
from imglish.cli import main
from imglish.data.tokenizers import Tokenizer
from imglish.models import registry

TEXT = "a dog in the snow"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    tokenizer = Tokenizer.train_wordpiece([TEXT, "two blue shoes"], 90, max_length=16)
    for name in ("albef-tiny", "clip-tiny", "coca-tiny"):
        torch.manual_seed(0)
        model = registry.build(dataclasses.replace(registry.named(name), vocab_size=tokenizer.vocab_size))
        native.export(folder / name, model, tokenizer)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder


def _call(folder: Path, model: str, out: Path, *more: str) -> int:
    picture = str(folder / "picture.png")
    return main(["explain", picture, TEXT, "--model", str(folder / model), "--device", "cpu", "--out", str(out), *more])


def test_a_map_for_each_word(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(folder, "albef-tiny", tmp_path / "more" / "map.png") == 0
    assert "grad-cam, 5 words" in capsys.readouterr().out
    drawn = Image.open(tmp_path / "more" / "map.png")
    assert drawn.width > 5 * 200  # five maps in a row, and a second row
    assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 1000


def test_a_text_that_is_cut_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, model = "a dog in the snow " * 5, ["--model", str(folder / "albef-tiny"), "--device", "cpu"]
    assert main(["explain", str(folder / "picture.png"), text, *model, "--out", str(tmp_path / "map.png")]) == 0
    assert "tokens, the model reads the first 16" in capsys.readouterr().out


def test_models_with_fewer_maps_or_none(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(folder, "clip-tiny", tmp_path / "map.png") == 0
    assert "none for a word" in capsys.readouterr().out
    assert _call(folder, "albef-tiny", tmp_path / "map.png", "--layer", "1") == 0
    assert "no maps of words" in capsys.readouterr().out
    assert _call(folder, "coca-tiny", tmp_path / "none.png") == 2
    assert "cannot be explained" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_wrong_arguments(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(folder, "albef-tiny", tmp_path / "map.png", "--layer", "7") == 2
    assert "fusion layers 0 to 1" in capsys.readouterr().err
    (tmp_path / "bad.png").write_bytes(b"nothing")
    model = ["--model", str(folder / "albef-tiny")]
    assert main(["explain", str(tmp_path / "bad.png"), TEXT, *model]) == 1
    assert "bad.png" in capsys.readouterr().err
    assert main(["explain", str(folder / "picture.png"), " ", *model]) == 2
