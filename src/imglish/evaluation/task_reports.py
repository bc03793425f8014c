"""Reports of compositional suites, of zero-shot classification and of grounding: tables, the best, the worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imglish.data.images import decode
from imglish.data.pictures import picture_of
from imglish.data.records import Record
from imglish.evaluation.classify import ZeroShotResult
from imglish.evaluation.compositional import CompositionalResult, Item, record_of
from imglish.evaluation.explain import ReadsWords, explain
from imglish.evaluation.heatmaps import marked
from imglish.evaluation.probe import ProbeResult
from imglish.evaluation.referring import GroundingResult, Reference
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


def classes_report(
    result: ZeroShotResult | ProbeResult, records: Sequence[Record], title: str, facts: Mapping[str, object]
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


def grounding_report(
    result: GroundingResult,
    references: Sequence[Reference],
    model: nn.Module,
    tokenizer: ReadsWords,
    facts: Mapping[str, object],
    layer: int | None = None,
) -> Report:
    """A report of ``result``, which was measured on ``references``; the maps of its examples are made again."""
    report = Report("Grounding", f"{result.references} references")
    report.facts({**facts, "maps": result.method})
    report.heading("Accuracy").table(*result.rows(), "percent; below the maps: answers that need no model")
    for note in result.notes:
        report.note(note)
    rows = [[name or "all", str(count), f"{hits:.1f}"] for name, (count, hits) in result.groups.items()]
    report.heading("By group").table(["group", "references", "pointing"], rows)
    known = [(number, one) for number, one in enumerate(result.judged) if one is not None]
    confident = sorted(known, key=lambda pair: -pair[1].score)
    hit = [number for number, one in confident if one.points["whole text"]]
    missed = [number for number, one in confident if not one.points["whole text"]]
    config: Any = model.config
    transform = config.image.transform()
    for title, chosen in {
        "Points at it, highest score first": hit,
        "Points elsewhere, highest score first": missed,
    }.items():
        shown = []
        for number in chosen[:SHOWN]:
            reference, judged = references[number], result.judged[number]
            assert judged is not None
            image = decode(reference.image)
            found = explain(model, tokenizer, picture_of(transform(image), transform), reference.text, layer)
            picture = marked(image, found.whole, transform, reference.boxes, reference.size)
            shown.append(Shown(picture, f"{reference.text} ({judged.score:.2f})", judged.points["whole text"]))
        if shown:
            report.heading(title).pictures(shown, side=SIDE)
    return report


def _top(values: Tensor, among: Tensor) -> list[int]:
    numbers = among.nonzero().flatten()
    order = values[numbers].argsort(descending=True, stable=True)[:SHOWN]
    chosen: list[int] = numbers[order].tolist()
    return chosen


def _shown(result: ZeroShotResult | ProbeResult, record: Record, number: int, found: torch.Tensor) -> Shown:
    right, taken = result.classes[int(result.labels[number])], result.classes[int(found[number])]
    text = right if right == taken else f"{taken} (is: {right})"
    return Shown(decode(record.image, 2 * SIDE, name=record.key), text, right == taken)
