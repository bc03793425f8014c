"""Captions beside their pictures: the report of a captioning evaluation, and the same section for other reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from imglish.data.images import decode
from imglish.data.records import Record
from imglish.evaluation.captions import CaptioningResult, Prediction
from imglish.report import Report, Shown

SHOWN = 12  # pictures of a section
SIDE = 220


def captioning_report(
    result: CaptioningResult, records: Sequence[Record], title: str, facts: Mapping[str, object], seed: int = 0
) -> Report:
    """A report of ``result``, which was measured on ``records``; seed: of the choice of pictures to show."""
    report = Report(title, f"{result.images} pictures, {result.references} references")
    generation = result.generation
    how = f"{generation.beams} beams" if generation.beams > 1 else "sampled" if generation.sample else "greedy"
    report.facts(
        {
            **facts,
            "written by": f"{how}, {generation.min_length} to {generation.max_length} tokens",
            "words a caption": f"{result.words:.1f}",
            "different captions": f"{result.distinct} of {result.images}",
            "cut at the longest length": result.unfinished,
            "time": f"{result.seconds:.1f} s",
        }
    )
    report.heading("Metrics").table(*result.rows(), "times 100")
    add_captions(report, result.predictions, records, seed)
    return report


def add_captions(
    report: Report, predictions: Sequence[Prediction], records: Sequence[Record], seed: int = 0, extremes: bool = True
) -> None:
    """Pictures with their captions: some drawn at random and, with ``extremes``, those that agree best and worst with
    the references."""
    pictures = {record.key: record for record in records}
    order = np.random.default_rng(seed).permutation(len(predictions))
    sections = {"Captions of pictures drawn at random": [predictions[i] for i in order[:SHOWN]]}
    if extremes:
        by_cider = sorted(predictions, key=lambda one: -one.metrics["cider"])
        sections["Closest to the references (CIDEr-D)"] = by_cider[:SHOWN]
        sections["Furthest from the references"] = by_cider[::-1][:SHOWN]
    for title, some in sections.items():
        report.heading(title).pictures([_shown(one, pictures[one.key]) for one in some], side=SIDE)


def _shown(one: Prediction, record: Record) -> Shown:
    reference = one.references[0] if one.references else ""
    text = f"{one.caption}  (CIDEr-D {100 * one.metrics['cider']:.0f}; a reference: {reference})"
    return Shown(decode(record.image, 2 * SIDE, name=record.key), text)
