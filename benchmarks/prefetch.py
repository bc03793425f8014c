"""How many batches a worker should make ahead, and how many workers a training step needs.

    python -m benchmarks.prefetch
    python -m benchmarks.prefetch --size 384 --batch 64 --step-ms 400

Measured are the CPU seconds that pictures of three sizes take (``good``), in one process; web data mix them. From these
the loader is played through: every worker makes whole batches, at most ``prefetch`` ahead of the step that takes them,
and steps take batches in order. So the result depends on the pictures and on nothing else that runs on the machine.
Memory for what lies ready is workers x prefetch x batch x 3 x size^2 bytes. benchmarks/decode.py has the real loader.
"""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.common import arguments, machine, table
from benchmarks.decode import cpu_seconds, ours, photograph
from imglish.data.images import ImageTransform

SIZES = {(640, 480): 0.5, (1400, 1050): 0.4, (3000, 2250): 0.1}  # and their share
EACH = 2  # photographs of a size
BATCHES = 2000
AHEAD = (1, 2, 4, 8)


def seconds_of(size: tuple[int, int], transform: ImageTransform, folder: Path, repeats: int) -> float:
    """CPU seconds of one picture of this size."""
    paths = [folder / f"{size[0]}-{number}.jpg" for number in range(EACH)]
    for number, path in enumerate(paths):
        path.write_bytes(photograph(number, *size))
    dataset = ours(paths, transform, "good")
    runs = [cpu_seconds(lambda: [dataset.sample(0, 0, item) for item in range(EACH)]) for _ in range(repeats + 1)]
    return float(np.median(runs[1:])) / EACH


def waiting(batches: np.ndarray, workers: int, prefetch: int, step: float) -> float:
    """Share of the time that steps of ``step`` seconds wait, once the loader runs.

    batches: CPU seconds of each batch, float64 ``(N,)``; batch i is made by worker i modulo ``workers``, and is asked
    for when batch ``i - workers * prefetch`` is taken.
    """
    taken = np.zeros(len(batches))
    free = np.zeros(workers)
    now = waited = 0.0
    for number, cost in enumerate(batches):
        before = number - workers * prefetch
        asked = taken[before] if before >= 0 else 0.0
        worker = number % workers
        free[worker] = ready = max(free[worker], asked) + cost
        if number >= len(batches) // 10:  # the first ones wait for the start
            waited += max(ready - now, 0.0)
        taken[number] = max(now, ready)
        now = taken[number] + step
    return waited / (now - taken[len(batches) // 10])


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=224, help="side of the pictures in a batch")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=150.0, help="of a training step on the device")
    parser.add_argument("--stall", type=float, default=1.5, help="seconds that storage keeps one batch of a hundred")
    options = parser.parse_args()
    transform, step = ImageTransform(options.size, crop_scale=(0.5, 1.0)), options.step_ms / 1000
    with TemporaryDirectory() as folder:
        each = [seconds_of(size, transform, Path(folder), options.repeats) for size in SIZES]
    print(machine("cpu"))
    print(", ".join(f"{w}x{h}: {1000 * cost:.1f} ms" for (w, h), cost in zip(SIZES, each)))
    pictures = np.random.default_rng(0).choice(each, size=(BATCHES, options.batch), p=list(SIZES.values()))
    batches = pictures.sum(1)
    least = math.ceil(float(batches.mean()) / step)
    print(f"a batch: {batches.mean():.2f} s, so steps of {options.step_ms:g} ms need {least} workers\n")
    stalls = options.stall * (np.random.default_rng(1).random(BATCHES) < 0.01)
    rows = [
        [f"{workers}{what}", f"{100 * costs.mean() / workers / step:.0f} %"]
        + [f"{100 * waiting(costs, workers, ahead, step):.1f} %" for ahead in AHEAD]
        for workers in (max(1, least - 1), least, least + 1)
        for what, costs in (("", batches), (f", stalls of {options.stall:g} s", batches + stalls))
    ]
    print(table(["workers", "busy", *(f"waiting, {ahead} ahead" for ahead in AHEAD)], rows))


if __name__ == "__main__":
    main()
