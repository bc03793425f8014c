from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import imglish
from imglish.checkpoints.loading import from_hub
from imglish.checkpoints.native import CheckpointError
from tests.checkpoints.test_foreign import blip


class _Hub:
    """Stands for the hub library: what it is asked for is kept, what it fetches lies in a folder."""

    def __init__(self, folder: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.files = folder, files
        self.asked: dict[str, Any] = {}
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.fetch)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: files)

    def fetch(self, repository: str, **options: Any) -> str:
        self.asked = {"repository": repository, **options}
        return str(self.folder)

    @property
    def fetched(self) -> list[str]:
        return [f for f in self.files if any(fnmatch(f, pattern) for pattern in self.asked["allow_patterns"])]


def test_a_model_of_the_hub_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = blip("BlipForConditionalGeneration", tmp_path)
    hub = _Hub(folder, ["config.json", "model.safetensors", "vocab.txt"], monkeypatch)
    model = imglish.load("hf:owner/name", device="cpu", revision="v1")
    assert model.meta["from"]["format"] == "hf-blip"
    assert hub.asked["repository"] == "owner/name"
    assert hub.asked["revision"] == "v1"


def test_only_what_is_needed_is_fetched_and_one_form_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["config.json", "vocab.txt"]
    hub = _Hub(tmp_path, [*settings, "tf_model.h5", "README.md", "flax_model.msgpack", "onnx/model.onnx"], monkeypatch)
    forms = [  # each better than those before it
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"],
        ["pytorch_model.bin"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ["model.safetensors"],
    ]
    hub.files += ["unet/diffusion_pytorch_model.safetensors"]  # of another part of the repository
    for form in forms:
        hub.files += form
        from_hub("owner/name")
        assert sorted(hub.fetched) == sorted([*settings, *form])


def test_what_the_hub_cannot_give_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("offline and not in the cache\nmore lines")

    _Hub(tmp_path, [], monkeypatch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"^hf:owner/name cannot be fetched: offline and not in the cache$"):
        imglish.load("hf:owner/name")
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        imglish.load("hf:no/such/name/at/all")
