"""Counters in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds


class Metrics:
    """What the server did since it started; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, int], int] = defaultdict(int)
        self._seconds: dict[str, list[float]] = {}  # stage: counts by bound, count, sum
        self._batches = self._batched = self._refused = 0

    def request(self, route: str, status: int) -> None:
        """route: the template, never what the client wrote, so that the number of lines is bounded."""
        with self._lock:
            self._requests[route, status] += 1

    def answered(self, stage: str, seconds: float) -> None:
        """stage: ``towers`` or ``reranked``; seconds: with the time in the queue."""
        with self._lock:
            row = self._seconds.setdefault(stage, [0.0] * (len(BOUNDS) + 2))
            place = bisect_left(BOUNDS, seconds)
            if place < len(BOUNDS):
                row[place] += 1
            row[-2] += 1
            row[-1] += seconds

    def batch(self, size: int) -> None:
        with self._lock:
            self._batches += 1
            self._batched += size

    def refused(self) -> None:
        """A search met a full queue."""
        with self._lock:
            self._refused += 1

    def text(self, waiting: int, pictures: int) -> str:
        """All lines. waiting: searches in the queue now; pictures: in the index."""
        with self._lock:
            lines = _head("imglish_requests_total", "counter", "HTTP requests by route and status.")
            for (route, status), count in sorted(self._requests.items()):
                lines.append(f'imglish_requests_total{{route="{route}",status="{status}"}} {count}')
            lines += _head("imglish_search_seconds", "histogram", "From the arrival of a search to its answer.")
            for stage, row in sorted(self._seconds.items()):
                lines += _histogram(stage, row)
            for name, kind, value, says in (
                ("imglish_batches_total", "counter", self._batches, "Batches of first answers."),
                ("imglish_batched_searches_total", "counter", self._batched, "Searches in these batches."),
                ("imglish_refused_total", "counter", self._refused, "Searches refused because the queue was full."),
                ("imglish_waiting", "gauge", waiting, "Searches in the queue."),
                ("imglish_pictures", "gauge", pictures, "Pictures in the index."),
            ):
                lines += [*_head(name, kind, says), f"{name} {value}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, says: str) -> list[str]:
    return [f"# HELP {name} {says}", f"# TYPE {name} {kind}"]


def _histogram(stage: str, row: list[float]) -> list[str]:
    name, lines, below = "imglish_search_seconds", [], 0.0
    for bound, count in zip(BOUNDS, row):
        below += count
        lines.append(f'{name}_bucket{{stage="{stage}",le="{bound}"}} {below:.0f}')
    lines.append(f'{name}_bucket{{stage="{stage}",le="+Inf"}} {row[-2]:.0f}')
    return [*lines, f'{name}_sum{{stage="{stage}"}} {row[-1]:.6f}', f'{name}_count{{stage="{stage}"}} {row[-2]:.0f}']
