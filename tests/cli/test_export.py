from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

import imglish
from imglish.cli import main
from tests.checkpoints import official


def test_other_sizes_and_the_layout_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = official.write("blip", tmp_path)
    assert main(["export", str(path), str(tmp_path / "large"), "--image-size", "48", "--max-length", "10"]) == 0
    assert "vision.positions: fitted from (17, 64) to (37, 64)" in capsys.readouterr().out
    assert imglish.load(tmp_path / "large", device="cpu").config.image.size == 48
    given = ["export", str(tmp_path / "large"), str(tmp_path / "theirs"), "--layout", "transformers"]
    assert main([*given, "--kind", "captioning"]) == 0
    assert "BlipForConditionalGeneration has no place for it" in capsys.readouterr().out
    assert imglish.load(tmp_path / "theirs", device="cpu").config.image.size == 48
    assert main([*given, "--kind", "words"]) == 2
    assert "none of matching, captioning" in capsys.readouterr().err


def test_a_dry_run_of_pushing_writes_the_page_and_sends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, Any]] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda _, name, **o: sent.append((name, o)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda _, **o: sent.append((o["repo_id"], o)))
    _, path = official.write("clip", tmp_path)
    given = ["export", str(path), str(tmp_path / "out"), "--push", "me/small-clip", "--licence", "mit"]
    assert main([*given, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would upload to me/small-clip" in said
    assert "model.safetensors" in said
    assert not sent
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "imglish", "license": "mit", "tags": ["vision-language", "clip"]}
    assert "Converted from `clip.pth` (clip), SHA-256" in card
    assert 'imglish.load("hf:me/small-clip")' in card
    assert main([*given, "--private"]) == 0
    assert [name for name, _ in sent] == ["me/small-clip", "me/small-clip"]
    assert sent[0][1]["private"]
    assert sent[1][1]["folder_path"] == str(tmp_path / "out")
    assert main([*given[:4], "not-an-owner"]) == 2
    assert "not-an-owner cannot be pushed: 'not-an-owner' has no owner" in capsys.readouterr().err


def test_options_that_do_nothing_are_refused(tmp_path: Path) -> None:
    for more in (["--kind", "words"], ["--dry-run"], ["--licence", "mit"]):
        with pytest.raises(SystemExit):
            main(["export", "model", str(tmp_path), *more])
