from __future__ import annotations

from pathlib import Path

import pytest
import torch

import imglish
from imglish.cli import main
from tests.checkpoints import official
from tests.checkpoints.test_foreign import blip


def test_a_released_model_becomes_a_folder_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = blip("BlipForImageTextRetrieval", tmp_path / "theirs")
    assert main(["convert", str(folder), str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    assert "hf-blip" in said
    assert "the checkpoint has no text decoder" in said
    assert imglish.load(tmp_path / "ours", device="cpu").meta["from"]["format"] == "hf-blip"


def test_what_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "nothing.pth"), str(tmp_path / "ours")]) == 2
    assert "nothing.pth" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_what_the_model_is_for_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.checkpoints.test_transformers import saved

    said = {
        "ViltForImageAndTextRetrieval": "/ours; pairs are ranked by itm\n",
        "ViltForQuestionAnswering": "/ours; it chooses among 5 classes (vqa)\n",  # which config.json names
        "BlipForQuestionAnswering": "/ours; it writes answers (vqa)\n",
        "BeitForMaskedImageModeling": "/ours\n",
    }
    for cls, end in said.items():
        saved(cls, tmp_path / cls)
        assert main(["convert", str(tmp_path / cls), str(tmp_path / cls / "ours")]) == 0
        assert capsys.readouterr().out.endswith(end)
    _, path = official.write("vilt", tmp_path)
    weights = torch.load(path)["model"]
    theirs = {name: value for name, value in weights.items() if name.startswith(("transformer", "te", "to", "pooler"))}
    theirs |= {f"vqa_classifier.{n}.{leaf}": torch.zeros(*shape) for n, leaf, shape in _HEAD}
    torch.save({"state_dict": theirs}, path)
    assert main(["convert", str(path), str(tmp_path / "vqa")]) == 0
    expected = "; it chooses among 3 classes (vqa), called by their numbers: --classes FILE names them\n"
    assert capsys.readouterr().out.endswith(expected)


_HEAD = [(0, "weight", (128, 64)), (0, "bias", (128,)), (1, "weight", (128,)), (1, "bias", (128,))]
_HEAD += [(3, "weight", (3, 128)), (3, "bias", (3,))]
