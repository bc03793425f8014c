"""Exported models: complete in themselves, replaced at once or not at all, and read without trust."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from imglish import atomic
from imglish.checkpoints.native import CheckpointError, export, load
from imglish.data.batch import TextBatch
from imglish.data.tokenizers import Tokenizer
from imglish.models.registry import named

TEXTS = ["a red square", "a blue stripe", "the frame is green", "a red frame"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_wordpiece(TEXTS * 3, 60, max_length=16)


def make(name: str, tokenizer: Tokenizer, seed: int = 0) -> nn.Module:
    from dataclasses import replace

    torch.manual_seed(seed)
    return replace(named(name), vocab_size=tokenizer.vocab_size).build().eval()


@pytest.mark.parametrize(("name", "rule"), [("clip-tiny", "itc"), ("albef-tiny", "itm")])
def test_a_model_comes_back_whole(tmp_path: Path, tokenizer: Tokenizer, name: str, rule: str) -> None:
    model = make(name, tokenizer)
    path = export(tmp_path / "deep" / "model", model, tokenizer, {"step": 7, "from": "测试"})
    loaded = load(path)
    assert loaded.config == model.config
    assert (loaded.score_rule, loaded.meta) == (rule, {"step": 7, "from": "测试"})
    assert not loaded.model.training
    state, expected = loaded.model.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert loaded.tokenizer.encode(TEXTS) == tokenizer.encode(TEXTS)
    ids = TextBatch.of(tokenizer.encode(TEXTS))
    assert torch.equal(loaded.model.encode_texts(ids).features, model.encode_texts(ids).features)  # type: ignore[operator]
    described = json.loads((path / "imglish.json").read_text())
    assert described["image"]["size"] == 48
    assert {file.name for file in path.iterdir()} == {"model.safetensors", "imglish.json", "tokenizer.json"}
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


NUMBERS = {"int8": torch.int8, "bool": torch.bool, "float8": torch.float8_e4m3fn, "complex": torch.complex64}


def damage(path: Path, what: str) -> None:
    described = path / "imglish.json"
    data = json.loads(described.read_text())
    weights = load_file(path / "model.safetensors")
    if what == "format":
        data["format"] = 99
    elif what == "family":
        data["family"] = "clop"
    elif what == "setting":
        data["config"]["colour"] = "red"
    elif what == "part":
        data["config"]["vision"] = [1]
    elif what == "size":
        data["config"]["text"]["heads"] = 0
    elif what == "layers":
        data["config"]["text"]["depth"] = 10**9
    elif what == "meta":
        data["meta"] = ["x"]
    elif what == "rule":
        data["score_rule"] = "guess"
    elif what == "missing weight":
        del weights["logit_scale"]
    elif what == "surplus weight":
        weights["extra"] = torch.zeros(1)
    elif what == "shape":
        weights["text_proj.weight"] = torch.zeros(2, 2)
    elif what in NUMBERS:
        weights["text_proj.weight"] = weights["text_proj.weight"].to(NUMBERS[what])
    described.write_text(json.dumps(data) if what != "no json" else "{")
    save_file(weights, path / "model.safetensors")
    if what == "cut":
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif what == "tokenizer":
        (path / "tokenizer.json").write_text("{}")
    elif what == "other tokenizer":
        Tokenizer.train_wordpiece(["x y z"] * 3, 20).save(path / "tokenizer.json")
    elif what == "no description":
        described.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("format", r"imglish\.json has format 99; imglish .* reads format 1"),
        ("family", r"the configuration cannot be used: .*clop"),
        ("setting", r"the configuration cannot be used: .*colour"),
        ("part", r"imglish\.json: the configuration cannot be used: "),
        ("size", r"imglish\.json: the configuration cannot be used: .*zero"),
        ("layers", r"imglish\.json: the configuration cannot be used: 1000000000 layers: more than 1000"),
        ("meta", r"imglish\.json: meta is no dictionary"),
        ("rule", r"score rule 'guess'"),
        ("missing weight", r"1 weights are missing: logit_scale"),
        ("surplus weight", r"1 weights do not belong to the model: extra"),
        ("shape", r"shapes differ: text_proj\.weight is \(2, 2\), the model's is \(64, 64\)"),
        *(
            (name, rf"kinds of numbers differ: text_proj\.weight is {kind}, .*float32")
            for name, kind in NUMBERS.items()
        ),
        ("no json", r"imglish\.json is not JSON"),
        ("cut", r"model\.safetensors cannot be read"),
        ("tokenizer", r"tokenizer\.json cannot be read"),
        ("other tokenizer", r"the tokenizer has \d+ tokens, the model \d+"),
        ("no description", r"is no exported model"),
    ],
)
def test_damage_is_named(tmp_path: Path, tokenizer: Tokenizer, what: str, message: str) -> None:
    path = export(tmp_path / "model", make("clip-tiny", tokenizer), tokenizer)
    damage(path, what)
    with pytest.raises(CheckpointError, match=message):
        load(path)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_become_the_models(tmp_path: Path, tokenizer: Tokenizer, kind: torch.dtype) -> None:
    model = make("clip-tiny", tokenizer)
    path = export(tmp_path / "model", model, tokenizer)
    weights = {name: value.to(kind) for name, value in load_file(path / "model.safetensors").items()}
    save_file(weights, path / "model.safetensors")
    state = load(path).model.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(value, weights[name].float()) for name, value in state.items())


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model at"):
        load(tmp_path / "nothing")


def test_an_export_is_replaced_at_once_or_not_at_all(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export(tmp_path / "model", make("clip-tiny", tokenizer, 1), tokenizer, {"which": "old"})

    class Killed(BaseException):
        """Stands for a kill: nothing of the process runs afterwards."""

    def die(*_: object, **__: object) -> None:
        raise Killed

    real = os.rename
    for moment in ("write_text", "between"):
        with monkeypatch.context() as patch:
            if moment == "write_text":
                patch.setattr(Path, "write_text", die)
            else:
                patch.setattr(os, "rename", lambda a, b: real(a, b) if str(b).endswith(atomic.REPLACED) else die())
            with pytest.raises(Killed):
                export(path, make("clip-tiny", tokenizer, 2), tokenizer, {"which": "new"})
        assert load(path).meta == {"which": "old"}
    export(path, make("clip-tiny", tokenizer, 2), tokenizer, {"which": "new"})
    assert load(path).meta == {"which": "new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is no exported model"):
        export(tmp_path / "photos", make("clip-tiny", tokenizer), tokenizer)
    with pytest.raises(CheckpointError, match="score rule 'best'"):
        export(tmp_path / "m", make("clip-tiny", tokenizer), tokenizer, score_rule="best")
    assert (tmp_path / "photos" / "a.jpg").read_text() == "x"
