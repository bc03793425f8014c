"""Fine-tuning for tasks by the trainer of pre-training: what is learned, held out, resumed, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from imglish.checkpoints import native
from imglish.cli import main
from imglish.data.tokenizers import Tokenizer
from imglish.models import registry
from imglish.models.heads import TaskModel
from imglish.training.config import Recipe, recipe_from
from imglish.training.optim import build_optimiser
from imglish.training.settings import SettingsError
from imglish.training.trainer import check, train, work_of
from tests.training.support import COLOURS, assert_same, final_state, recipe, records


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions for the colour of drawn things, and statements about two of them."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "images").mkdir()
    questions, statements, hypotheses = [], [], []
    for number, record in enumerate(records(48)):
        assert isinstance(record.image, bytes)
        (folder / "images" / f"{number}.png").write_bytes(record.image)
        colour = list(COLOURS)[number % 4]
        name, other = f"{number}.png", f"{(number + 1) % 48}.png"
        questions.append({"image": name, "question": "what colour ?", "answers": [colour]})
        claim = list(COLOURS)[(number + number // 24) % 4]
        label = "entailment" if claim == colour else "contradiction"
        hypotheses.append({"image": name, "sentence2": f"it is {claim}", "gold_label": label})
        statements.append({"images": [name, other], "sentence": f"the left is {claim}", "label": claim == colour})
    shown = [{"image": entry["image"], "label": entry["answers"][0]} for entry in questions]
    kinds = {"vqa": questions, "nlvr2": statements, "entailment": hypotheses, "classification": shown}
    for name, entries in kinds.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return folder


def tuning(output: Path | str, folder: Path, kind: str = "vqa", family: str = "albef", **groups: Any) -> Recipe:
    base: dict[str, Any] = {
        "task": {"name": kind},
        "data": {"train": str(folder / f"{kind}.jsonl"), "crop": None},
        "optimiser": {"lr": 3e-3},
    }
    for name, group in groups.items():
        base[name] = base[name] | group if name in base else group
    return recipe(output, family, **base)


def test_colours_are_learned_and_measured_on_pictures_that_were_held_out(data: Path, tmp_path: Path) -> None:
    settings = tuning(tmp_path, data, schedule={"steps": 90}, task={"name": "vqa", "hold_out": 0.25})
    work = work_of(settings)
    held = {example.shows for example in work.held_out}  # type: ignore[attr-defined]
    assert held
    assert not held & {example.shows for example in work.dataset.examples}  # type: ignore[attr-defined]
    result = train(settings)
    assert result.best["metrics"]["accuracy"] > 80
    validations = [event for event in result.events if event["event"] == "validation"]
    assert {"metrics", "groups", "constant"} <= set(validations[-1])
    assert result.model is not None
    loaded = native.load(result.model)
    assert isinstance(loaded.model, TaskModel)
    assert sorted(loaded.model.head.classes) == sorted(COLOURS)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Visual question answering: validation" in page
    assert "Best: right and sure" in page


@pytest.mark.parametrize(
    ("task", "family", "more"),
    [
        ("vqa", "blip", {"head": "answers"}),
        ("vqa", "albef", {"head": "answers", "alpha": 0.4}),
        ("nlvr2", "vilt", {}),
        ("nlvr2", "albef", {"alpha": 0.4}),
        ("entailment", "vlmo", {}),
    ],
)
def test_every_task_trains_and_validates(data: Path, tmp_path: Path, task: str, family: str, more: Any) -> None:
    sep = {"vocab_size": 90, "append_sep": family in ("blip", "vilt")}
    wanted = {"name": task, "hold_out": 0.25, **more}
    result = train(tuning(tmp_path, data, task, family, task=wanted, tokenizer=sep, schedule={"steps": 5}))
    assert "accuracy" in result.best["metrics"]
    assert result.model is not None
    assert native.load(result.model).model.head.task == task  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["beit", "beit3"])
def test_pictures_are_classified_without_a_word(data: Path, tmp_path: Path, family: str) -> None:
    """From a pre-trained model at another resolution; no tokenizer is trained, kept or asked for."""
    base = registry.named(f"{family}-tiny").build()
    words = None if family == "beit" else Tokenizer.train_wordpiece(["a b"], base.config.vocab_size, max_length=8)
    if words is not None:
        base = replace(base.config, vocab_size=words.vocab_size).build()
    start = native.export(tmp_path / "start", base, words)
    task = {"name": "classification", "hold_out": 0.25, "smoothing": 0.1}
    model = {"init": str(start), "image": {"size": 32}}
    settings = tuning(tmp_path / "run", data, "classification", task=task, schedule={"steps": 40}).to_dict()
    result = train(recipe_from(settings | {"model": model}))
    assert result.best["metrics"]["accuracy"] > 80
    assert result.best["metrics"]["mean recall"] > 80
    assert result.model is not None
    loaded = native.load(result.model)
    assert loaded.words is None
    assert loaded.config.image.size == 32
    head = loaded.model.head  # type: ignore[union-attr]
    assert head.classes == tuple(sorted(COLOURS))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Classes of pictures: validation" in page
    more = {"output": str(tmp_path / "more"), "model": {"init": str(result.model), "image": {"size": 16}}}
    again = train(recipe_from(settings | more))  # from a model with a head, at one more resolution
    assert again.best["metrics"]["accuracy"] > 80
    assert native.load(str(again.model)).config.image.size == 16
    with pytest.raises(SettingsError, match=r"model\.init: it has a head for classification: start from a model"):
        train(replace(recipe(tmp_path / "pairs"), model={"init": str(result.model)}), records())


def test_validation_with_other_classes_is_refused_at_once(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"label": "grey", "image": "x.png"}))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes((data / "images" / "0.png").read_bytes())
    settings = tuning(tmp_path / "run", data, "classification", validation={"data": str(other)}).to_dict()
    with pytest.raises(
        SettingsError, match=r"validation\.data: no example has an answer .* are blue, green, red, \.\.\."
    ):
        check(recipe_from(settings | {"model": {"name": "beit-tiny"}}))


def test_a_stopped_run_ends_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    task = {"name": "vqa", "alpha": 0.0}
    whole, broken = (
        tuning(tmp_path / name, data, task=task, average=0.9, schedule={"steps": 8}) for name in ("whole", "broken")
    )
    train(whole)
    train(broken)
    for path in sorted((tmp_path / "broken" / "checkpoints").glob("*.pt"))[1:]:
        path.unlink()
    train(broken)
    assert_same(final_state(whole.output), final_state(broken.output))


def test_parts_add_up_to_the_gradient_of_the_whole_batch(data: Path, tmp_path: Path) -> None:
    states = []
    for parts in (1, 4):
        settings = tuning(
            tmp_path / str(parts), data, batch={"accumulate": parts}, schedule={"steps": 2, "warmup_steps": 0}
        )
        train(settings)
        states.append(final_state(settings.output))
    for name, value in states[0].items():
        if name.startswith("/model"):
            torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=2e-4)


def test_fine_tuning_begins_with_the_pre_trained_weights_and_the_head_learns_faster(data: Path, tmp_path: Path) -> None:
    first = train(recipe(tmp_path / "pre"), records())
    init = {"init": str(first.model)}
    settings = tuning(tmp_path / "fine", data).to_dict() | {"model": init}
    wanted = recipe_from(settings | {"optimiser": settings["optimiser"] | {"head_factor": 10, "layer_decay": 0.5}})
    model = work_of(wanted).new_model()
    pre = native.load(str(first.model)).model.state_dict()
    for name, value in pre.items():
        assert torch.equal(value, model.state_dict()[f"inner.albef.{name}"]), name
    heads = {id(dict(model.named_parameters())[name]) for name in model.head_parameters()}  # type: ignore[operator]
    for group in build_optimiser(model, wanted.optimiser).param_groups:
        of_head = [id(p) in heads for p in group["params"]]
        assert all(of_head) or not any(of_head)
        assert (group["scale"] == 10) == all(of_head)
    with pytest.raises(SettingsError, match="only the head of a task"):
        build_optimiser(native.load(str(first.model)).model, wanted.optimiser)


def test_text_assignment_comes_before_nlvr2(data: Path, tmp_path: Path) -> None:
    first = train(recipe(tmp_path / "pairs", task={"name": "text_assignment"}, schedule={"steps": 4}), records())
    settings = tuning(tmp_path / "fine", data, "nlvr2", schedule={"steps": 2, "warmup_steps": 0}).to_dict()
    result = train(recipe_from(settings | {"model": {"init": str(first.model)}}))
    assert native.load(str(result.model)).model.head.task == "nlvr2"  # type: ignore[union-attr]
    start = {"model": {"init": str(first.model)}}
    for task in (None, "text_assignment"):
        with pytest.raises(SettingsError, match="it has a head for text_assignment: start from a model without one"):
            train(replace(recipe(tmp_path / "again", task={"name": task}), **start), records())
    with pytest.raises(SettingsError, match="text assignment prepares a choice about 2 pictures"):
        check(replace(tuning(tmp_path / "questions", data), **start))
    with pytest.raises(SettingsError, match="judged by the NLVR2"):
        train(recipe(tmp_path / "x", task={"name": "text_assignment"}), records(), records())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"validation": {"data": "vqa.jsonl", "split": "test"}}, "validation.split: 'test': the best model is chosen"),
        ({"validation": {"data": "SAME"}}, "48 of its pictures are training pictures too"),
        ({"validation": {"data": "SAME"}, "task": {"name": "vqa", "hold_out": 0.2}}, "give one of the two"),
        ({"task": {"name": "vqa", "answers": "none.json"}}, "task.answers: none.json cannot be read"),
        ({"task": {"name": "riddles"}}, "task.name: 'riddles' does not fit"),
        ({"task": {"name": "vqa", "head": "answers"}, "family": "vilt"}, "Families that have: albef, blip"),
        ({"task": {"name": "vqa"}, "family": "clip"}, "the family clip has none"),
        ({"data": {"train": None}}, "data.train: names no data"),
        ({"data": {"train": "nothing.jsonl"}}, "data.train: nothing.jsonl cannot be read"),
    ],
)
def test_settings_that_cannot_work(data: Path, tmp_path: Path, groups: dict[str, Any], message: str) -> None:
    groups = json.loads(json.dumps(groups).replace("SAME", str(data / "vqa.jsonl")))
    sep = {"vocab_size": 90, "append_sep": True}
    with pytest.raises(SettingsError, match=message):
        check(tuning(tmp_path, data, family=groups.pop("family", "albef"), tokenizer=sep, **groups))


def test_answers_that_nobody_knows_are_left_out_and_counted(data: Path, tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text(json.dumps({"blue": 1, "red": 0}))
    work = work_of(tuning(tmp_path, data, task={"name": "vqa", "answers": str(tmp_path / "answers.json")}))
    assert work.items == 24
    assert work.head.classes == ("red", "blue")  # type: ignore[attr-defined]
    assert "24 of 48 training examples have none of the 2 answers" in work.told()


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tuning(tmp_path / "run", data, schedule={"steps": 2, "warmup_steps": 0}).to_dict()))
    assert main(["finetune", str(path), "--check", "batch.size=4"]) == 0
    assert "48 training examples, 0 held out, 4 answers" in capsys.readouterr().out
    assert main(["finetune", str(path)]) == 0
    assert main(["finetune", str(path), "task.hold_out=2"]) == 2
    assert "imglish finetune: task.hold_out" in capsys.readouterr().err
