"""Stages as one recipe: each begins with the model of an earlier one, and the whole can be stopped anywhere."""

from __future__ import annotations

import json
import os
import signal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

from imglish.checkpoints.native import load
from imglish.checkpoints.rules import ConversionError
from imglish.checkpoints.transfer import transfer
from imglish.cli.train import STOPPED, main
from imglish.models import registry
from imglish.training.settings import SettingsError, fill
from imglish.training.setup import gather_materials, pair_dataset
from imglish.training.stages import check_stages, stages_from, train_stages
from imglish.training.trainer import Run
from tests.ranks import run_ranks
from tests.training.support import assert_same, final_state, records

TEXT_STAGE = ["embedding.*", "types.*", "blocks.*.ffn.text.*", "mlm_head.*", "mlm_words.*", "relative.*", "norm.*"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions, and texts alone."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for record in records(24):
        assert isinstance(record.image, bytes)
        (folder / f"{record.key}.png").write_bytes(record.image)
        lines.append(json.dumps({"image": f"{record.key}.png", "captions": record.captions}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    (folder / "texts.txt").write_text("\n".join(text for record in records(40) for text in record.captions))
    return folder


def pipeline(data: Path, output: Path) -> dict[str, Any]:
    """Four stages of four steps."""
    pictures = {"train": str(data / "pairs.jsonl"), "images": str(data)}
    sizes = {"depth": 3, "heads": 4}
    return {
        "output": str(output),
        "shared": {
            "data": {"workers": 0},
            "batch": {"size": 8},
            "schedule": {"steps": 4, "warmup_steps": 1},
            "compute": {"device": "cpu", "threads": 1},
            "checkpoint": {"every_steps": 2},
            "log": {"every": 2},
        },
        "stages": {
            "codes": {"model": {"name": "dvae-tiny"}, "data": pictures},
            "images": {"model": {"name": "beit-tiny"}, "targets": "codes", "data": pictures},
            "texts": {
                "model": {
                    "name": "vlmo-tiny",
                    "start": "images",
                    **sizes,
                    "itc": False,
                    "itc_fused": False,
                    "itm": False,
                }
                | {"fused_layers": 0},
                "data": {"train": str(data / "texts.txt"), "texts_only": True},
                "tokenizer": {"vocab_size": 90},
                "optimiser": {"only": TEXT_STAGE},
            },
            "pairs": {"model": {"name": "vlmo-tiny", "start": "texts", **sizes}, "data": pictures},
        },
    }


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "staged"
    results = list(train_stages(stages_from(pipeline(data, output))))
    assert [result.step for result in results] == [4, 4, 4, 4]
    return output


def test_every_stage_begins_with_the_one_before(trained: Path) -> None:
    beit, texts, pairs = (load(trained / name / "model").model for name in ("2-images", "3-texts", "4-pairs"))
    given, kept = transfer(beit, texts).state, texts.state_dict()
    assert torch.equal(given["blocks.1.ffn.image.fc1.weight"], beit.state_dict()["blocks.1.ffn.all.fc1.weight"])
    for name, value in given.items():
        if not any(fnmatchcase(name, pattern) for pattern in TEXT_STAGE):
            assert torch.equal(value, kept[name]), f"{name} is to be frozen"
    assert not torch.equal(given["relative.table"], kept["relative.table"])
    assert pairs.config.vocab_size == texts.config.vocab_size


def test_new_parts_are_fresh_and_named(trained: Path) -> None:
    texts, pairs = (load(trained / name / "model") for name in ("3-texts", "4-pairs"))
    torch.manual_seed(1)
    begun = registry.build(pairs.config)
    found = transfer(texts.model, begun)
    new = {name for name, why in found.report.items() if why == "fresh: new in this stage"}
    assert {name.split(".")[0] for name in new if not name.startswith("blocks.")} == {
        *("pooler", "itm_head", "image_proj", "text_proj", "image_proj_fused", "text_proj_fused"),
        *("logit_scale", "logit_scale_fused"),
    }
    assert all(".ffn.fused." in name for name in new if name.startswith("blocks."))
    same = {name for name, value in texts.model.state_dict().items() if torch.equal(found.state[name], value)}
    assert same == set(texts.model.state_dict())
    assert texts.tokenizer.vocab_size == pairs.tokenizer.vocab_size


def test_finished_stages_are_left_alone(trained: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(train_stages(stages_from(pipeline(data, trained)))) == []
    assert capsys.readouterr().out.count("finished before") == 4
    other = pipeline(data, trained)
    other["stages"]["images"]["seed"] = 3
    with pytest.raises(SettingsError, match=r"stages\.images.*seed"):
        list(train_stages(stages_from(other)))


@pytest.mark.parametrize(("stage", "at"), [("images", 4), ("texts", 2)])  # one when the stage is just at its end
def test_stopped_pipelines_end_bit_identical(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, at: int
) -> None:
    step = Run._train_step

    def stopping(self: Run, batches: Any) -> None:
        step(self, batches)
        if stage in self.recipe.output and self.step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    stages = stages_from(pipeline(data, tmp_path / "stopped"))
    with monkeypatch.context() as patched:
        patched.setattr(Run, "_train_step", stopping)
        results = list(train_stages(stages))
    assert results[-1].stopped == "SIGTERM"
    assert results[-1].step == (at if at == 4 else 3)  # the step under way is finished
    names = list(pipeline(data, tmp_path)["stages"])
    assert len(results) == names.index(stage) + 1
    rest = list(train_stages(stages))
    assert len(rest) == 4 - len(results) + (at < 4)
    assert rest[-1].stopped is None
    for number, name in enumerate(names, 1):
        folder = f"{number}-{name}"
        assert_same(final_state(trained / folder), final_state(tmp_path / "stopped" / folder))


def test_texts_only_data_have_no_pictures(data: Path, tmp_path: Path) -> None:
    stage = stages_from(pipeline(data, tmp_path))[2]
    recipe = fill(stage.recipe, {"model": {"name": "vlmo-tiny"}})
    materials = gather_materials(recipe, None, None, None)
    assert len(materials.records) == 80
    assert all(record.image is None for record in materials.records)
    sample = pair_dataset(recipe, materials).sample(0, 0, 3)
    assert sample.ids
    assert sample.masked is not None
    with pytest.raises(SettingsError, match="reads no texts"):
        gather_materials(fill(recipe, {"model": {"name": "beit-tiny"}}), None, None, None)


def test_command_runs_and_checks_stages(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    recipe = pipeline(data, tmp_path / "run")
    recipe["stages"] = {"texts": recipe["stages"]["texts"]}
    del recipe["stages"]["texts"]["model"]["start"]
    file = tmp_path / "staged.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert main([str(file), "--check"]) == 0
    assert "4 steps" in capsys.readouterr().out
    assert main([str(file), "stages.texts.schedule.steps=3", "shared.log.every=1"]) == 0
    assert (tmp_path / "run" / "1-texts" / "model" / "imglish.json").is_file()
    assert main([str(file), "stages.text.schedule.steps=3"]) == 2
    assert STOPPED == 75


def test_a_stage_that_is_null_is_left_out(data: Path, tmp_path: Path) -> None:
    given = pipeline(data, tmp_path)
    given["stages"] |= {"codes": None, "images": given["stages"]["images"] | {"targets": "elsewhere/model"}}
    stages = stages_from(given)
    assert [Path(stage.recipe.output).name for stage in stages] == ["1-images", "2-texts", "3-pairs"]
    assert (stages[0].recipe.targets, stages[0].needs) == ("elsewhere/model", ())


def test_mistakes_are_named(data: Path, tmp_path: Path) -> None:
    def broken(**changes: Any) -> dict[str, Any]:
        return pipeline(data, tmp_path) | changes

    for given, problem in (
        (broken(batch={"size": 4}), "batch"),
        (broken(stages={}), "at least one"),
        (broken(output=None), "folder"),
        (broken(stages={"a": {"model": {"name": "clip-tiny", "start": "b"}}, "b": {}}), "does not come before"),
        (broken(stages={"a": {"model": {"name": "clip-tiny"}, "output": "x"}}), "output"),
        (broken(stages={"a": {"model": {"name": "clip-tiny"}, "optimizer": {}}}), "stages.a.optimizer"),
        (broken(stages={"a": 3}), "not a group"),
        (broken(stages={"a": None}), "at least one"),
        (broken(stages={"b": None, "a": {"model": {"name": "clip-tiny", "init": "b"}}}), r"stages\.a\.model.*is left"),
    ):
        with pytest.raises(SettingsError, match=problem):
            stages_from(given)
    lines = check_stages(stages_from(pipeline(data, tmp_path)))
    assert "  settings are valid; the rest can be checked when codes is trained" in lines


def test_weights_without_a_place_are_refused() -> None:
    beit, vlmo, clip = (registry.named(name).build() for name in ("beit-tiny", "vlmo-tiny", "clip-tiny"))
    with pytest.raises(ConversionError, match="cannot begin with a clip"):
        transfer(clip, vlmo)
    with pytest.raises(ConversionError, match=r"blocks\.3"):
        transfer(beit, vlmo)  # another number of layers


def test_another_size_of_pictures_and_length_of_texts() -> None:
    base = fill(registry.named("vlmo-tiny"), {"fused_layers": 1})
    for changes in ({}, {"positions": "absolute"}):
        small = fill(base, changes)
        large = fill(small, {"image": {"size": 64}, "max_length": 20})
        source = small.build()
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        found = transfer(source, large.build()).state
        changed = {name for name, value in source.state_dict().items() if not torch.equal(found[name], value)}
        assert changed == ({"positions", "embedding.positions.weight"} if changes else {"relative.table"})
        large.build().load_state_dict(found)


def work(rank: int, settings: dict[str, Any]) -> list[dict[str, float]]:
    """Losses of the last line of each stage's log."""
    results = list(train_stages(stages_from(settings)))
    return [result.events[-2]["losses"] if result.events else {} for result in results]


def test_two_processes_train_the_stages_alike(data: Path, tmp_path: Path) -> None:
    def settings(output: str) -> dict[str, Any]:
        whole = pipeline(data, tmp_path / output)
        del whole["stages"]["codes"], whole["stages"]["images"], whole["stages"]["texts"]["model"]["start"]
        return whole

    alone, (together, nothing) = work(0, settings("one")), run_ranks(2, work, settings("two"))
    assert nothing == [{}, {}]
    assert [set(losses) for losses in alone] == [{"mlm"}, {"itc", "itm", "mlm"}]
    for mine, others in zip(alone, together, strict=True):
        assert others == pytest.approx(mine, rel=1e-3)
