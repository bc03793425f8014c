from __future__ import annotations

from pathlib import Path

import pytest

import imglish
from imglish.cli import main
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
