"""Measuring two implementations side by side in one process: time, peak memory, a table."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

H200_BF16_PEAK = 989e12
"""FLOP a second, dense; the usual denominator of MFU on H100 and H200."""


@dataclass(frozen=True)
class Measured:
    """seconds: median of the repeats; peak: bytes above what was in use before the first repeat."""

    seconds: float
    peak: int


def arguments(description: str) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats; the median counts")
    return parser


def measure(
    contenders: dict[str, Callable[[], object]], repeats: int, device: str, peaks: bool = True
) -> dict[str, Measured]:
    """Run every contender once to warm up and find its peak memory, then all of them in turn, ``repeats`` times.

    Taking turns lets a busy machine slow all of them alike. ``peaks=False`` leaves out the memory: on a CPU the
    profiler needs minutes for a run of very many small operations.
    """
    found = {name: _peak(run, device) if peaks else _warmed(run) for name, run in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            seconds[name].append(_timed(run, device))
    return {name: Measured(statistics.median(seconds[name]), found[name]) for name in contenders}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _timed(run: Callable[[], object], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _warmed(run: Callable[[], object]) -> int:
    run()
    return 0


def _peak(run: Callable[[], object], device: str) -> int:
    """Bytes of tensors that one run holds at once on top of what is there."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


def machine(device: str) -> str:
    """One line that says what was measured on."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    model = names[0].split(":")[1].strip() if names else "CPU"
    return f"{model}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def megabytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
