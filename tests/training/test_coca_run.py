"""CoCa from a recipe to captions, with several captions a picture; other families say that they take one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from imglish.checkpoints.native import load
from imglish.data.batch import Batch
from imglish.data.loader import training_batches
from imglish.generation.config import GenerationConfig
from imglish.generation.engine import caption
from imglish.models.coca import Coca
from imglish.training.config import Recipe
from imglish.training.settings import SettingsError
from imglish.training.setup import gather_materials, new_model, pair_dataset
from imglish.training.step import Stepper, split
from imglish.training.trainer import train
from tests.training.support import assert_same, final_state, recipe, records


def coca(output: Path | str, **groups: Any) -> Recipe:
    defaults = {"tokenizer": {"vocab_size": 90, "append_sep": True}, "data": {"captions": 2}}
    return recipe(output, "coca", **(defaults | groups))


def test_a_stopped_run_goes_on_exactly_and_writes_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = train(coca(tmp_path / "calm"), records(), records(10))
    steps = [event for event in calm.events if event["event"] == "step"]
    assert steps[0]["losses"].keys() == {"itc", "caption"}
    assert steps[0]["metrics"].keys() == {"logit_scale", "token_nats"}
    assert steps[-1]["losses"]["caption"] < steps[0]["losses"]["caption"]
    assert calm.best
    real = Stepper.__call__

    def interrupted(self: Stepper, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return real(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "__call__", interrupted)
        assert train(coca(tmp_path / "stopped"), records(), records(10)).step == 7
    train(coca(tmp_path / "stopped"), records(), records(10))
    assert_same(final_state(tmp_path / "calm"), final_state(tmp_path / "stopped"))
    loaded = load(str(tmp_path / "calm" / "model"))
    assert isinstance(loaded.model, Coca)
    with torch.no_grad():
        images = loaded.model.encode_images(torch.zeros(2, 3, 16, 16))
    texts = caption(loaded.model, loaded.tokenizer, images, GenerationConfig(beams=2, max_length=12), ["a", "b"])
    assert all(len(found) == 1 for found in texts)


def test_batches_of_several_captions() -> None:
    settings = coca("unused")
    dataset = pair_dataset(settings, gather_materials(settings, records(), None, None))
    batch = next(training_batches(dataset, 8))[0]
    assert (len(batch), batch.captions, len(batch.texts)) == (8, 2, 16)
    parts = split(batch, 4)
    assert [len(part.texts) for part in parts] == [4] * 4
    assert torch.equal(torch.cat([part.texts.ids for part in parts]), batch.texts.ids)
    assert sum(part.mean(lambda b: b.texts.segments.total) for part in parts) == batch.texts.segments.total


def test_what_does_not_take_several_captions_says_so() -> None:
    for family in ("albef", "blip", "vilt"):
        settings = recipe("unused", family, data={"captions": 2}, tokenizer={"vocab_size": 90, "append_sep": True})
        materials = gather_materials(settings, records(), None, None)
        with pytest.raises(SettingsError, match=rf"data\.captions: 2 captions a picture, .*\({family}\) takes one"):
            pair_dataset(settings, materials)
    settings = recipe("unused", "clip", data={"captions": 3})
    with pytest.raises(SettingsError, match="3 captions a picture are wanted, the records have up to 2"):
        pair_dataset(settings, gather_materials(settings, records(), None, None))


def test_clip_trains_with_several_captions(tmp_path: Path) -> None:
    result = train(recipe(tmp_path, "clip", data={"captions": 2}, schedule={"steps": 4, "warmup_steps": 1}), records())
    assert result.step == 4


def test_captions_need_a_closing_token() -> None:
    with pytest.raises(SettingsError, match=r"tokenizer\.append_sep: coca learns from the closing token"):
        gather_materials(recipe("unused", "coca"), records(), None, None)


def test_a_run_at_another_size_of_pictures_begins_with_the_weights_of_one_before(tmp_path: Path) -> None:
    """The paper's last epoch has pictures of twice the side: positions are fitted, everything else goes over."""
    train(coca(tmp_path / "small", schedule={"steps": 4, "warmup_steps": 1}), records())
    large = coca(tmp_path / "large", schedule={"steps": 2, "warmup_steps": 1})
    large.model.update(start=str(tmp_path / "small" / "model"), vision=large.model["vision"] | {"image": {"size": 32}})
    materials = gather_materials(large, records(), None, None)
    before, after = load(str(tmp_path / "small" / "model")).model.state_dict(), new_model(materials, 0).state_dict()
    assert [name for name in after if not torch.equal(before[name], after[name])] == ["vision.positions"]
    assert (before["vision.positions"].shape, after["vision.positions"].shape) == ((4, 32), (16, 32))
    assert train(large, records()).step == 2
