"""Weights in parts, and files that lie beside their settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from imglish.checkpoints.foreign import load_foreign
from imglish.checkpoints.native import CheckpointError
from tests.checkpoints import official
from tests.checkpoints.test_foreign import blip

FORMS = {
    "safetensors": ("model-0000{}-of-00003.safetensors", "model.safetensors.index.json", save_file),
    "pickle": ("pytorch_model-0000{}-of-00003.bin", "pytorch_model.bin.index.json", torch.save),
}


def parted(folder: Path, form: str) -> dict[str, Tensor]:
    """A BLIP of transformers whose weights lie in three parts, and what they are."""
    blip("BlipForConditionalGeneration", folder)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name, index, write = FORMS[form]
    places = {key: name.format(number % 3 + 1) for number, key in enumerate(whole)}
    for part in set(places.values()):
        write({key: whole[key] for key in whole if places[key] == part}, folder / part)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return whole


def loaded(folder: Path) -> dict[str, Tensor]:
    return load_foreign(folder).model.state_dict()


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_put_together(tmp_path: Path, form: str) -> None:
    whole = parted(tmp_path, form)
    name, index, _ = FORMS[form]
    state = loaded(tmp_path)
    assert torch.equal(state["vision.norm.weight"], whole["vision_model.post_layernorm.weight"])
    one = load_foreign(tmp_path).meta["from"]["sha256"]
    (tmp_path / index).unlink()  # their names say how many there are
    assert all(torch.equal(value, state[key]) for key, value in loaded(tmp_path).items())
    assert load_foreign(tmp_path).meta["from"]["sha256"] == one
    (tmp_path / name.format(2)).unlink()
    with pytest.raises(CheckpointError, match=rf"2 of the 3 parts of its weights: {name.format(2)} is missing"):
        loaded(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_an_index_is_kept_to_its_word_and_to_its_folder(tmp_path: Path, form: str) -> None:
    whole = parted(tmp_path / "model", form)
    name, index, write = FORMS[form]
    write({"surprise": torch.ones(1)}, tmp_path / name.format(1))
    good = json.loads((tmp_path / "model" / index).read_text())
    changes: dict[str, tuple[Any, str]] = {
        "outside": ({"a": f"../{name.format(1)}"}, r"names '\.\./.*: parts are files of its own folder"),
        "absolute": ({"a": str(tmp_path / name.format(1))}, "parts are files of its own folder"),
        "a list": ({"a": [1]}, "no readable weight_map"),
        "a number": ({"a": 1}, "names 1: parts are files"),
        "nothing": ({}, "names no parts"),
        "none": (None, "no readable weight_map"),
        "too much": (
            good["weight_map"] | {"more.weight": name.format(3)},
            r"promises more\.weight, which no part holds",
        ),
        "a part": (
            good["weight_map"] | {"more.weight": name.format(4)},
            rf"3 of the 4 parts .*{name.format(4)} is missing",
        ),
    }
    for content, said in changes.values():
        (tmp_path / "model" / index).write_text(json.dumps({"weight_map": content}))
        with pytest.raises(CheckpointError, match=said):
            loaded(tmp_path / "model")
    (tmp_path / "model" / index).write_text("{")
    with pytest.raises(CheckpointError, match=rf"{index} is no index of weights"):
        loaded(tmp_path / "model")
    (tmp_path / "model" / index).write_text(json.dumps(good))
    key = next(iter(whole))
    for number in (1, 2):
        part = tmp_path / "model" / name.format(number)
        held = load_file(part) if form == "safetensors" else torch.load(part)
        write(held | {key: whole[key]}, part)
    with pytest.raises(CheckpointError, match=rf"holds what another part holds too: {key}"):
        loaded(tmp_path / "model")


def test_parts_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    parted(tmp_path, "safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="do not belong together"):
        loaded(tmp_path)


def test_a_file_has_the_settings_beside_it(tmp_path: Path) -> None:
    _, folder = blip("BlipForConditionalGeneration", tmp_path / "hf")
    whole = load_foreign(folder)
    one = load_foreign(folder / "model.safetensors")
    assert (one.meta["from"]["format"], one.config) == ("hf-blip", whole.config)
    _, folder = official.write("coca", tmp_path)
    one = load_foreign(folder / "open_clip_pytorch_model.bin")
    assert (one.meta["from"]["format"], one.config) == ("open_clip-coca", load_foreign(folder).config)
    _, path = official.write("albef", tmp_path)  # the settings are not its own
    assert load_foreign(path).meta["from"]["format"] == "albef"


def test_a_training_of_open_clip_needs_its_settings(tmp_path: Path) -> None:
    """Names and shapes are openai's, the activation is not."""
    model, path = official.write("clip", tmp_path)
    weights = torch.load(path)["model"]
    plain = load_foreign(path).meta["conversion"]
    assert any("taken for openai's" in reason for reason in plain.values())
    sizes = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(weights | sizes, path)
    assert not any("taken for openai's" in reason for reason in load_foreign(path).meta["conversion"].values())
    record = {"epoch": 3, "name": "run", "optimizer": {}, "state_dict": {f"module.{n}": v for n, v in weights.items()}}
    torch.save(record, tmp_path / "epoch_3.pt")
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    torch.save(
        {f"text.{n}" if "visual" not in n else n: v for n, v in weights.items()} | {"logit_scale": torch.ones(())},
        tmp_path / "text.pt",
    )
    for name in ("epoch_3.pt", "open_clip_pytorch_model.bin", "text.pt"):
        with pytest.raises(
            CheckpointError, match=rf"{name} is a model of open_clip.*model_configs/NAME\.json.*open_clip_config"
        ):
            load_foreign(tmp_path / name)
    config: Any = model.config
    settings = {
        "embed_dim": config.embed_dim,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": len(official.WORDS), "width": 64, "heads": 1, "layers": 2},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    for name in ("epoch_3.pt", "open_clip_pytorch_model.bin"):
        found = load_foreign(tmp_path / name)
        assert found.meta["from"]["format"] == "open_clip"
        assert found.config.vision.activation == "gelu"
