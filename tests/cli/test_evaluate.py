from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imglish.checkpoints import native
from imglish.cli import main
from imglish.data.tokenizers import Tokenizer
from imglish.models import registry

WORDS = ["a red hat", "two blue shoes", "黑色上衣", "a bag on a chair", "a dog", "snow and a <b>house</b>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two exported models, eight pictures with two captions each, of two splits."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = Tokenizer.train_wordpiece(WORDS, 90, max_length=16)
    for name in ("albef-tiny", "clip-tiny"):
        torch.manual_seed(0)
        model = registry.build(dataclasses.replace(registry.named(name), vocab_size=tokenizer.vocab_size))
        native.export(folder / name, model, tokenizer)
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    lines = []
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
        captions = [WORDS[i % 6], f"{WORDS[(i + 1) % 6]} and {WORDS[i % 6]}"]
        split = "val" if i < 6 else "train"
        lines.append(json.dumps({"image": f"{i}.png", "captions": captions, "split": split, "group": f"g{i // 3}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _arguments(folder: Path, model: str = "albef-tiny") -> list[str]:
    return [
        *("eval", "retrieval", "--model", str(folder / model), "--data", str(folder / "captions.jsonl")),
        *("--images", str(folder / "photos"), "--split", "val", "--device", "cpu"),
    ]


def test_a_place_for_results_that_cannot_be_written_is_said_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "captions.jsonl"
    assert main([*_arguments(folder), "--out", str(file / "out")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"imglish eval: cannot write to {file / 'out'}: {file} is not a folder\n"


def test_tables_json_and_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_arguments(folder), "--rerank", "4", "--sweep", "1,2", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "6 pictures, 12 captions" in printed
    assert "reranked, first 4" in printed
    assert "reranked, first 2" in printed
    assert "image→image" in printed
    assert "note: R@10 over 6 candidates is R@6, always 100 %" in printed
    held = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert held["rerank"] == 4
    assert set(held["sweep"]) == {"1", "2"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Most confident mistakes" in page
    assert page.count("data:image/png") > 20
    assert "&lt;b&gt;house" in page
    assert "<b>house" not in page


def test_a_model_of_towers_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_arguments(folder, "clip-tiny"), "--out", str(tmp_path)]) == 0
    assert "reranked" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (["--model", "nowhere"], "there is no model at nowhere"),
        (["--data", "nothing.jsonl"], "nothing.jsonl"),
        (["--split", "test"], 'no row has split "test" (there are: train, val)'),
        (["--images", "no-folder"], "no-folder does not exist"),
        (["--rerank", "-3"], "rerank is -3"),
        (["--batch", "0"], "image_block is 0"),
        (["--captions", "title"], "no caption in 'title'"),
        (["--device", "gpu9"], "'gpu9' is not a device"),
    ],
)
def test_bad_input_has_a_message_and_status_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    assert main([*_arguments(folder), "--out", str(tmp_path / "out"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_broken_picture_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    (tmp_path / "c.jsonl").write_text('{"image": "0.png", "caption": "a dog"}')
    arguments = [*_arguments(folder), "--data", str(tmp_path / "c.jsonl"), "--images", str(tmp_path)]
    arguments = [a for a in arguments if a not in ("--split", "val")]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert "0.png" in capsys.readouterr().err


def test_two_processes_of_torchrun_give_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    arguments = [*_arguments(folder), "--batch", "2", "--out"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, "-m", "imglish", *arguments, str(tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True, env={**_environment(), "OMP_NUM_THREADS": "1"})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun has it for more than one process: sums depend on it in the last digit
    try:
        assert main([*arguments, str(tmp_path / "one")]) == 0
    finally:
        torch.set_num_threads(threads)
    one, two = (json.loads((tmp_path / name / "retrieval.json").read_text()) for name in ("one", "two"))
    assert one | {"seconds": None} == two | {"seconds": None}


def _environment() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}


def test_captions_are_cleaned_as_the_model_was_trained(folder: Path, tmp_path: Path) -> None:
    """The report shows the captions that were encoded; an option replaces what the checkpoint says."""
    loaded = native.load(folder / "clip-tiny")
    meta = {"recipe": {"data": {"clean": "albef", "max_words": 3}}}
    native.export(tmp_path / "model", loaded.model, loaded.tokenizer, meta)
    seen = {}
    for style in ([], ["--clean", "none"], ["--max-words", "2"]):
        arguments = [*_arguments(folder, "clip-tiny"), "--rerank", "0", "--out", str(tmp_path / "out"), *style]
        arguments[arguments.index("--model") + 1] = str(tmp_path / "model")
        assert main(arguments) == 0
        page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        seen["".join(style)] = "blue shoes and" in page, "two blue shoes" in page
    assert seen == {"": (False, True), "--cleannone": (True, True), "--max-words2": (False, False)}
