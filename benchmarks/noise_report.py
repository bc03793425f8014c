"""Tables and curves of what :mod:`benchmarks.noise` measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common import table
from benchmarks.noise_scenes import ARMS, KINDS, PARTS

MEASURES = {
    "recall": ("towers, mean recall %", 1.0),
    "itm other": ("ITM, other caption: AUC", 100.0),
    "itm swapped": ("ITM, swapped colours: AUC", 100.0),
    "true captions": ("true captions %", 100.0),
}


def report(out: Path, plot: Path | None) -> None:
    scenes = [json.loads(path.read_text()) for path in sorted((out / "results").glob("scenes-*.json"))]
    flickr = [json.loads(path.read_text()) for path in sorted((out / "results").glob("flickr-*.json"))]
    if not scenes and not flickr:
        raise SystemExit(f"{out} holds no results; run scenes or flickr first")
    rates = sorted({row["rate"] for row in scenes})
    print(f"{len(scenes)} trainings on scenes, seeds {sorted({row['seed'] for row in scenes})}; mean ± deviation\n")
    print(_arms(scenes, [(rate, arm) for rate in rates for arm in ARMS]))
    print()
    print(_differences(scenes, rates))
    print()
    print(_arms(scenes, [(50, arm) for arm in ("raw", *PARTS)]))
    print()
    print(_filters([row for row in scenes if "filter" in row], rates))
    print()
    print(_flickr(flickr))
    if plot is not None:
        _plot(scenes, flickr, rates, plot)


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "–"
    made = scale * np.array(values)
    return f"{made.mean():.{digits}f}" + (f" ± {made.std(ddof=1):.{digits}f}" if len(made) > 1 else "")


def _of(rows: list[dict[str, Any]], rate: int, arm: str, name: str) -> list[float]:
    return [row[name] for row in rows if row["rate"] == rate and row["arm"] == arm]


def _arms(rows: list[dict[str, Any]], wanted: list[tuple[int, str]]) -> str:
    lines = [
        [f"{rate} %", arm, *(spread(_of(rows, rate, arm, name), scale) for name, (_, scale) in MEASURES.items())]
        for rate, arm in wanted
        if _of(rows, rate, arm, "recall")
    ]
    return table(["noise", "trained on", *(title for title, _ in MEASURES.values())], lines)


def _differences(rows: list[dict[str, Any]], rates: list[int]) -> str:
    """What the filter does, in points of recall and AUC of ITM: seed by seed, and mean."""
    seeds = sorted({row["seed"] for row in rows})
    pairs = (("filter only", "raw"), ("as many at random", "raw"), ("filter only", "as many at random"))
    found = {(row["rate"], row["arm"], row["seed"]): row for row in rows}
    lines = []
    for rate in rates:
        for arm, other in pairs:
            both = [(found.get((rate, arm, seed)), found.get((rate, other, seed))) for seed in seeds]
            gains = [
                [MEASURES[name][1] * (one[name] - base[name]) for name in ("recall", "itm other")]
                if one and base
                else []
                for one, base in both
            ]
            mean = np.mean([gain for gain in gains if gain], axis=0).tolist() if any(gains) else []
            cells = [" / ".join(f"{value:+.1f}" for value in gain) or "–" for gain in (*gains, mean)]
            lines.append([f"{rate} %", f"{arm} – {other}", *cells])
    return table(["noise", "recall / ITM AUC, points", *(f"seed {seed}" for seed in seeds), "mean"], lines)


def _filters(rows: list[dict[str, Any]], rates: list[int]) -> str:
    facts = {
        "web kept %": ("web kept", 100.0),
        "noise among kept %": ("noise kept", 100.0),
        "noise among dropped %": ("noise dropped", 100.0),
        "words of a web text, kept": ("words kept", 1.0),
        "words of a web text, dropped": ("words dropped", 1.0),
        **{f"ITM AUC, {kind}": (f"itm {kind}", 100.0) for kind in ("any", *KINDS)},
        "ITC AUC, any": ("itc any", 100.0),
        "synthetic kept %": ("synthetic kept", 100.0),
        "synthetic true %": ("synthetic true", 100.0),
        "true after filter %": ("kept synthetic true", 100.0),
    }
    lines = []
    for title, (name, scale) in facts.items():
        cells = [[v for r in rows if r["rate"] == rate and (v := r["filter"].get(name)) is not None] for rate in rates]
        lines.append([title, *(spread(values, scale) for values in cells)])
    return table(["filter at 0.5", *(f"{rate} % noise" for rate in rates)], lines)


def _flickr(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        itm = row["itm"]
        half = int(np.argmin(np.abs(np.array(itm["threshold"]) - 0.5)))
        precision = itm["precision"][half]
        lines.append(
            [
                f"{row['rate']} %",
                row["trained"],
                row["split"],
                f"{row['pairs']:,}",
                f"{100 * itm['auc']:.1f}",
                f"{100 * row['itc']['auc']:.1f}",
                "–" if precision is None else f"{100 * precision:.1f}",
                f"{100 * itm['recall'][half]:.1f}",
            ]
        )
    headers = ["shuffled", "trained on", "scored", "pairs", "AUC ITM", "AUC ITC", "precision at 0.5", "recall at 0.5"]
    return table(headers, lines)


def _plot(scenes: list[dict[str, Any]], flickr: list[dict[str, Any]], rates: list[int], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for place, name in enumerate(("recall", "true captions")):
        title, scale = MEASURES[name]
        for shift, arm in enumerate(ARMS):
            found = [(rate, scale * np.array(values)) for rate in rates if (values := _of(scenes, rate, arm, name))]
            axes[place].errorbar(
                [rate + shift - (len(ARMS) - 1) / 2 for rate, _ in found],
                [values.mean() for _, values in found],
                [values.std(ddof=1) if len(values) > 1 else 0.0 for _, values in found],
                fmt="o-",
                capsize=3,
                label=arm,
            )
        axes[place].set(xlabel="noisy captions, %", ylabel=title, title="scenes", xticks=rates)
    axes[0].legend(fontsize=8)
    for row in flickr:
        if row["split"] == "val" or row["trained"] == "noisy":
            for name, style in (("itm", "-"), ("itc", ":")):
                points = [(r, p) for r, p in zip(row[name]["recall"], row[name]["precision"]) if p is not None]
                label = f"{row['rate']} %, {row['trained']} model, {row['split']}" if name == "itm" else None
                colour = f"C{flickr.index(row)}"
                axes[2].plot([r for r, _ in points], [p for _, p in points], style, color=colour, label=label)
    axes[2].set(
        xlabel="recall of right captions",
        ylabel="precision",
        title="Flickr8k shuffled: ITM —, ITC ···",
        ylim=(0.25, 1.02),
    )
    axes[2].legend(fontsize=7)
    for one in axes:
        one.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
