"""The whole loop as one recipe: trainings and jobs, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from imglish.bootstrapping.loop import check_loop, loop_from, run_loop
from imglish.cli import main
from imglish.data.errors import DataError
from imglish.data.scene_folder import write_scenes
from imglish.data.scene_noise import CaptionNoise
from imglish.data.scenes import SceneConfig
from imglish.data.sources import open_source
from imglish.training.settings import SettingsError
from tests.ranks import run_ranks

LOOK: dict[str, Any] = {"size": 32, "captions": 1, "people": (1, 1), "languages": ("en",), "pairs": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Noisy and clean pictures, as settings of a source."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(SceneConfig(scenes=20, noise=CaptionNoise(0.2, 0.2, 0.2), **LOOK), folder / "web")
    write_scenes(SceneConfig(scenes=8, seed=1, **LOOK), folder / "clean")
    return {
        name: {"path": str(folder / name / "captions.jsonl"), "images": str(folder / name / "images"), "split": "train"}
        for name in ("web", "clean")
    }


def recipe(data: dict[str, dict[str, str]], output: Path) -> dict[str, Any]:
    web, clean = ({"train": d["path"], "images": d["images"], "split": "train"} for d in (data["web"], data["clean"]))
    size: dict[str, Any] = {"name": "blip-tiny", "max_length": 32, "depth": 1}
    model = {**size, "vision": {"depth": 1}, "teacher": {"queue_size": 0}}
    best = {"min_itm": None, "best": [[1, "itm"]]}
    return {
        "output": str(output),
        "shared": {
            "data": {"workers": 0, **web},
            "tokenizer": {"vocab_size": 90, "append_sep": True},
            "batch": {"size": 8},
            "schedule": {"steps": 2, "warmup_steps": 1},
            "compute": {"device": "cpu", "threads": 1},
            "log": {"every": 2},
        },
        "stages": {
            "noisy": {"model": model},
            "captioner": {"model": {"init": "noisy", "itc": False, "itm": False}, "data": clean},
            "filter": {"model": {"init": "noisy", "lm": False}, "data": clean},
            "captions": {"caption": {"model": "captioner", "data": data["web"], "per_shard": 10}},
            "scores": {"score": {"model": "filter", "of": "captions"}},
            "kept": {"filter": {"of": "scores", "rules": best, "beside": [data["clean"]]}},
            "again": {"model": model, "data": {"train": "kept"}},
        },
    }


def test_the_whole_loop(data: dict[str, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(data, out), sort_keys=False))
    assert main(["bootstrap", str(path), "--check"]) == 0
    assert "can be checked when captioner is there" in capsys.readouterr().out
    assert not out.exists()
    assert main(["train", str(path)]) == 2
    assert "`imglish bootstrap` runs such recipes" in capsys.readouterr().err
    assert main(["bootstrap", str(path)]) == 0
    said = capsys.readouterr().out
    assert "20 captions of 20 pictures" in said
    assert "40 texts scored" in said
    assert "20 of 40 texts are kept" in said

    kept = open_source(out / "6-kept" / "keep.yaml")
    assert [len(record.captions) for record in kept] == [1] * 28  # with the clean ones
    begun = json.loads((out / "7-again" / "log.jsonl").read_text().splitlines()[0])
    assert begun["pairs"] == 28
    assert "beside" in json.loads((out / "6-kept" / "filter.json").read_text())

    (out / "4-captions" / "00001.parquet").unlink()  # as if it had been stopped there
    assert main(["bootstrap", str(path)]) == 0
    said = capsys.readouterr().out
    assert "20 captions of 20 pictures" in said
    assert said.count("finished before") == 6

    assert main(["bootstrap", str(path), "stages.kept.filter.rules.best=[[2, itm]]"]) == 1
    assert "other settings; remove the folder" in capsys.readouterr().err
    shutil.rmtree(out / "6-kept")
    assert main(["bootstrap", str(path)]) == 2
    assert "made before kept" in capsys.readouterr().err


def test_pictures_that_are_no_files_become_shards(data: dict[str, dict[str, str]], tmp_path: Path) -> None:
    settings = recipe(data, tmp_path / "out")
    drawn = {"path": "scenes:{scenes: 9, size: 32, captions: 1, people: [1, 1], languages: [en]}"}
    stages = settings["stages"]
    stages["scores"] = {"score": {"model": "noisy", "data": drawn}}  # without synthetic captions
    settings["stages"] = {name: stages[name] for name in ("noisy", "scores", "kept")}
    assert len(list(run_loop(loop_from(settings)))) == 1
    kept = open_source(tmp_path / "out" / "3-kept" / "keep.yaml")
    assert len(kept) == 9 + 8
    assert list(run_loop(loop_from(settings))) == []


@pytest.mark.parametrize(
    ("change", "key", "problem"),
    [
        ({"captions": {"caption": {"model": "filter"}}}, "stages.captions.caption.data", "give the pictures"),
        ({"captions": {"caption": {"model": "again"}}}, "stages.captions.caption.model", "does not come before"),
        ({"captions": {"caption": {"model": "scores"}}}, "stages.captions.caption.model", "does not come before"),
        ({"captions": {"caption": {"models": "filter"}}}, "stages.captions.caption.models", "did you mean model"),
        ({"scores": {"score": {"model": "filter"}}}, "stages.scores.score.of", "either"),
        ({"scores": {"score": {"model": "filter", "of": "noisy"}}}, "stages.scores.score.of", "not the kind of stage"),
        ({"kept": {"filter": {"of": "captions"}}}, "stages.kept.filter.of", "does not score"),
        ({"kept": {"filter": {"of": "scores", "rules": {"near": 2}}}}, "stages.kept.filter", "near is 2"),
        ({"kept": {"filter": {"of": "scores"}, "seed": 1}}, "stages.kept.seed", "nothing beside it"),
        ({"again": {"model": {"name": "blip-tiny"}, "data": {"train": "scores"}}}, "data.train", "does not filter"),
        (
            {"again": {"model": {"name": "blip-tiny"}, "data": {"train": "kept", "split": "train"}}},
            "stages.again.data.split",
            "leave it out",
        ),
    ],
)
def test_mistakes_are_named(
    data: dict[str, dict[str, str]], tmp_path: Path, change: dict[str, Any], key: str, problem: str
) -> None:
    settings = recipe(data, tmp_path / "out")
    settings["stages"] |= change
    with pytest.raises(SettingsError, match=problem) as caught:
        loop_from(settings)
    assert key in caught.value.key


def test_a_model_that_writes_nothing_is_named_with_those_that_do(
    data: dict[str, dict[str, str]], tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = recipe(data, tmp_path / "out")
    caption = {"model": str(models / "clip-tiny"), "data": data["web"]}
    settings["stages"] = {"captions": {"caption": caption}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert main(["bootstrap", str(path)]) == 2
    assert "Families that do: " in capsys.readouterr().err


def test_shards_that_cannot_be_read_end_the_loop(data: dict[str, dict[str, str]], tmp_path: Path, models: Path) -> None:
    settings = recipe(data, tmp_path / "out")
    copied = tmp_path / "web.jsonl"
    copied.write_text(Path(data["web"]["path"]).read_text())
    caption = {"model": str(models / "blip-tiny"), "data": {**data["web"], "path": str(copied)}, "per_shard": 10}
    settings["stages"] = {"captions": {"caption": caption}}
    steps = loop_from(settings)
    assert check_loop(steps) == ["captions:", "  settings are valid"]
    list(run_loop(steps))
    (tmp_path / "out" / "1-captions" / "00000.parquet").unlink()
    copied.write_text("\n".join(copied.read_text().splitlines()[:5]))
    with pytest.raises(DataError, match="1 of 2 shards"):
        list(run_loop(steps))


def steps_of(rank: int, settings: dict[str, Any]) -> list[int]:
    return [result.step for result in run_loop(loop_from(settings))]


@pytest.mark.slow
def test_two_processes_share_the_work(data: dict[str, dict[str, str]], tmp_path: Path) -> None:
    settings = recipe(data, tmp_path / "out")
    stages = {name: stages for name, stages in settings["stages"].items() if name not in ("captioner", "filter")}
    stages["captions"]["caption"] |= {"model": "noisy", "per_shard": 3}
    stages["scores"]["score"]["model"] = "noisy"
    settings["stages"] = stages
    assert run_ranks(2, steps_of, settings) == [[2, 2], [2, 2]]
    assert len(open_source(tmp_path / "out" / "4-kept" / "keep.yaml")) == 28
    assert run_ranks(2, steps_of, settings) == [[], []]
