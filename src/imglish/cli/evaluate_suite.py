"""`imglish eval suite`: several evaluations in one go, one table."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Several evaluations in one go, from a YAML file:

  shared: {model: runs/mine/model, batch: 32}     # options of all
  tasks:
    daquar: {task: vqa, data: daquar/vqa.jsonl, held-out: 0.15}
    pairs: {task: retrieval, data: captions.jsonl, split: val}

Every entry has the options of `imglish eval TASK`. Writes a folder an entry, suite.json and report.html (one table)
to --out. What is finished is not measured again: the same command continues.
"""


def add_job(jobs: Any) -> None:
    """Add ``imglish eval suite`` to the jobs."""
    parser = jobs.add_parser(
        "suite",
        help="several evaluations in one go, from a YAML file",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", help="YAML file")
    parser.add_argument("--out", default="eval-out", help="folder of the results (default: eval-out)")


def suite(arguments: argparse.Namespace, parse: Callable[[Sequence[str]], Any], jobs: Mapping[str, Any]) -> int:
    """Measure all entries; parse, jobs: of `imglish eval`. Status: the first that is not 0."""
    from imglish.evaluation.retrieval import text_table
    from imglish.objectives.gather import rank
    from imglish.training.ranks import pick_device, process_group

    out = Path(arguments.out)
    entries = {name: _options(name, entry, out) for name, entry in _entries(Path(arguments.suite)).items()}
    asked = {name: _asked(parse, name, options) for name, options in entries.items()}  # a mistake shows before any work
    with process_group(pick_device(None)):
        for name, each in asked.items():
            if _finished(out / name, entries[name]):
                continue
            if rank() == 0:
                print(f"--- {name}", flush=True)
            status: int = jobs[each.job](each)
            if status:
                return status
            if rank() == 0:
                (out / name / "options.json").write_text(json.dumps(entries[name]) + "\n", encoding="utf-8")
        first = rank() == 0
    if first:
        results = {
            name: json.loads((out / name / f"{each.job}.json").read_text(encoding="utf-8"))
            for name, each in asked.items()
        }
        headers = ["entry", "task", "measure", "value"]
        rows = [
            [name, asked[name].job, measure, f"{value:.2f}"]
            for name, result in results.items()
            for measure, value in _measures(result).items()
        ]
        print(text_table(headers, rows))
        (out / "suite.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"report: {_page(headers, rows, asked).save(out / 'report.html')}")
    return 0


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    from imglish.training.settings import SettingsError, read_mapping

    held = read_mapping(path)
    if unknown := sorted(set(held) - {"shared", "tasks"}):
        raise SettingsError(unknown[0], f"{path} has tasks and shared; settings belong into those")
    tasks, shared = held.get("tasks"), held.get("shared") or {}
    if not isinstance(tasks, dict) or not tasks or not isinstance(shared, dict):
        raise SettingsError(
            "tasks", f"{path} names no evaluation: tasks: {{mine: {{task: vqa, model: ..., data: ...}}}}"
        )
    for name, entry in tasks.items():
        if not isinstance(entry, dict) or "task" not in entry:
            raise SettingsError(f"tasks.{name}", "an entry needs a task and its options: {task: vqa, model: ...}")
        if {"out", "task"} & set(shared) or "out" in entry or "/" in str(name) or str(name).startswith("."):
            raise SettingsError(f"tasks.{name}", "every entry has a task of its own, and a folder by its name")
    return {str(name): {**shared, **entry} for name, entry in tasks.items()}


def _options(name: str, entry: Mapping[str, Any], out: Path) -> list[str]:
    """An entry as the words of a command line."""
    words = [str(entry["task"])]
    for key, value in entry.items():
        if key == "task" or value is None or value is False:
            continue
        given = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{key}"] if value is True else [f"--{key}", given]
    return [*words, "--out", str(out / name)]


def _asked(parse: Callable[[Sequence[str]], Any], name: str, options: list[str]) -> Any:
    """The options as `imglish eval` understands them; what it does not is said of the entry."""
    from imglish.training.settings import SettingsError

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(options)
    except SystemExit as error:
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise SettingsError(f"tasks.{name}", f"{reason}; see imglish eval {options[0]} --help") from error


def _finished(folder: Path, options: list[str]) -> bool:
    file = folder / "options.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")) == options


def _measures(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a result: those of its groups of metrics, or its own."""
    groups = {name: value for name, value in result.items() if name in ("metrics", "towers", "reranked") and value}
    if not groups:
        groups = {"": {name: value for name, value in result.items() if isinstance(value, float) and name != "seconds"}}
    return {
        f"{group}: {name}" if group in ("towers", "reranked") else name: float(value)
        for group, values in groups.items()
        for name, value in values.items()
        if isinstance(value, (int, float))
    }


def _page(headers: list[str], rows: list[list[str]], asked: Mapping[str, Any]) -> Any:
    from imglish.report import Report

    report = Report("Evaluations", f"{len(asked)} in one go")
    report.table(headers, rows, "mostly percent; each page says of what")
    report.facts({name: f"{name}/report.html, {each.model} on {each.data}" for name, each in asked.items()})
    return report
