"""Region files: written, read, refused; and a training that reads nothing else of the pictures."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import imglish
from imglish.cli.evaluate import main
from imglish.data.dataset import PairDataset
from imglish.data.images import ImageError
from imglish.data.loader import training_batches
from imglish.data.records import Record
from imglish.data.regions import RegionBatch, RegionFile, RegionFileError, region_loader, write_regions
from imglish.training.config import Recipe
from imglish.training.settings import SettingsError
from imglish.training.trainer import train
from tests.training.support import recipe

FEATURES = 12


def pictures(count: int = 24) -> list[tuple[str, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        corners = np.sort(rng.random((2 + number % 4, 2, 2), dtype=np.float32), axis=1)
        features = rng.standard_normal((len(corners), FEATURES)).astype(np.float16)
        made.append((f"p{number}", features, corners.reshape(-1, 4)))
    return made


def records(count: int = 24) -> list[Record]:
    return [Record(f"p{n}", None, (f"a thing number {n}", f"number {n} again"), image_id=n) for n in range(count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_regions(tmp_path / "regions.safetensors", pictures())
    return tmp_path / "regions.safetensors"


def test_what_is_written_is_read(path: Path) -> None:
    file = pickle.loads(pickle.dumps(RegionFile(path)))
    assert len(file) == 24
    assert file.width == FEATURES
    for key, features, boxes in pictures():
        found = file[key]
        assert np.array_equal(found.features.numpy(), features)
        assert np.array_equal(found.boxes.numpy(), boxes)
    with pytest.raises(ImageError, match="p99: no regions"):
        file["p99"]


def test_what_does_not_fit_is_refused(tmp_path: Path, path: Path) -> None:
    with pytest.raises(RegionFileError, match="does not exist"):
        RegionFile(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(RegionFileError, match="not a region file"):
        RegionFile(tmp_path / "text")
    tensors = load_file(path)
    save_file(tensors, tmp_path / "nameless")
    with pytest.raises(RegionFileError, match="not a region file"):
        RegionFile(tmp_path / "nameless")
    save_file(tensors | {"offsets": tensors["offsets"].flip(0)}, tmp_path / "turned", metadata={"keys": '["a"]'})
    with pytest.raises(RegionFileError, match="1 keys do not fit"):
        RegionFile(tmp_path / "turned")
    with pytest.raises(ValueError, match="p0: boxes"):
        write_regions(tmp_path / "bad", [("p0", np.zeros((2, 3), np.float32), np.full((2, 4), 2, np.float32))])


def _recipe(output: Path, regions: Path | None, **groups: Any) -> Recipe:
    untouched = {"crop": None, "flip": False}
    data = untouched | {"regions": None if regions is None else str(regions)} | groups.pop("data", {})
    made = recipe(output, "albef", **({"data": data, "tokenizer": {"append_sep": True}} | groups))
    image = {"features": FEATURES}
    return replace(made, model={"name": "vilt-regions", "image": image, "width": 32, "depth": 2, "heads": 2})


def test_batches_of_regions(path: Path) -> None:
    dataset = PairDataset(records(), None, None, regions=RegionFile(path))
    batch = next(training_batches(dataset, 6, seed=1, workers=1))[0]
    assert isinstance(batch.images, RegionBatch)
    assert len(batch) == 6
    for number, key in enumerate(batch.keys):
        expected = RegionFile(path)[key]
        assert torch.equal(batch.images[number : number + 1].features, expected.features)
        assert torch.equal(batch.images[number : number + 1].boxes, expected.boxes)


def test_a_run_over_regions(tmp_path: Path, path: Path) -> None:
    """UNITER's kind of training: ITM, WPA and MLM over regions; validated, exported, loaded, used for matching."""
    validation = {"data": "given", "regions": str(path), "limit": 5}
    settings = _recipe(tmp_path / "run", path, validation=validation)
    result = train(settings, records(), records()[:8])
    assert result.step == 12
    last = [event for event in result.events if event["event"] == "step"][-1]
    assert {"mlm", "itm", "wpa"} <= last["losses"].keys()
    found = [event for event in result.events if event["event"] == "validation"]
    assert found
    assert found[-1]["towers"] is None
    assert 0 <= found[-1]["reranked"]["t2i_r1"] <= 100
    assert result.model is not None
    model = imglish.load(result.model)
    load = region_loader(RegionFile(path))
    probability = model.match([load(record) for record in records()[:3]], ["a thing number 1", "number 2 again"])
    assert probability.shape == (3, 2)
    with pytest.raises(TypeError, match="regions of a detector"):
        model.match([path], ["a thing"])


def test_commands_need_no_pictures(tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Captions name pictures that are nowhere: their regions are all that is read."""
    lines = [json.dumps({"image": record.key, "captions": record.captions}) for record in records()]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("\n".join(lines))
    groups = {"data": {"train": str(captions)}, "validation": {"data": str(captions), "limit": 4}}
    settings = _recipe(tmp_path / "run", path, **groups)
    settings = replace(settings, validation=replace(settings.validation, regions=str(path)))
    settings = replace(settings, data=replace(settings.data, regions=str(path)))
    model = train(settings).model
    arguments = ["--model", str(model), "--data", str(captions), "--regions", str(path), "--limit", "5"]
    assert main(["retrieval", *arguments, "--out", str(tmp_path / "eval")]) == 0
    assert "it has read every pair, 50" in capsys.readouterr().out
    assert (tmp_path / "eval" / "report.html").is_file()


def test_a_missing_region_file_stops_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data\.regions"):
        train(_recipe(tmp_path / "run", None), records())
    with pytest.raises(SettingsError, match="does not exist"):
        train(_recipe(tmp_path / "run", tmp_path / "none"), records())


@pytest.mark.parametrize(("setting", "value"), [("crop", 0.5), ("flip", True), ("augment", "vilt")])
def test_what_cannot_be_done_to_regions_is_refused(tmp_path: Path, path: Path, setting: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=rf"data\.{setting}: regions of a detector are read as they are"):
        train(_recipe(tmp_path / "run", path, data={setting: value}), records())


def test_file_and_model_have_to_fit(tmp_path: Path, path: Path) -> None:
    settings = _recipe(tmp_path / "run", path)
    wider = replace(settings, model=settings.model | {"image": {"features": 7}})
    with pytest.raises(SettingsError, match=r"data\.regions: .*12 numbers a region, .*model\.image\.features=12"):
        train(wider, records())
    with pytest.raises(SettingsError, match=r"data\.regions: a model of family albef with pixels reads no regions"):
        train(recipe(tmp_path / "run", "albef", data={"regions": str(path)}), records())
    with pytest.raises(SettingsError, match=r"validation\.regions: this model reads the regions"):
        train(settings, records(), records()[:4])
    assert not (tmp_path / "run" / "log.jsonl").exists()
