"""RandAugment, MixGen and the clean-up of captions in a training run."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from imglish.data.loader import training_batches
from imglish.data.records import Record
from imglish.training.config import Recipe, plan
from imglish.training.settings import SettingsError
from imglish.training.setup import gather_materials, mixtures, pair_dataset
from imglish.training.step import split
from imglish.training.trainer import train
from tests.training.support import assert_same, final_state, recipe, records

VARIED: dict[str, Any] = {"augment": "vilt", "mixgen": 4, "clean": "albef", "max_words": 4, "cache": False}


def varied(output: Path, family: str = "albef", **data: Any) -> Recipe:
    return recipe(output, family, data=VARIED | data)


def batch(wanted: Recipe, place: int = 0) -> Any:
    materials = gather_materials(wanted, records(), [], None)
    made = training_batches(pair_dataset(wanted, materials), wanted.batch.size, mixgen=mixtures(wanted, materials))
    return next(islice(made, place, None))[0]


@pytest.mark.parametrize("family", ["albef", "clip"])
def test_workers_do_not_change_a_varied_run(tmp_path: Path, family: str) -> None:
    for workers in (0, 2):
        found = train(varied(tmp_path / str(workers), family, workers=workers), records())
        assert found.step == 12
    assert_same(final_state(tmp_path / "0"), final_state(tmp_path / "2"))


@pytest.mark.parametrize("change", [{"augment": None}, {"magnitude": 2.0}, {"mixgen": None}, {"max_words": 2}])
def test_every_setting_reaches_the_batch(tmp_path: Path, change: dict[str, Any]) -> None:
    one, other = batch(varied(tmp_path)).blended(), batch(varied(tmp_path, **change)).blended()
    texts = one.texts.segments == other.texts.segments and torch.equal(one.texts.ids, other.texts.ids)
    assert not (torch.equal(one.images, other.images) and texts)


def test_parts_of_a_batch_are_blended_like_the_whole(tmp_path: Path) -> None:
    whole = batch(varied(tmp_path, mixgen=2))
    parts = [part.blended() for part in split(whole, 2)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.blended().images)
    assert not torch.equal(whole.blended().images, whole.images)


def test_validation_and_tokenizer_see_clean_captions(tmp_path: Path) -> None:
    odd = [Record("a", records(1)[0].image, ("Hello, (World) of-DOGS! and more", "x"), 0), *records(20)[1:]]
    found = gather_materials(varied(tmp_path), odd, odd, None)
    assert found.validation[0].captions[0] == "hello world of dogs"
    assert found.tokenizer.inner.token_to_id("!") is None
    plain = gather_materials(recipe(tmp_path), odd, odd, None)
    assert plain.validation[0].captions[0] == odd[0].captions[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixgen": 1}, "data.mixgen: 1 lies outside"),
        ({"magnitude": 40.0}, "data.magnitude: a magnitude of 40"),
        ({"augment": None, "magnitude": 3.0}, "data.magnitude: nothing is augmented"),
        ({"augment": "cutout"}, "data.augment: 'cutout' does not fit"),
        ({"clean": "vilt"}, "data.clean: "),
        ({"decode": "best"}, "data.decode: "),
        ({"max_words": 0}, "data.max_words: 0 lies outside"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        varied(tmp_path, **data)


def test_what_cannot_be_mixed_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data\.mixgen: 4 does not divide the 2 pairs"):
        plan(varied(tmp_path), 48, world_size=4)
    ragged = recipe(tmp_path, "vilt", data=VARIED | {"mixgen": 2}, tokenizer={"append_sep": True})
    with pytest.raises(SettingsError, match="pictures of several sizes"):
        mixtures(ragged, gather_materials(ragged, records(), [], None))
