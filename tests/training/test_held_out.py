"""Stages that align nothing are validated by their own losses on held-out data, the same way at every validation."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from imglish.checkpoints.native import load
from imglish.data.dataset import Sample
from imglish.data.errors import Errors, Problem
from imglish.models.vqkd import VqKd, vqkd_tiny
from imglish.training import held_out as module
from imglish.training.config import Recipe, recipe_from
from imglish.training.held_out import held_out
from imglish.training.settings import SettingsError
from imglish.training.setup import gather_materials, make_teacher, new_model, pair_dataset
from imglish.training.trainer import train
from tests.ranks import run_ranks
from tests.training.support import assert_same, final_state, records

TEXTS = {"name": "vlmo-tiny", "depth": 2, "fused_layers": 1, "itc": False, "itc_fused": False, "itm": False}


def recipe(output: Path, model: dict[str, Any], **groups: Any) -> Recipe:
    """Six steps of eight, two validations."""
    data: dict[str, Any] = {
        "model": model,
        "output": str(output),
        "data": {"workers": 0, "patches": {"min_patches": 4}},
        "tokenizer": {"vocab_size": 90},
        "batch": {"size": 8},
        "schedule": {"steps": 6, "warmup_steps": 1},
        "compute": {"device": "cpu", "threads": 1},
        "validation": {"every": 1},
        "log": {"every": 3},
    }
    for name, group in groups.items():
        data[name] = data[name] | group if isinstance(group, dict) else group
    return recipe_from(data)


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a visual tokenizer with held-out pictures."""
    folder = tmp_path_factory.mktemp("codes")
    train(recipe(folder, {"name": "dvae-tiny"}), records(24), records(30)[20:])
    return folder


def validations(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "validation"]


def test_a_tokenizer_tells_its_use_of_the_codebook(codes: Path, tmp_path: Path) -> None:
    result = train(recipe(tmp_path / "again", {"name": "dvae-tiny"}), records(24), records(30)[20:])
    first, last = validations(result.events)
    assert set(last["losses"]) == {"reconstruction", "divergence", "untold"}
    model = load(tmp_path / "again" / "model").model
    assert 1 / model.codes <= last["metrics"]["code_usage_by_place"] <= last["metrics"]["code_usage"] <= 1
    assert result.best["loss"] == min(sum(event["losses"].values()) for event in (first, last))
    assert load(tmp_path / "again" / "best").meta["step"] == result.best["step"]
    assert "held out" in (tmp_path / "again" / "report.html").read_text(encoding="utf-8")
    calm = train(recipe(tmp_path / "calm", {"name": "dvae-tiny"}), records(24))
    assert validations(calm.events) == []
    assert_same(final_state(tmp_path / "again"), final_state(tmp_path / "calm"))  # validation changes no weight
    assert_same(final_state(tmp_path / "again"), final_state(codes))


@pytest.mark.parametrize(
    ("model", "losses", "metrics"),
    [
        ({"name": "beit-tiny"}, {"mim"}, {"mim_accuracy", "mim_by_place"}),
        (TEXTS, {"mlm"}, {"mlm_by_frequency"}),
        (
            {"name": "beit3-tiny"},
            {"pair_mim", "pair_mlm"},
            {"mim_accuracy", "mim_by_place", "mlm_by_frequency"},
        ),
    ],
    ids=["pictures", "texts", "pairs"],
)
def test_masked_objectives(
    codes: Path, tmp_path: Path, model: dict[str, Any], losses: set[str], metrics: set[str]
) -> None:
    groups: dict[str, Any] = {"data": {"texts_only": True}} if model is TEXTS else {"targets": str(codes / "model")}
    result = train(recipe(tmp_path, model, **groups), records(24), records(30)[20:])
    found = validations(result.events)
    assert len(found) == 2
    for event in found:
        assert set(event["losses"]) == losses
        assert set(event["metrics"]) == metrics
        assert "towers" not in event
    assert found[0]["metrics"]["mlm_by_frequency" if model is TEXTS else "mim_by_place"] == pytest.approx(
        found[1]["metrics"]["mlm_by_frequency" if model is TEXTS else "mim_by_place"]
    )


def test_the_same_whatever_was_drawn_before(codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(tmp_path, {"name": "beit-tiny"}, targets=str(codes / "model"))
    materials = gather_materials(settings, records(24), records(50)[20:], None)
    model = new_model(materials, 0)
    teacher, dataset = make_teacher(model, materials), pair_dataset(settings, materials, held_out=True)
    errors = Errors()
    one = held_out(model.train(), teacher, dataset, False, errors)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert held_out(model, teacher, dataset, False, errors) == one
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    monkeypatch.setattr(module, "BLOCK", 8)  # blocks of 8, 8, 8 and 6 in place of one of 30
    other = held_out(model, teacher, dataset, False, errors)
    assert other.losses["mim"] == pytest.approx(one.losses["mim"], rel=1e-5)
    assert other.metrics == pytest.approx(one.metrics, rel=1e-5)


def test_codes_that_name_their_place_are_told_from_codes_that_tell_of_pictures() -> None:
    places = torch.arange(9).expand(50, 9)
    pictures = (torch.arange(50)[:, None] + torch.arange(9)) % 9
    assert module._entropy(places) == pytest.approx(module._entropy(pictures), rel=0.01)  # nothing to see in these
    assert module._by_place(places) == pytest.approx(0.0)
    assert module._by_place(pictures) == pytest.approx(math.log(9), rel=0.01)
    assert module._entropy(torch.zeros(0, dtype=torch.int64)) == 0.0


def found_by(rank: int, codes: Path) -> dict[str, float]:
    """What a process finds with a visual tokenizer and with masked pictures."""
    found: dict[str, float] = {}
    for model, targets in ({"name": "dvae-tiny"}, None), ({"name": "beit-tiny"}, str(codes / "model")):
        settings = recipe(codes, model, targets=targets)
        materials = gather_materials(settings, records(24), records(30)[20:], None)
        network = new_model(materials, 0)
        dataset = pair_dataset(settings, materials, held_out=True)
        one = held_out(network, make_teacher(network, materials), dataset, False, Errors())
        found |= one.losses | one.metrics
    return found


def test_the_same_for_any_number_of_processes(codes: Path) -> None:
    alone = found_by(0, codes)
    assert {"untold", "code_usage", "mim", "mim_by_place"} < set(alone)
    for found in run_ranks(2, found_by, codes):
        assert found == pytest.approx(alone, rel=1e-5)


def test_pictures_that_cannot_be_read_are_named(codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(tmp_path, {"name": "dvae-tiny"})
    materials = gather_materials(settings, records(24), records(4), None)
    dataset, model = pair_dataset(settings, materials, held_out=True), new_model(materials, 0)
    sample = dataset.sample

    def damaged(seed: int, epoch: int, item: int) -> Sample:
        return replace(sample(seed, epoch, item), unreadable=(Problem("picture-1", "damaged", "picture-1: damaged"),))

    monkeypatch.setattr(dataset, "sample", damaged)
    errors = Errors(quiet=True)
    held_out(model, make_teacher(model, materials), dataset, False, errors)
    assert errors.counts == {"damaged": 1}


def test_a_codebook_learns_nothing_from_held_out_pictures() -> None:
    from imglish.models.clip import clip_tiny
    from tests.models.test_visual_tokenizers import batch_of, pictures

    model = VqKd(vqkd_tiny()).eval()
    teacher = model.make_teacher(clip_tiny().build())
    model.losses(batch_of(pictures(4)), teacher)
    before = model.codebook.clone()
    teacher.update(model)
    assert torch.equal(model.codebook, before)


def test_what_cannot_be_validated_is_said(codes: Path, tmp_path: Path) -> None:
    settings = recipe(tmp_path, {"name": "beit-tiny"}, targets=str(codes / "model"), validation={"rerank": 4})
    with pytest.raises(SettingsError, match=r"validation\.rerank.*leave"):
        train(settings, records(24), records(30)[20:])
