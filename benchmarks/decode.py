"""Feeding pictures: images a second and core, over workers, and how long a training step waits.

    python -m benchmarks.decode --workers 1 2
    python -m benchmarks.decode --images photos --workers   # how much reduced ones of your own differ
    python -m benchmarks.decode --size 384 --photos 200 --workers 1 4 16 --step-ms 20

The peer is what people write first: Pillow decodes in full, a random part is cut out and resized, becomes float32 and
is normalised, and torch's DataLoader puts batches together. Ours decodes JPEGs at a reduced size (``good``, ``fast``)
and hands over uint8. Both take the same parts of the same photographs
(``--crop 1``: the whole of them, as for an index). Rates by core are CPU time of one process, so a busy machine
disturbs them little; rates over workers are wall time, "scaling" is to the first number of workers. How far ahead the
workers should be: benchmarks/prefetch.py.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import arguments, machine, table
from imglish.data.dataset import PairDataset, Purpose, collate, stream
from imglish.data.images import Detail, ImageTransform
from imglish.data.loader import training_batches
from imglish.data.records import Record

DETAILS: tuple[Detail, ...] = ("full", "good", "fast")
MEAN, STD = torch.tensor([0.481, 0.458, 0.408])[:, None, None], torch.tensor([0.269, 0.261, 0.276])[:, None, None]


def photograph(seed: int, width: int, height: int) -> bytes:
    """A JPEG with the detail of a photograph at every scale: noise whose amplitude falls with the frequency."""
    rng = np.random.default_rng(seed)
    layers = np.zeros((height, width, 3), dtype=np.float32)
    for side in (3, 9, 27, 81, 243, 729):
        small = rng.normal(0, 60 / side**0.4, (side * height // width + 2, side + 1, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(small[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            layers[..., channel] += np.asarray(layer)
    layers[..., 1:] = 0.6 * layers[..., :1] + 0.4 * layers[..., 1:]  # colours vary less than brightness
    buffer = io.BytesIO()
    Image.fromarray(np.clip(layers + 128, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=87)
    return buffer.getvalue()


class Peer(Dataset[torch.Tensor]):
    """Plain Pillow."""

    def __init__(self, paths: list[Path], transform: ImageTransform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int) -> torch.Tensor:
        image = Image.open(self.paths[item]).convert("RGB")
        box = self.transform.box(*image.size, stream(0, 0, item, Purpose.IMAGE))
        resized = image.resize((self.transform.size, self.transform.size), Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        return (pixels - MEAN) / STD


def ours(paths: list[Path], transform: ImageTransform, detail: Detail) -> PairDataset:
    records = [Record(path.name, path, ("",), number) for number, path in enumerate(paths)]
    return PairDataset(records, transform, None, detail=detail)


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def by_core(paths: list[Path], transform: ImageTransform, repeats: int) -> list[list[str]]:
    """Images a second of CPU time and the mean difference to full decoding, contender by contender."""
    peer = Peer(paths, transform)
    datasets = {detail: ours(paths, transform, detail) for detail in DETAILS}
    numbers = range(len(paths))
    contenders: dict[str, Callable[[], object]] = {
        "plain Pillow": lambda: torch.stack([peer[i] for i in numbers]),
        **{f"ours, {d}": lambda s=s: collate([s.sample(0, 0, i) for i in numbers]) for d, s in datasets.items()},
    }
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            seconds[name].append(cpu_seconds(run))
    images = {d: collate([s.sample(0, 0, i) for i in numbers]).images.float() for d, s in datasets.items()}  # type: ignore[union-attr]
    exact = torch.stack([(peer[i] * STD + MEAN) * 255 for i in numbers])
    errors = {f"ours, {d}": float((pictures - exact).abs().mean()) for d, pictures in images.items()}
    base = statistics.median(seconds["plain Pillow"])
    rows = []
    for name, times in seconds.items():
        middle = statistics.median(times)
        rate, error = f"{len(paths) / middle:.0f}", f"{errors.get(name, 0.0):.2f}"
        rows.append([name, rate, f"{base / middle:.2f}x", error])
    return rows


def by_reduction(paths: list[Path]) -> list[list[str]]:
    """Mean difference to the whole picture, of 255, where a reduced one is made smaller by 1, 1.5, 2, 3; and that of
    bilinear in place of bicubic interpolation, as a measure."""
    rows = []
    for scale in (2, 4):
        for left in (1.0, 1.5, 2.0, 3.0):
            differences = []
            for path in paths:
                whole, reduced = Image.open(path), Image.open(path)
                reduced.draft("RGB", (whole.width // scale, whole.height // scale))
                size = round(whole.width / scale / left), round(whole.height / scale / left)
                exact, found, other = (
                    np.asarray(image.convert("RGB").resize(size, how), dtype=np.float32)
                    for image, how in (
                        (whole, Image.Resampling.BICUBIC),
                        (reduced, Image.Resampling.BICUBIC),
                        (whole, Image.Resampling.BILINEAR),
                    )
                )
                differences.append((np.abs(found - exact).mean(), np.abs(other - exact).mean()))
            found, other = np.mean(differences, axis=0)
            rows.append([f"1/{scale}", f"{left:g}", f"{found:.1f}", f"{other:.1f}"])
    return rows


def loaders(
    paths: list[Path], transform: ImageTransform, batch: int, workers: int
) -> dict[str, Callable[[], Iterator[object]]]:
    def endless() -> Iterator[object]:
        while True:
            yield from DataLoader(Peer(paths, transform), batch, shuffle=True, num_workers=workers, drop_last=True)

    def batches(detail: Detail) -> Iterator[object]:
        return training_batches(ours(paths, transform, detail), batch, workers=workers)

    return {
        "plain Pillow": endless,
        "ours, good": lambda: batches("good"),
        "ours, fast": lambda: batches("fast"),
    }


@dataclass(frozen=True)
class Fed:
    """first: seconds to the first batch; rate: images a second of the following ones; waiting: share of the time that
    steps wait that keep the device busy for a while."""

    first: float
    rate: float
    waiting: float


def feed(make: Callable[[], Iterator[object]], batch: int, count: int, step: float) -> Fed:
    start = time.perf_counter()
    batches = make()
    next(batches)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    rate = count * batch / (time.perf_counter() - start)
    waited = 0.0
    start = time.perf_counter()
    for _ in range(count):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(step)  # the device computes, the host is free
    return Fed(first, rate, waited / (time.perf_counter() - start))


def over_workers(
    paths: list[Path],
    transform: ImageTransform,
    batch: int,
    workers: Sequence[int],
    count: int,
    step: float,
    turns: int,
) -> list[list[str]]:
    """Medians of several turns, in each of which every loader runs once, alone."""
    found: dict[tuple[int, str], list[Fed]] = {}
    for _ in range(turns):
        for number in workers:
            for name, make in loaders(paths, transform, batch, number).items():
                found.setdefault((number, name), []).append(feed(make, batch, count, step))
    rates = {key: statistics.median(fed.rate for fed in turn) for key, turn in found.items()}
    return [
        [
            str(number),
            name,
            f"{statistics.median(fed.first for fed in found[number, name]):.2f} s",
            f"{rate:.0f}",
            f"{rate / rates[number, 'plain Pillow']:.2f}x",
            f"{rate / rates[workers[0], name]:.2f}x",
            f"{100 * statistics.median(fed.waiting for fed in found[number, name]):.0f} %",
        ]
        for (number, name), rate in rates.items()
    ]


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of JPEGs in place of made photographs")
    parser.add_argument("--photos", type=int, default=64)
    parser.add_argument("--width", type=int, default=1400)
    parser.add_argument("--height", type=int, default=1050)
    parser.add_argument("--size", type=int, default=224, help="side of the pictures in a batch")
    parser.add_argument("--crop", type=float, default=0.5, help="smallest share of the random part")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=8, help="timed batches of a loader")
    parser.add_argument("--turns", type=int, default=3, help="of all loaders; the median counts")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--step-ms", type=float, default=100.0, help="of a training step on the device")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transform = ImageTransform(options.size, crop_scale=(options.crop, 1.0))
    with tempfile.TemporaryDirectory() as folder:
        if options.images is not None:
            paths = sorted(options.images.glob("*.jp*g"))[: options.photos]
        else:
            paths = [Path(folder) / f"{number}.jpg" for number in range(options.photos)]
            for number, path in enumerate(paths):
                path.write_bytes(photograph(number, options.width, options.height))
        mean = sum(path.stat().st_size for path in paths) / len(paths)
        print(machine("cpu"))
        size = f"{options.width}x{options.height}" if options.images is None else f"photographs of {options.images}"
        print(f"{size}, {mean / 1024:.0f} KiB on average, to {options.size}\n")
        rows = by_core(paths, transform, options.repeats)
        print(table(["by core", "images/s", "", "mean difference of 255"], rows))
        if options.images is not None:
            print("\n" + table(["reduced to", "times wanted", "mean difference", "bilinear"], by_reduction(paths)))
        if not options.workers:
            return
        rows = over_workers(
            paths, transform, options.batch, options.workers, options.batches, options.step_ms / 1000, options.turns
        )
        waiting = f"waiting, steps of {options.step_ms:.0f} ms"
        print("\n" + table(["workers", "", "first batch", "images/s", "to plain", "scaling", waiting], rows))


if __name__ == "__main__":
    main()
