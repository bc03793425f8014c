"""Reports of compositional suites and of zero-shot classification: tables, the best, the most confident mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from imglish.data.images import decode
from imglish.data.records import Record
from imglish.evaluation.classify import ZeroShotResult
from imglish.evaluation.compositional import CompositionalResult, Item, record_of
from imglish.report import Report, Shown

SHOWN = 12
SIDE = 200


def compositional_report(
    result: CompositionalResult, items: Sequence[Item], title: str, facts: Mapping[str, object]
) -> Report:
    """A report of ``result``, which was measured on ``items``."""
    report = Report(title, f"{len(items)} items")
    report.facts({**facts, "score rule": result.score_rule, "ties": f"{result.ties:.1f} % of the items"})
    report.heading("Scores").table(*result.rows(), "percent; a tie is wrong")
    for note in result.notes:
        report.note(note)
    order = sorted(range(len(items)), key=lambda number: result.margin[number])
    wrong = [number for number in order if not result.right[number]]
    right = [number for number in order[::-1] if result.right[number]]
    close = sorted(right, key=lambda number: result.margin[number])
    sections = {"Most confident mistakes": wrong, "Best": right, "Right by the least": close}
    for name, numbers in sections.items():
        if numbers:
            report.heading(name)
        for number in numbers[:SHOWN]:
            item = items[number]
            shown = [
                Shown(decode(record_of(*picture).image, 2 * SIDE, name=str(picture[0])), text, result.right[number])
                for picture, text in zip(item.pictures, item.captions, strict=False)
            ]
            against = f"against: {item.captions[1]}" if len(item.pictures) == 1 else "each against the other"
            report.compare(f"{item.group}: {item.captions[0]}", {f"{against} ({result.margin[number]:+.3f})": shown})
    return report


def zeroshot_report(
    result: ZeroShotResult, records: Sequence[Record], title: str, facts: Mapping[str, object]
) -> Report:
    """A report of ``result``, which was measured on ``records``."""
    report = Report(title, f"{len(records)} pictures, {len(result.classes)} classes")
    report.facts(facts)
    report.heading("Accuracy").table(*result.rows(), "percent; a tie is wrong")
    for note in result.notes:
        report.note(note)
    report.heading("Classes").table(*result.class_rows(), wide=(3,))
    first, label = result.scores.topk(2, dim=1), result.labels
    lead = first.values[:, 0] - first.values[:, 1]
    found = first.indices[:, 0]
    hit = found == label
    own = result.scores.gather(1, label[:, None])
    rank = (result.scores > own).sum(1)
    for name, chosen in {
        "Most confident mistakes": _top(lead, ~hit),
        "Best": _top(lead, hit),
        "Worst: the right class came last": _top(rank.double(), ~hit),
    }.items():
        if chosen:
            report.heading(name).pictures([_shown(result, records[i], i, found) for i in chosen], side=SIDE)
    return report


def _top(values: Tensor, among: Tensor) -> list[int]:
    numbers = among.nonzero().flatten()
    order = values[numbers].argsort(descending=True, stable=True)[:SHOWN]
    chosen: list[int] = numbers[order].tolist()
    return chosen


def _shown(result: ZeroShotResult, record: Record, number: int, found: torch.Tensor) -> Shown:
    right, taken = result.classes[int(result.labels[number])], result.classes[int(found[number])]
    text = right if right == taken else f"{taken} (is: {right})"
    return Shown(decode(record.image, 2 * SIDE, name=record.key), text, right == taken)
