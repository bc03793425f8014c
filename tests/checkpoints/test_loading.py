from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import imglish
from imglish.checkpoints.loading import from_hub, load_any
from imglish.checkpoints.native import CheckpointError, export
from tests.checkpoints.test_foreign import blip


class _Hub:
    """Stands for the hub library: what it is asked for is kept, what it fetches lies in a folder."""

    def __init__(self, folder: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.files = folder, files
        self.asked: dict[str, Any] = {}
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.fetch)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: self)

    def fetch(self, repository: str, **options: Any) -> str:
        self.asked = {"repository": repository, **options}
        return str(self.folder)

    @property
    def siblings(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(rfilename=name) for name in self.files]

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
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(CheckpointError, match=r"^hf:owner/name cannot be fetched: offline and not in the cache$"):
        imglish.load("hf:owner/name")
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        imglish.load("hf:no/such/name/at/all")


def test_without_a_network_the_cache_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for the list of files fails with classes of the transport's own."""

    class NameNotResolvedError(Exception):
        pass

    def fail(*_: Any, **__: Any) -> list[str]:
        raise NameNotResolvedError

    _, folder = blip("BlipForConditionalGeneration", tmp_path)
    hub = _Hub(folder, ["config.json", "model.safetensors", "pytorch_model.bin", "vocab.txt"], monkeypatch)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    assert imglish.load("hf:owner/name", device="cpu").meta["from"]["format"] == "hf-blip"
    assert set(hub.files) <= set(hub.fetched)


def test_what_does_nothing_is_said(tmp_path: Path) -> None:
    _, folder = blip("BlipForConditionalGeneration", tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"theirs has no revisions \(v1\): only models of the hub have"):
        load_any(folder, revision="v1")
    loaded = load_any(folder)
    ours = export(tmp_path / "ours", loaded.model, loaded.words)
    for given in ({"tokenizer": "vocab.txt"}, {"classes": "names.json"}):
        with pytest.raises(CheckpointError, match=rf"ours holds its own {next(iter(given))}: leave"):
            load_any(ours, **given)
    with pytest.raises(CheckpointError, match=r"one on the hub is called hf:openai/clip-vit-base-patch32$"):
        load_any("openai/clip-vit-base-patch32")
