"""BLIP from a recipe to captions: tokens of its own, a teacher of towers alone, fine-tuning with a prompt."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from imglish.checkpoints.native import load
from imglish.data.batch import Batch
from imglish.generation.config import GenerationConfig
from imglish.generation.engine import caption
from imglish.models.blip import Blip
from imglish.training.config import Recipe
from imglish.training.settings import SettingsError
from imglish.training.setup import gather_materials, pair_dataset
from imglish.training.step import Stepper
from imglish.training.trainer import train
from tests.training.support import assert_same, final_state, recipe, records


def blip(output: Path | str, **groups: Any) -> Recipe:
    return recipe(output, "blip", **({"tokenizer": {"vocab_size": 90, "append_sep": True}} | groups))


def test_a_stopped_run_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = train(blip(tmp_path / "calm"), records())
    losses = [event["losses"] for event in calm.events if event["event"] == "step"]
    assert losses[0].keys() == {"itc", "itm", "lm"}
    assert losses[-1]["lm"] < losses[0]["lm"]
    real = Stepper.__call__

    def interrupted(self: Stepper, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return real(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "__call__", interrupted)
        assert train(blip(tmp_path / "stopped"), records()).step == 7
    train(blip(tmp_path / "stopped"), records())
    assert_same(final_state(tmp_path / "calm"), final_state(tmp_path / "stopped"))


def test_tokens_of_its_own_and_an_end() -> None:
    materials = gather_materials(blip("unused"), records(), None, None)
    tokenizer, config = materials.tokenizer, materials.config
    assert (tokenizer.id_of("[DEC]"), tokenizer.id_of("[ENC]")) == (config.decode_id, config.encode_id)
    assert config.vocab_size == tokenizer.vocab_size
    ids = pair_dataset(blip("unused"), materials).sample(0, 0, 0).ids
    assert (ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
    with pytest.raises(SettingsError, match=r"tokenizer\.append_sep: blip learns from the closing token"):
        gather_materials(recipe("unused", "blip"), records(), None, None)


def test_captioning_with_a_prompt_from_a_pretrained_model(tmp_path: Path) -> None:
    train(blip(tmp_path / "first"), records())
    changes = {"init": str(tmp_path / "first" / "model"), "itc": False, "itm": False, "prompt": "a red "}
    schedule, judged = {"steps": 4, "warmup_steps": 1}, {"every": 1.0, "captions": 3}
    tuned = replace(blip(tmp_path / "second", schedule=schedule, validation=judged), model=changes)
    materials = gather_materials(tuned, records(), None, None)
    _, *prompt, _ = materials.tokenizer.encode(["a red"])[0]
    assert pair_dataset(tuned, materials).sample(0, 0, 0).ids[1 : 1 + len(prompt)] == prompt
    assert materials.config.prompt_tokens == len(prompt)
    result = train(tuned, records(), records(6))
    [validation] = [event for event in result.events if event["event"] == "validation"]
    assert set(validation["losses"]) == {"lm"}  # recalls would say nothing about captions
    assert result.best["cider"] == validation["captions"]["cider"]
    assert [set(event["losses"]) for event in result.events if event["event"] == "step"] == [{"lm"}]
    loaded = load(str(tmp_path / "second" / "model"))
    assert isinstance(loaded.model, Blip)
    assert loaded.config.prompt == "a red "
    with torch.no_grad():
        images = loaded.model.encode_images(torch.zeros(2, 3, 16, 16))
    config = GenerationConfig(max_length=12)
    written = caption(loaded.model, loaded.tokenizer, images, config, ["one", "two"])
    same = caption(loaded.model, loaded.tokenizer, images, config, ["one", "two"], prompt="a red")
    assert [[c.text for c in texts] for texts in written] == [[c.text for c in texts] for texts in same]
