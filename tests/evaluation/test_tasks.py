"""Tasks measured: scores, predictions on disk, the page, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imglish.checkpoints import native
from imglish.cli import main
from imglish.data.errors import DataError, Errors, Problem
from imglish.data.tasks import TaskData
from imglish.data.tasks.examples import Example
from imglish.data.tokenizers import Tokenizer
from imglish.evaluation.encoding import Machine
from imglish.evaluation.exchanging import exchanged
from imglish.evaluation.tasks import TASKS
from imglish.evaluation.tasks.run import evaluate_task
from imglish.models.heads import HeadConfig, with_head
from tests.models.test_heads import base

QUIET = Machine(image_block=4, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen questions on seven pictures, a model that chooses among three answers, and one that writes."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "images").mkdir()
    entries: list[dict[str, Any]] = []
    for number in range(13):
        Image.effect_noise((30, 20), 20 + 30 * (number % 7)).convert("RGB").save(
            folder / "images" / f"{number % 7}.png"
        )
        answers = [["yes"], ["no"], ["a boat", "yes"]][number % 3]
        entries.append({"image": f"{number % 7}.png", "question": f"is it {number} ?", "answers": answers})
    (folder / "vqa.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.train_wordpiece([entry["question"] for entry in entries], 60, max_length=16)
    for form in ("classes", "answers"):
        head = HeadConfig("vqa", form, ("yes", "no", "green"), soft=form == "classes", start=tokenizer.cls_id)  # type: ignore[arg-type]
        model = with_head(base("albef", vocab_size=tokenizer.vocab_size), head).eval()
        native.export(folder / form, model, tokenizer)
    return folder


def command(folder: Path, out: Path, form: str = "classes") -> list[str]:
    data = ["--data", str(folder / "vqa.jsonl"), "--device", "cpu", "--out", str(out)]
    return ["eval", "vqa", "--model", str(folder / form), *data]


def result(out: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((out / "vqa.json").read_text(encoding="utf-8"))
    return held | {"seconds": None}


def said(out: Path) -> dict[str, Any]:
    lines = [json.loads(line) for path in out.glob("predictions*.jsonl") for line in path.read_text().splitlines()]
    return {line["key"]: line["answers"] for line in lines if "key" in line}


def test_the_answer_of_a_single_person_is_right_or_wrong() -> None:
    examples = [
        Example("a", "", (), "", ("The dog.",)),
        Example("b", "", (), "", ("cat", "two")),
        Example("c", "", (), "", ("red",)),
    ]
    scores = TASKS["vqa"].score(examples, {"a": "dog", "b": "2", "c": "blue"})
    assert scores.metrics["accuracy"] == pytest.approx(200 / 3)
    assert scores.groups == {"with one answer": 50, "with several": 100}
    ten = [Example("a", "", (), "", ("yes",) * 3 + ("no",) * 7)]
    assert TASKS["vqa"].score(ten, {"a": "yes"}).metrics["accuracy"] == pytest.approx(90)


def test_consistency_counts_sentences() -> None:
    examples = [Example(f"{n}-0", "", (), f"sentence {n // 2}", ("true",)) for n in range(4)]
    scores = TASKS["nlvr2"].score(examples, {"0-0": "true", "1-0": "true", "2-0": "true", "3-0": "false"})
    assert scores.metrics == {"accuracy": 75, "consistency": 50}
    assert scores.notes == ("2 sentences, by text",)


@pytest.mark.parametrize("form", ["classes", "answers"])
def test_results_do_not_depend_on_the_batch(folder: Path, tmp_path: Path, form: str) -> None:
    for batch in ("1", "5", "64"):
        assert main([*command(folder, tmp_path / batch, form), "--batch", batch]) == 0
    one, five, all_of_them = (result(tmp_path / batch) for batch in ("1", "5", "64"))
    assert one == five == all_of_them
    assert one["examples"] == 13
    assert one["constant"][0] == "yes"
    assert one["unreachable"] == 0
    page = (tmp_path / "5" / "report.html").read_text(encoding="utf-8")
    assert "Most confident mistakes" in page


def test_answers_are_continued_where_a_kill_cut_them_off(folder: Path, tmp_path: Path) -> None:
    assert main(command(folder, tmp_path)) == 0
    whole, answers = result(tmp_path), said(tmp_path)
    file = tmp_path / "predictions.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    changed = lines[2].replace('"key"', '"note": "kept", "key"')
    file.write_text("".join([*lines[:2], changed, lines[3][:9]]), encoding="utf-8")
    assert main(command(folder, tmp_path)) == 0
    assert "kept" in file.read_text(encoding="utf-8")  # what was there has not been made anew
    assert said(tmp_path).keys() == answers.keys()
    assert result(tmp_path) == whole


def test_answers_of_another_evaluation_are_not_taken(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, tmp_path)) == 0
    for other in (command(folder, tmp_path, "answers"), [*command(folder, tmp_path), "--limit", "5"]):
        assert main(other) == 2
        assert "holds answers of another model or to other examples" in capsys.readouterr().err


def test_two_processes_give_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    held = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "imglish"]
        words = [sys.executable, *launch, *command(folder, out), "--batch", "3"]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun sets for two: their number is in the last bits
        subprocess.run(words, check=True, capture_output=True, env=one_thread)
        held.append((result(out), said(out)))
    assert held[0] == held[1]
    assert (tmp_path / "2" / "predictions.1.jsonl").is_file()


def test_a_broken_picture_is_left_out_and_counted(folder: Path, tmp_path: Path) -> None:
    loaded = native.load(folder / "classes")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"no picture")
    for number in range(1, 7):
        (tmp_path / "images" / f"{number}.png").write_bytes((folder / "images" / f"{number}.png").read_bytes())
    data = TaskData(folder / "vqa.jsonl", tmp_path / "images")
    examples = TASKS["vqa"].read(data, Errors())
    errors = Errors(0.5, quiet=True)
    errors.extend(Problem(f"vqa.jsonl:{n}", "wrong layout", "") for n in range(20, 30))  # of other examples
    found = evaluate_task(loaded.model, loaded.tokenizer, TASKS["vqa"], examples, QUIET, errors=errors)
    assert found.examples == 11
    assert len(errors) == 12
    assert any("2 examples are left out" in note for note in found.notes)
    with pytest.raises(DataError, match="2 of 13"):
        evaluate_task(loaded.model, loaded.tokenizer, TASKS["vqa"], examples, QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nothing.jsonl"], "nothing.jsonl cannot be read"),
        (["--model", "nowhere"], "there is no model at nowhere"),
        (["--variant", "kind"], "variant='kind': choose one of"),
    ],
)
def test_bad_input(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    ten = {"image": "0.png", "question": "is it ?", "answers": ["yes"] * 10}
    (tmp_path / "ten.jsonl").write_text(json.dumps(ten))
    arguments = [
        *command(folder, tmp_path / "out"),
        "--data",
        str(tmp_path / "ten.jsonl"),
        "--images",
        str(folder / "images"),
    ]
    assert main([*arguments, *change]) == 2
    assert message in capsys.readouterr().err


def test_models_without_the_head_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = native.load(folder / "classes")
    native.export(tmp_path / "plain", loaded.model.inner.albef, loaded.tokenizer)  # type: ignore[union-attr, arg-type]
    words = command(folder, tmp_path / "out")
    words[words.index("--model") + 1] = str(tmp_path / "plain")
    assert main(words) == 2
    assert "has no head for vqa: imglish finetune puts one on models of albef, beit3, blip" in capsys.readouterr().err
    words = [word if word != "vqa" else "entailment" for word in command(folder, tmp_path / "out")]
    assert main(words) == 2
    assert "has a head for vqa, not for entailment" in capsys.readouterr().err


def test_exchanged_pictures_are_those_of_other_questions(folder: Path, tmp_path: Path) -> None:
    assert exchanged("aabcad") == list("ccdacb")
    assert exchanged("abcd", 0.25) == exchanged("abcd", 0.01) == list("bcda")
    assert exchanged("abc", 0.99) == list("cab")
    with pytest.raises(ValueError, match="all texts show the same"):
        exchanged(["a", "a"])
    with pytest.raises(ValueError, match="between 0 and 1"):
        exchanged(["a", "b"], 1)
    lines = [json.loads(line) for line in (folder / "vqa.jsonl").read_text(encoding="utf-8").splitlines()]
    for line, image in zip(lines, exchanged([line["image"] for line in lines]), strict=True):
        line["image"] = image
    (tmp_path / "vqa.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    by_hand = [
        *command(folder, tmp_path / "hand"),
        "--data",
        str(tmp_path / "vqa.jsonl"),
        "--images",
        str(folder / "images"),
    ]
    assert main(by_hand) == 0
    assert main([*command(folder, tmp_path / "control"), "--exchange-pictures"]) == 0
    assert said(tmp_path / "control") == said(tmp_path / "hand")
    assert main(command(folder, tmp_path / "own")) == 0
    assert said(tmp_path / "own") != said(tmp_path / "hand")
    assert "control: every text has the pictures of another one" in (tmp_path / "control" / "vqa.json").read_text()


def test_a_suite_is_one_table_and_continues(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "suite.yaml"
    shared = f"shared: {{data: {folder / 'vqa.jsonl'}, device: cpu, batch: 8}}\n"
    rows = "".join(f"  {form}: {{task: vqa, model: {folder / form}}}\n" for form in ("classes", "answers"))
    suite.write_text(shared + "tasks:\n" + rows)
    assert main(["eval", "suite", str(suite), "--out", str(tmp_path / "out")]) == 0
    held = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert set(held) == {"classes", "answers"}
    printed = capsys.readouterr().out
    assert "--- classes" in printed
    assert main(["eval", "suite", str(suite), "--out", str(tmp_path / "out")]) == 0
    assert "--- classes" not in capsys.readouterr().out
    suite.write_text("tasks:\n  mine: {model: x}\n")
    assert main(["eval", "suite", str(suite), "--out", str(tmp_path / "out")]) == 2
    assert "tasks.mine: an entry needs a task" in capsys.readouterr().err
    suite.write_text("tasks:\n  mine: {task: vqa, model: x, data: y, colour: 3}\n")
    assert main(["eval", "suite", str(suite), "--out", str(tmp_path / "out")]) == 2
    assert "tasks.mine: unrecognized arguments: --colour 3; see imglish eval vqa --help" in capsys.readouterr().err
