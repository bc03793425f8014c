"""Mistakes in a recipe stop before any work, with a message that names the key and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imglish.bootstrapping.loop import read_loop
from imglish.training.config import plan, read_recipe, recipe_from
from imglish.training.settings import SettingsError, lay_over, read_mapping
from imglish.training.setup import base_config, gather_materials
from imglish.training.stages import Stage, is_pipeline
from imglish.training.trainer import train
from tests.training.support import recipe, records

BASE: dict[str, Any] = {"model": {"name": "clip-tiny"}, "schedule": {"steps": 100, "warmup_steps": 10}}


def changed(*overrides: str) -> dict[str, Any]:
    data: dict[str, Any] = {name: dict(group) for name, group in BASE.items()}
    for override in overrides:
        lay_over(data, override)
    return data


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lrr=1", r"optimiser\.lrr: there is no such setting; did you mean lr\?"),
        ("optimizer.lr=1e-4", r"optimizer: there is no such setting; did you mean optimiser\?"),
        ("data.fold=1", r"data\.fold: there is no such setting; known here: train, images"),
        ("optimiser.lr=fast", r"optimiser\.lr: 'fast' does not fit, expected a number"),
        ("optimiser.lr=0", r"optimiser\.lr: 0\.0 cannot work with AdamW"),
        ("optimiser.lr=3", r"optimiser\.lr: 3\.0 cannot work with AdamW"),
        ("optimiser.betas=[0.9]", r"optimiser\.betas: \[0\.9\] does not fit"),
        ("optimiser.betas=[0.9, 1.5]", r"optimiser\.betas: 1\.5 must lie in 0\.\.1"),
        ("optimiser.weight_decay=-1", r"optimiser\.weight_decay: -1\.0 lies outside 0\.\.1"),
        ("optimiser.clip_norm=0", r"optimiser\.clip_norm: 0\.0 must be above 0"),
        ("batch.size=1", r"batch\.size: 1 lies outside .* contrastive losses need at least two pairs"),
        ("batch.size=3.5", r"batch\.size: 3\.5 does not fit, expected a whole number"),
        ("batch=64", r"batch: 64 is not a group of settings; it may have size, accumulate"),
        ("compute.precision=fp16", r"compute\.precision: 'fp16' does not fit, expected one of \['float32', 'bf16'\]"),
        ("schedule.epochs=3", r"schedule\.epochs: .* both are set"),
        ("schedule.steps=-1", r"schedule\.steps: -1 must be above 0"),
        ("schedule.lr_min=0.01", r"schedule\.lr_min: 0\.01 is above optimiser\.lr"),
        ("data.cache=3", r"data\.cache: 3 is neither true nor false"),
        ("average=1", r"average: 1\.0 lies outside"),
        ("seed=true", r"seed: True is not a number"),
        ("model=clip-tiny", r"model: 'clip-tiny' is not a group of settings"),
        ("model.init=somewhere", r"model: say which model"),
    ],
)
def test_a_wrong_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        recipe_from(changed(override))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "clip-tine"}, r"model\.name: no model is called 'clip-tine'; there are: .*clip-tiny"),
        ({"name": "albef-tiny", "dept": 3}, r"model\.dept: there is no such setting; did you mean depth\?"),
        ({"name": "albef-tiny", "teacher": {"alpha": 2}}, r"model\.teacher: teacher\.alpha is 2\.0"),
        ({"name": "albef-tiny", "teacher": {"queue_size": -4}}, r"model\.teacher: teacher\.queue_size is -4"),
        ({"name": "albef-tiny", "fusion_layer": 9}, r"model: fusion_layer 9 must lie between"),
        (
            {"name": "albef-tiny", "vision": {"image": {"size": "big"}}},
            r"model\.vision\.image\.size: 'big' does not fit",
        ),
        ({"name": "clip-tiny", "loss": "itm"}, r"model\.loss: 'itm' does not fit, expected one of \['itc'"),
        ({"init": "nowhere"}, r"model\.init: there is no model at nowhere"),
    ],
)
def test_a_wrong_model_setting_is_named(model: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        base_config(recipe_from({"model": model}))


def test_values_take_the_annotated_types() -> None:
    made = recipe_from(changed("optimiser.lr=1e-4", "optimiser.betas=[0.8, 0.9]", "data.crop=null", "average=0.5"))
    assert (made.optimiser.lr, made.optimiser.betas, made.data.crop, made.average) == (1e-4, (0.8, 0.9), None, 0.5)
    assert (made.schedule.steps, made.schedule.epochs) == (100, None)
    model = {"name": "albef-tiny", "teacher": {"alpha": "2e-1"}, "vision": {"image": {"mean": [0, 0.5, 1]}}}
    config, _ = base_config(recipe_from({"model": model}))
    assert config.teacher.alpha == 0.2
    assert config.vision.image.mean == (0.0, 0.5, 1.0)
    assert config.vision.image.size == 48


@pytest.mark.parametrize(
    ("overrides", "pairs", "processes", "queue", "message"),
    [
        (["batch.size=64"], 40, 1, 0, r"batch\.size: 64 is larger than the data set of 40 pairs"),
        (["batch.size=10"], 40, 4, 0, r"batch\.size: 10 does not divide into 4 processes .* 8 does"),
        (["batch.size=8", "batch.accumulate=8"], 40, 1, 0, r"batch\.accumulate: 8 parts leave a single pair"),
        (["batch.size=8", "schedule.warmup_steps=100"], 40, 1, 0, r"schedule\.warmup_steps: 100 .* run of 100 steps"),
        (["batch.size=8"], 40, 1, 40, r"model\.teacher\.queue_size: 40, but there are 40 training pairs.* at most 20"),
        (["batch.size=8", "schedule.steps=null", "schedule.epochs=0.01"], 40, 1, 0, r"schedule\.epochs: .* raise it"),
    ],
)
def test_what_cannot_work_on_this_data_is_named(
    overrides: list[str], pairs: int, processes: int, queue: int, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        plan(recipe_from(changed(*overrides)), pairs, processes, queue)


def test_the_plan_counts_whole_batches() -> None:
    settings = changed("batch.size=12", "schedule.steps=null", "schedule.epochs=4.5", "validation.every=0.5")
    found = plan(recipe_from(settings), pairs=40, world_size=2)
    assert (found.steps_per_epoch, found.steps, found.per_rank, found.validate_every) == (3, 14, 6, 2)
    assert [step for step in range(15) if found.validates(step)] == [2, 4, 6, 8, 10, 12, 14]


def test_recipe_files(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: {name: clip-tiny}\nschedule:\n  epochs: 2\n")
    assert read_recipe(path, ["schedule.epochs=3", "data.split=train"]).schedule.epochs == 3
    for text, message in [("- 1\n", "must hold a mapping"), ("a: [\n", "is not YAML"), ("", "names no model")]:
        path.write_text(text)
        with pytest.raises(SettingsError, match=message):
            read_recipe(path)
    with pytest.raises(SettingsError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match="is not an override: write key=value"):
        lay_over({}, "lr")
    with pytest.raises(SettingsError, match=r"optimiser\.lr\.x: optimiser\.lr is 3, it has no settings inside"):
        lay_over({"optimiser": {"lr": 3}}, "optimiser.lr.x=1")
    path.write_text("a: &one {b: {c: 1}}\nd: *one\n")  # an override of one place leaves the other alone
    assert read_mapping(path, ["d.b.c=2"]) == {"a": {"b": {"c": 1}}, "d": {"b": {"c": 2}}}


def test_wrong_data_and_tokenizers_are_named(tmp_path: Path) -> None:
    missing = recipe(tmp_path, "clip", data={"train": str(tmp_path / "none.jsonl")})
    with pytest.raises(SettingsError, match=r"data\.train: "):
        gather_materials(missing, None, None, None)
    with pytest.raises(SettingsError, match=r"data\.train: names no data"):
        gather_materials(recipe(tmp_path, "clip"), None, None, None)
    with pytest.raises(SettingsError, match=r"tokenizer\.load: "):
        gather_materials(recipe(tmp_path, "clip", tokenizer={"load": "none.json"}), records(), None, None)
    vocabulary = recipe(tmp_path, "clip", model={"vocab_size": 7})
    with pytest.raises(SettingsError, match=r"model\.vocab_size: 7, but the tokenizer has \d+ tokens"):
        gather_materials(vocabulary, records(), None, None)
    with pytest.raises(SettingsError, match=r"data: swapped captions are wanted"):
        train(recipe(tmp_path, "albef", data={"swapped": True}), records())
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_the_recipes_of_the_project_can_run(path: Path) -> None:
    steps = read_loop(path) if is_pipeline(path) else []
    parts = [step.recipe for step in steps if isinstance(step, Stage)] if steps else [read_recipe(path)]
    for made in parts:
        if "init" in made.model:
            continue  # begins as another stage ends
        config, _ = base_config(made)
        queue = getattr(getattr(config, "teacher", None), "queue_size", 0)
        pairs = 6000 if path.name.startswith("flickr8k-") else 14_000_000
        assert plan(made, pairs, queue_size=queue).steps > made.schedule.warmup_steps
