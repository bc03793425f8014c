"""The report at the end of a run: curves, recalls, alarms, settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from imglish.evaluation.caption_report import add_captions
from imglish.evaluation.captions import CaptioningResult
from imglish.report import Report
from imglish.training.config import Plan, Recipe
from imglish.training.setup import Materials

Events = Sequence[Mapping[str, Any]]
COLUMNS = ("t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10", "r_mean")
HEADERS = ["step", "ranking", "text→image R@1", "R@5", "R@10", "image→text R@1", "R@5", "R@10", "mean"]


def write_report(
    folder: Path,
    recipe: Recipe,
    model: nn.Module,
    plan: Plan,
    events: Events,
    findings: Callable[[Report, Events], None],
) -> Path:
    """Write `report.html` of a finished run from what its log holds; returns its path. findings: what the validations
    found, added to the report."""
    steps = [event for event in events if event["event"] == "step"]
    name = recipe.model.get("name", recipe.model.get("init"))
    report = Report(f"Training of {name}", str(folder))
    report.facts(_facts(recipe, model, plan, steps, events))
    _alarms(report, events)
    report.heading("Losses").charts(_loss_charts(steps, [e for e in events if e["event"] == "validation"]))
    findings(report, events)
    report.heading("Course of the run").charts(_course_charts(steps))
    report.heading("Settings").table(["setting", "value"], flat(recipe.to_dict()))
    return report.save(folder / "report.html")


def add_retrieval(report: Report, events: Events, *, written: CaptioningResult | None, materials: Materials) -> None:
    """Recalls on the validation pairs; and captions of the model at its end for the first validation pictures of
    ``materials``, if it writes some."""
    _validation(report, events)
    if written is not None:
        _captions(report, events, written, materials)


def flat(settings: Mapping[str, Any], where: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, value) rows."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{where}{name}.")
        else:
            rows.append((f"{where}{name}", "-" if value is None else str(value)))
    return rows


def _facts(recipe: Recipe, model: nn.Module, plan: Plan, steps: Events, events: Events) -> dict[str, object]:
    facts: dict[str, object] = {
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        "length": f"{plan.steps} steps of {recipe.batch.size} pairs, {plan.epochs(plan.steps):.1f} epochs",
    }
    for event in events:
        if event["event"] == "start":
            facts |= {"training pairs": event["pairs"], "computed on": event["where"]}
        if event["event"] == "work":
            facts["work"] = f"{event['flops_per_pair'] / 1e9:.2f} GFLOP a pair (first step)"
    if steps:
        rates = sorted(event["pairs_per_second"] for event in steps)
        waiting = sum(event["waiting_for_data"] for event in steps) / len(steps)
        facts["time"] = f"{steps[-1]['seconds'] / 60:.1f} minutes"
        rate = rates[len(rates) // 2]
        facts["rate"] = f"{rate:.0f} pairs a second, {1000 / rate:.1f} s for 1,000 pairs (median)"
        facts["peak memory"] = f"{steps[-1]['memory_gib']:.2f} GiB"
        facts["waiting for data"] = f"{waiting:.1%} of the time"
        facts["final losses"] = ", ".join(f"{k} {v:.3f}" for k, v in steps[-1]["losses"].items())
    return facts


def _alarms(report: Report, events: Events) -> None:
    alarms = [event for event in events if event["event"] == "alarm"]
    if alarms:
        report.heading("Alarms").text("\n\n".join(f"**Step {event['step']}**: {event['text']}" for event in alarms))


def _series(steps: Events, group: str) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for event in steps:
        for name, value in event[group].items():
            series.setdefault(name, []).append((float(event["step"]), float(value)))
    return series


def _loss_charts(steps: Events, held_out: Events) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """A chart for each loss and metric of training, with what validations found of it on held-out data."""
    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for group in ("losses", "metrics"):
        charts |= {name: {name: points} for name, points in _series(steps, group).items()}
        for name, points in _series([event for event in held_out if group in event], group).items():
            charts.setdefault(name, {})["held out"] = points
    return charts


def _course_charts(steps: Events) -> dict[str, dict[str, list[tuple[float, float]]]]:
    titles = {"learning rate": "lr", "gradient norm": "gradient_norm", "pairs a second": "pairs_per_second"}
    return {
        title: {title: [(float(event["step"]), float(event[key])) for event in steps]} for title, key in titles.items()
    }


def _validation(report: Report, events: Events) -> None:
    found = [event for event in events if event["event"] == "validation" and "towers" in event]
    if not found:
        return
    rankings = [name for name in ("towers", "reranked") if any(event.get(name) for event in found)]
    report.heading("Retrieval on the validation pairs")
    curves = {
        name: [(float(event["step"]), float(event[name]["r_mean"])) for event in found if event.get(name)]
        for name in rankings
    }
    report.curves(curves, "mean recall", y="percent")
    rows = [
        [event["step"], name, *(f"{event[name][column]:.1f}" for column in COLUMNS)]
        for event in found
        for name in rankings
        if event.get(name)
    ]
    report.table(HEADERS, rows, "percent; ties count as misses", best=[HEADERS.index("mean")])


def _captions(report: Report, events: Events, written: CaptioningResult, materials: Materials) -> None:
    """How captions came to agree with those of the validation pictures, and the last of them with their pictures."""
    found = [event for event in events if event["event"] == "validation" and event.get("captions")]
    if found:
        curve = [(float(event["step"]), float(event["captions"]["cider"])) for event in found]
        report.heading("Captions of the validation pictures").curves({"CIDEr-D": curve}, "CIDEr-D", y="times 100")
        headers, rows = written.rows()
        report.table(
            headers, rows, f"at the end, {written.images} pictures, {written.generation.beams} beams; times 100"
        )
    keys = {one.key for one in written.predictions}
    pictures = [record for record in materials.validation if record.key in keys]
    add_captions(report, written.predictions, pictures, extremes=bool(found))
