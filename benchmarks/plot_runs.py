"""Curves of training runs in one picture: `python -m benchmarks.plot_runs OUT.svg RUN [RUN ...]`.

Left: validation recall at 10 by the towers (mean of both directions) over training pairs; right: the ITC loss as the
logs hold it. RUN is the output folder of `imglish train`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def main(out: str, *runs: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for run in map(Path, runs):
        log = events(run)
        checks = [(e["step"], e["towers"]) for e in log if e["event"] == "validation"]
        left.plot([s for s, _ in checks], [(r["i2t_r10"] + r["t2i_r10"]) / 2 for _, r in checks], "o-", label=run.name)
        losses = [(e["step"], e["losses"]["itc"]) for e in log if e["event"] == "step" and "itc" in e["losses"]]
        right.plot([s for s, _ in losses], [v for _, v in losses], label=run.name)
    left.set(xlabel="step", ylabel="R@10, towers, %", ylim=(0, None))
    left.axhline(1.0, color="grey", linestyle=":", label="chance")
    right.set(xlabel="step", ylabel="ITC loss")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
