"""The report of a retrieval evaluation: tables, the k-sweep, and what was found, well and badly, with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from imglish.data.images import decode
from imglish.data.records import Record
from imglish.evaluation.retrieval import Lists, RetrievalResult, merge_pictures
from imglish.report import Report, Shown

SHOWN = 8  # pictures in a row
QUERIES = 5  # queries in a section


def retrieval_report(
    result: RetrievalResult, records: Sequence[Record], title: str, facts: Mapping[str, object], seed: int = 0
) -> Report:
    """A report of ``result``, which was measured on ``records``. seed: of the choice of queries to show."""
    report = Report(title, f"{result.images} pictures, {result.texts} captions")
    report.facts({**facts, "score rule": result.score_rule, "ties": result.ties, "pairs scored": f"{result.pairs:,}"})
    headers, rows = result.rows()
    report.heading("Recalls").table(headers, rows, "percent", best=range(1, len(headers) - 1))
    headers, rows = result.within_rows()
    if rows:
        report.table(headers, rows, "within one modality, by the towers; percent")
    for note in result.notes:
        report.note(note)
    if result.sweep:
        _sweep(report, result)
    _examples(report, result, records, seed)
    report.heading("Time").facts({name: f"{value:.1f} s" for name, value in result.seconds.items()})
    return report


def _sweep(report: Report, result: RetrievalResult) -> None:
    tables = {**result.sweep, result.rerank: result.best}
    if result.towers is not None:
        tables[0] = result.towers
    names = [name for name in result.best if name.startswith(("t2i_r", "i2t_r"))]
    curves = {
        name.replace("t2i_r", "text→image R@").replace("i2t_r", "image→text R@"): [
            (float(k), table[name]) for k, table in sorted(tables.items())
        ]
        for name in names
    }
    report.curves(curves, "Recalls by the number of reranked candidates (0: towers)", x="k", y="percent")


def _examples(report: Report, result: RetrievalResult, records: Sequence[Record], seed: int) -> None:
    if any(record.image is None for record in records):
        report.note("the data name their pictures and hold none to show")
        return
    left_out = set(result.left_out)
    pictures, captions, owner = merge_pictures([record for record in records if record.image_id not in left_out])
    page = _Page(report, pictures, captions, owner, result.tower_lists, result.reranked_lists)
    best = page.best
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))
    page.section("Queries drawn at random", "", order[:QUERIES])
    right = (best.rank == 0).nonzero().flatten()
    page.section("Best", "Right, with the highest scores.", _top(best.score[:, 0], right))
    wrong = (best.rank > 0).nonzero().flatten()
    mistakes = "The first picture is wrong, and its score is the furthest above the next one's."
    lead = best.score[:, 0] - best.score[:, min(1, best.score.shape[1] - 1)]
    page.section("Most confident mistakes", mistakes, _top(lead, wrong))
    page.section("Worst", "The right picture came last.", _top(best.rank.double(), wrong))
    if result.reranked_lists is not None and result.tower_lists is not None:
        gain = (result.tower_lists.rank - result.reranked_lists.rank).double()
        helped, hurt = (gain > 0).nonzero().flatten(), (gain < 0).nonzero().flatten()
        page.section("Where reranking helped most", f"It helped {len(helped)} queries.", _top(gain, helped))
        page.section("Where reranking hurt most", f"It hurt {len(hurt)} queries.", _top(-gain, hurt))


def _top(values: Tensor, among: Tensor) -> Tensor:
    """The few of ``among`` with the largest values."""
    return among[values[among].argsort(descending=True, stable=True)[:QUERIES]]


class _Page:
    """Shows what single text queries found."""

    def __init__(
        self,
        report: Report,
        pictures: Sequence[Record],
        captions: Sequence[str],
        owner: Tensor,
        towers: Lists | None,
        reranked: Lists | None,
    ) -> None:
        self.report = report
        self.pictures, self.captions, self.owner = pictures, captions, owner
        known = {"towers": towers, "reranked": reranked}
        self.rankings = {name: lists for name, lists in known.items() if lists is not None}
        self.best = list(self.rankings.values())[-1]

    def section(self, title: str, text: str, queries: Tensor) -> None:
        if not len(queries):
            return
        self.report.heading(title).text(text or "What each ranking puts first; the right picture has a green frame.")
        for query in queries.tolist():
            rows = {}
            for name, lists in self.rankings.items():
                label = f"{name}, right one at {int(lists.rank[query]) + 1}"
                rows[label] = [self._shown(query, int(i)) for i in lists.found[query, :SHOWN]]
            self.report.compare(self.captions[query], rows, side=88)

    def _shown(self, query: int, number: int) -> Shown:
        record = self.pictures[number]
        return Shown(decode(record.image, 176, name=record.key), good=number == int(self.owner[query]) or None)
