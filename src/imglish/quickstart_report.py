"""What the quickstart tells: the verdict in words, its numbers as JSON, and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imglish.data.images import decode
from imglish.data.scenes import SceneBenchmark, Split
from imglish.evaluation.metrics import binding_correct
from imglish.report import Report, Shown

if TYPE_CHECKING:
    from imglish.quickstart import Outcome, Searched

TITLES: dict[Split, str] = {"seen": "colour pairs seen in training", "heldout": "colour pairs held out of training"}
SHORT: dict[Split, str] = {"seen": "seen", "heldout": "held out"}
RANKINGS = {"towers": "towers", "reranked": "towers, then fusion", "rival": "rival towers"}
SCORED = {**RANKINGS, "reranked": "fusion"}
MEASURED = "measured.json"
SHOWN = 8  # pictures of a ranking
QUERIES = 6  # of a language and split


def scores_of(outcome: Outcome, ranking: str, split: Split) -> Tensor:
    """Quadruple scores ``(Q, 2, 2)`` of ``towers``, ``reranked`` (the fusion) or ``rival``."""
    binding = outcome.measured["rival" if ranking == "rival" else "main", split].binding
    scores = binding.fusion_scores if ranking == "reranked" else binding.tower_scores
    assert scores is not None
    return scores


def binding_table(outcome: Outcome) -> dict[str, dict[str, dict[str, float]]]:
    """ranking -> split -> text, image, group in percent."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for ranking in RANKINGS:
        for split in outcome.benchmarks:
            right = binding_correct(scores_of(outcome, ranking, split))
            table.setdefault(ranking, {})[split] = {name: 100 * float(v.double().mean()) for name, v in right.items()}
    return table


def recall_table(outcome: Outcome) -> dict[str, dict[str, dict[str, float]]]:
    """ranking -> split -> recalls among all pictures of the split."""
    table: dict[str, dict[str, dict[str, float]]] = {ranking: {} for ranking in RANKINGS}
    for split in outcome.benchmarks:
        main, rival = (outcome.measured[name, split].retrieval for name in ("main", "rival"))
        assert main.towers is not None
        table["towers"][split], table["reranked"][split], table["rival"][split] = main.towers, main.best, rival.best
    return table


def search_table(outcome: Outcome) -> dict[str, dict[str, dict[str, float]]]:
    """ranking -> split -> percent of queries whose first picture fits, and precision at the number of fitting ones."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for ranking in RANKINGS:
        for split in outcome.benchmarks:
            queries = [q for q in outcome.searched if q.split == split]
            first = [q.found[ranking][0] in q.relevant for q in queries]
            precision = [_precision(q, ranking) for q in queries]
            table.setdefault(ranking, {})[split] = {
                "first": 100 * sum(first) / len(first),
                "precision": 100 * sum(precision) / len(precision),
            }
    return table


def _precision(query: Searched, ranking: str) -> float:
    depth = min(len(query.relevant), len(query.found[ranking]))
    return sum(i in query.relevant for i in query.found[ranking][:depth]) / depth


def compared(one: Tensor, other: Tensor, name: str) -> tuple[float, float]:
    """Difference of two scores on the same quadruples, in points, and its standard error (paired)."""
    difference = binding_correct(one)[name].double() - binding_correct(other)[name].double()
    error = float(difference.std(correction=0)) / max(1, len(difference)) ** 0.5
    return 100 * float(difference.mean()), 100 * error


def verdict(outcome: Outcome) -> str:
    """What was measured, in words, also where the towers win. A difference counts from two standard errors on."""
    binding, recalls, searches = binding_table(outcome), recall_table(outcome), search_table(outcome)
    lines = []
    for split in outcome.benchmarks:
        fusion = scores_of(outcome, "reranked", split)
        groups = ", ".join(f"{SCORED[r]} {binding[r][split]['group']:.0f} %" for r in RANKINGS)
        lines.append(
            f"**{TITLES[split].capitalize()}.** Group score of {len(fusion)} quadruples: {groups}; chance 17 %."
        )
        for other, name in (("towers", "its own towers"), ("rival", "the rival")):
            by, error = compared(fusion, scores_of(outcome, other, split), "group")
            parts = [
                f"{score} {{:+.0f}} ± {{:.0f}}".format(*compared(fusion, scores_of(outcome, other, split), score))
                for score in ("text", "image", "group")
            ]
            lines.append(f"The fusion {_outcome(by, error)} {name}: {', '.join(parts)} points.")
        count = outcome.measured["main", split].retrieval.images
        first = ", ".join(f"{RANKINGS[r]} {recalls[r][split]['t2i_r1']:.0f} %" for r in RANKINGS)
        lines.append(
            f"Captions that say everything: the right one of {count} pictures comes first (text→image R@1): {first}."
        )
        queries = sum(query.split == split for query in outcome.searched)
        first = ", ".join(f"{RANKINGS[r]} {searches[r][split]['first']:.0f} %" for r in RANKINGS)
        lines.append(f"{queries} searches as one types them: a picture that fits comes first: {first}.")
    return "\n\n".join(lines)


def _outcome(by: float, error: float) -> str:
    if abs(by) < 2 * error or by == 0:
        return "is not told apart from"
    return "is ahead of" if by > 0 else "is behind"


def write(outcome: Outcome) -> Path:
    """``measured.json`` and ``report.html`` in the folder of the outcome."""
    outcome.config.out.mkdir(parents=True, exist_ok=True)
    measured = {
        "binding": binding_table(outcome),
        "recalls": recall_table(outcome),
        "search": search_table(outcome),
        "seconds": outcome.seconds,
        "steps": {name: run.step for name, run in outcome.runs.items()},
        "seed": outcome.config.seed,
    }
    text = json.dumps(measured, indent=2) + "\n"
    report = _report(outcome).save(outcome.report)
    (outcome.config.out / MEASURED).write_text(text, encoding="utf-8")  # last: it says that the quickstart has finished
    return report


def _report(outcome: Outcome) -> Report:
    config = outcome.config
    report = Report("imglish quickstart", "Who wears what: towers, fusion, and a rival without fusion")
    report.verdict(verdict(outcome))
    report.facts(
        {
            "model": f"ALBEF, {outcome.parameters / 1e6:.2f} M parameters, {_dimensions(outcome)} joint dimensions",
            "data": f"{config.scenes.scenes:,} drawn scenes of {config.scenes.size}x{config.scenes.size} pixels, seed "
            f"{config.scenes.seed}; captions in {', '.join(config.scenes.languages)} that leave out "
            f"{config.scenes.omission:.0%} of what they could say",
            "training": _budget(outcome, "main"),
            "training of the rival": _budget(outcome, "rival"),
            "in all": f"{outcome.seconds['in all'] / 60:.1f} minutes ("
            + ", ".join(f"{name} {value:.0f} s" for name, value in outcome.seconds.items() if name != "in all")
            + (", both trainings at once)" if config.at_once else ")"),
        }
    )
    report.text(EXPLANATION)
    _tables(report, outcome)
    _losses(report, outcome)
    _searches(report, outcome)
    return report


EXPLANATION = """
The main model is trained with all of ALBEF's objectives: contrast with a momentum teacher (ITC),
matching with hard negatives from the towers and with the known wrong captions of the data (ITM), masked words (MLM),
distillation. The rival has the same towers, data, order and number of steps; it is trained by contrast alone, and the
known wrong captions are negatives of its contrast. So it sees every hint that the fusion sees, at a lower cost a step.

In a quadruple two pictures hold the same people, garments and colours, but two colours have changed places; of its two
captions each is true of one picture. **text**: each picture prefers its caption; **image**: each caption prefers its
picture; **group**: both (after Winoground; ties count as wrong).
"""


def _dimensions(outcome: Outcome) -> int:
    recipe: Any = outcome.config.model
    return int(recipe.get("embed_dim", 64))


def _budget(outcome: Outcome, name: str) -> str:
    run = outcome.runs[name]
    return f"{run.step} steps of {outcome.config.batch} pairs, {outcome.seconds[f'training {name}']:.0f} s"


def _tables(report: Report, outcome: Outcome) -> None:
    splits = list(outcome.benchmarks)
    binding, scores = binding_table(outcome), ("text", "image", "group")
    headers = ["Who wears what", *(f"{SHORT[s]}: {name}" for s in splits for name in scores)]
    rows = [[SCORED[r], *(f"{binding[r][s][n]:.1f}" for s in splits for n in scores)] for r in RANKINGS]
    report.heading("Scores").table(headers, rows, "percent of quadruples", best=range(1, len(headers)))
    error = f"standard error of a score: at most {_error(outcome):.1f} points"
    report.note(f"Chance: text and image 25 %, group 16.7 %; {error}.")
    recalls = recall_table(outcome)
    columns = {
        f"{way}_r{k}": f"{name} R@{k}" for way, name in (("t2i", "text→image"), ("i2t", "image→text")) for k in (1, 5)
    }
    for s in splits:
        rows = [[RANKINGS[r], *(f"{recalls[r][s][c]:.1f}" for c in (*columns, "r_mean"))] for r in RANKINGS]
        headers = [f"Retrieval, {SHORT[s]}", *columns.values(), "mean of R@1, 5, 10"]
        caption = f"percent; {TITLES[s]}; the distractor of every picture is among the candidates"
        report.table(headers, rows, caption, best=range(1, len(headers)))
    found = search_table(outcome)
    headers = ["Search by garments", *(f"{SHORT[s]}: {t}" for s in splits for t in ("first fits", "precision"))]
    rows = [[RANKINGS[r], *(f"{found[r][s][n]:.1f}" for s in splits for n in ("first", "precision"))] for r in RANKINGS]
    count = " and ".join(f"{sum(q.split == s for q in outcome.searched)} {SHORT[s]}" for s in splits)
    caption = f"percent; {count} queries; precision among the first n, where n pictures fit"
    report.table(headers, rows, caption, best=range(1, len(headers)))


def _error(outcome: Outcome) -> float:
    """The largest standard error of a share measured on the smaller set of quadruples, in points."""
    count = min(len(b.quadruples) for b in outcome.benchmarks.values())
    return 100 * 0.5 / count**0.5


def _losses(report: Report, outcome: Outcome) -> None:
    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, run in outcome.runs.items():
        for event in run.events:
            if event["event"] == "step":
                for loss, value in {**event["losses"], **event["metrics"]}.items():
                    title = f"{loss} ({name})" if name == "rival" else loss
                    charts.setdefault(title, {}).setdefault(loss, []).append((event["step"], value))
    report.heading("Losses").charts(charts)
    report.note("ITM knows nothing as long as it stays at 0.56, the entropy of one true pair among four.")


def _searches(report: Report, outcome: Outcome) -> None:
    for split, benchmark in outcome.benchmarks.items():
        report.heading(f"Searches: {TITLES[split]}")
        report.text("The first pictures of each ranking; those that fit have a green frame.")
        for query in _chosen([q for q in outcome.searched if q.split == split]):
            report.compare(f"{query.text}  ({len(query.relevant)} fit)", _found(query, benchmark), side=84)


def _chosen(queries: Sequence[Searched]) -> list[Searched]:
    """A few of each language, spread over all; "black top, white trousers" first, where it is asked."""
    chosen = []
    for language in dict.fromkeys(q.language for q in queries):
        mine = [q for q in queries if q.language == language]
        first = [q for q in mine if q.text in ("black top, white trousers", "黑色上衣，白色裤子")]
        rest = [q for q in mine if q not in first]
        spread = torch.linspace(0, len(rest) - 1, min(QUERIES - len(first), len(rest))).long().tolist()
        chosen += first + [rest[i] for i in spread]
    return chosen


def _found(query: Searched, benchmark: SceneBenchmark) -> Mapping[str, list[Shown]]:
    rows = {}
    for ranking, title in RANKINGS.items():
        shown = []
        for number in query.found[ranking][:SHOWN]:
            picture = decode(benchmark.records[number].image)
            shown.append(Shown(picture, good=number in query.relevant or None))
        rows[title] = shown
    return rows
