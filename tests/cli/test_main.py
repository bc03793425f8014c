"""The command: quick help, exit status, messages without tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from imglish import __version__
from imglish.cli import COMMANDS, main
from imglish.training.journal import Journal
from tests.training.support import recipe, records


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from imglish.cli import main; status = main(['--help']); "
        "heavy = {'torch', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules); assert not heavy, heavy; sys.exit(status)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in found.stdout for command in COMMANDS)


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "there is no command 'trian'" in capsys.readouterr().err


def test_ctrl_c_ends_a_command_with_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("imglish.cli.models.main", stopped)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "imglish models: stopped\n"


def test_output_that_nobody_reads_any_more_ends_a_command_without_a_word() -> None:
    code = (
        "import imglish.cli.models as models; from imglish.cli import main; "
        "models.main = lambda _: print('line\\n' * 100_000); raise SystemExit(main(['models']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() == 141
    process.stderr.close()


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe whose data are files."""
    (tmp_path / "images").mkdir()
    lines = []
    for record in records():
        assert isinstance(record.image, bytes)
        (tmp_path / "images" / f"{record.key}.png").write_bytes(record.image)
        lines.append(json.dumps({"image": f"{record.key}.png", "captions": record.captions, "split": "train"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    data = recipe(tmp_path / "run", "clip").to_dict()
    data["data"] |= {"train": str(tmp_path / "captions.jsonl"), "images": str(tmp_path / "images"), "split": "train"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_train(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = recipe_file.parent / "run"
    assert main(["train", str(recipe_file), "--check"]) == 0
    assert "48 training pairs" in capsys.readouterr().out
    assert not output.exists()
    assert main(["train", str(recipe_file), "schedule.steps=6", "optimiser.lr=1e-3"]) == 0
    assert f"model: {output / 'model'}" in capsys.readouterr().out
    assert yaml.safe_load((output / "recipe.yaml").read_text())["optimiser"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimiser.lr=9"], "imglish train: optimiser.lr: 9.0 cannot work"),
        (["schedule.steps=2"], "imglish train: schedule.warmup_steps: 2 steps of warm-up do not fit"),
        (["data.split=test"], "imglish train: data.train: "),
        (["compute.device=tpu9x"], "imglish train: compute.device: 'tpu9x' is not a device"),
    ],
)
def test_mistakes_end_with_status_2(
    recipe_file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe_file), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (recipe_file.parent / "run" / "checkpoints").exists()


@pytest.mark.parametrize("more", [[], ["--check"]])
def test_an_output_that_cannot_be_written_is_said_before_any_work(
    recipe_file: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file.parent / "captions.jsonl"
    assert main(["train", str(recipe_file), f"output={file / 'run'}", "data.train=nowhere", *more]) == 2
    assert f"imglish train: output: cannot write to {file / 'run'}: {file} is not a folder" in capsys.readouterr().err


def test_a_disk_that_fails_in_a_run_ends_it_with_a_message(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "log.jsonl")

    monkeypatch.setattr(Journal, "write", full)
    assert main(["train", str(recipe_file), "schedule.steps=6"]) == 1
    assert "imglish train: [Errno 28] No space left on device: 'log.jsonl'" in capsys.readouterr().err
