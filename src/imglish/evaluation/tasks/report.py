"""Pages of a task: tables, the best, the worst and the most confident mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from imglish.data.images import decode
from imglish.data.tasks.examples import Example
from imglish.evaluation.tasks.base import Task
from imglish.evaluation.tasks.run import Said, TaskResult
from imglish.report import Report, Shown

SHOWN = 12
SIDE = 200


def task_report(result: TaskResult, examples: Sequence[Example], title: str, facts: Mapping[str, object]) -> Report:
    """A report of ``result``, which was measured on ``examples``."""
    report = Report(title, f"{result.examples} examples")
    report.facts(facts)
    return add_task(report, result, examples)


def add_task(report: Report, result: TaskResult, examples: Sequence[Example]) -> Report:
    """Scores and examples, added to ``report``."""
    report.heading("Scores").table(*result.rows(), best=range(1, 1 + len(result.metrics)))
    for note in result.notes:
        report.note(note)
    held = {example.key: example for example in examples}
    order = sorted(result.said, key=lambda said: -said.confidence)
    right = [said for said in order if result.of_example[said.key] > 50]
    wrong = [said for said in order if result.of_example[said.key] == 0]
    sections = {
        "Most confident mistakes": wrong,
        "Best: right and sure": right,
        "Worst: the right answer was least probable": sorted(wrong, key=lambda said: _right(said, held[said.key])),
        "Right by the least": right[::-1],
    }
    for name, chosen in sections.items():
        if chosen:
            report.heading(name)
        for said in chosen[:SHOWN]:
            _show(report, said, held[said.key], result.of_example[said.key])
    return report


def _right(said: Said, example: Example) -> float:
    """The probability of the best right answer among those that were kept; below all of them where it is not there."""
    return max((chance for answer, chance in said.answers if answer in example.answers), default=-1.0)


def _show(report: Report, said: Said, example: Example, score: float) -> None:
    people = ", ".join(dict.fromkeys(example.answers))
    answers = ", ".join(f"{answer} ({chance:.2f})" for answer, chance in said.answers[:3])
    shown = [
        Shown(decode(path, 2 * SIDE, name=path.name), f"is: {people}" if number == 0 else "", score > 50)
        for number, path in enumerate(example.images)
    ]
    report.compare(example.text or example.shows, {f"said: {answers}": shown}, side=SIDE)


def add_course(
    report: Report,
    events: Sequence[Mapping[str, Any]],
    *,
    task: Task,
    last: TaskResult | None,
    examples: Sequence[Example],
    notes: Sequence[str],
) -> None:
    """How the metric went over a fine-tuning, and the last validation with its examples."""
    for note in notes:
        report.note(note)
    found = [event for event in events if event["event"] == "validation"]
    if found:
        report.heading(f"{task.title}: validation")
        curves = {
            name: [(float(event["step"]), float(event["metrics"][name])) for event in found]
            for name in found[0]["metrics"]
        }
        report.curves(curves, "metrics", y="percent")
    if last is not None:
        add_task(report, last, examples)
