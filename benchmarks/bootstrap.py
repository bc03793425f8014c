"""Bootstrapping: a filter over many simulated rows, and scoring of all texts of a picture together.

    python benchmarks/bootstrap.py filter --rows 1000000
    python benchmarks/bootstrap.py score --model MODEL --pictures 32 --texts 5

`filter` prints seconds and the peak of memory; `score` compares with one pair at a time in the same process.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from imglish.bootstrapping.filtering import FilterConfig, Scores, decide


def simulated(rows: int, texts: int = 5) -> Scores:
    """Pictures with one web and ``texts - 1`` synthetic texts of a small vocabulary."""
    import pyarrow as pa

    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(2000)])
    picture = np.arange(rows) // texts
    chosen = words[rng.zipf(1.3, (rows, 8)).clip(1, 2000) - 1]
    columns = {
        "key": [f"{p:09d}.jpg" for p in picture.tolist()],
        "root": ["photos"] * rows,
        "image": [f"{p:09d}.jpg" for p in picture.tolist()],
        "record": pa.array((picture % 10_000).astype(np.int32)),
        "origin": np.where(np.arange(rows) % texts, "synthetic", "web").tolist(),
        "text": [" ".join(line) for line in chosen.tolist()],
        "problem": pa.nulls(rows, pa.string()),
        "itm": pa.array(rng.beta(0.5, 0.4, rows).astype(np.float32)),
        "itc": pa.array(rng.normal(0.25, 0.08, rows).astype(np.float32)),
        "ranker_itm": pa.nulls(rows, pa.float32()),
        "ranker_itc": pa.array(rng.normal(0.25, 0.08, rows).astype(np.float32)),
        "shard": pa.array((picture // 10_000).astype(np.int32)),
    }
    return Scores(pa.table(columns))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_filter(rows: int) -> None:
    scores = simulated(rows)
    before = peak()
    for name, config in (
        ("published rule", FilterConfig()),
        (
            "with lengths, repeats and the best of a picture",
            FilterConfig(max_words=40, max_repeats=100, best=((1, "itc"),)),
        ),
        ("also nearly equal texts", FilterConfig(near=0.8)),
    ):
        start = time.perf_counter()
        kept = int(decide(scores, config).kept.sum())
        print(f"{name}: {time.perf_counter() - start:.2f} s, {kept:,} of {rows:,} kept")
    print(f"memory: {before:.2f} GiB with the simulated rows, {peak():.2f} GiB at the peak")


def run_score(path: str, pictures: int, texts: int) -> None:
    import io

    import torch
    from PIL import Image

    import imglish
    from imglish.bootstrapping.scoring import Scorer
    from imglish.data.records import Record

    rng = np.random.default_rng(0)
    records, captions = [], []
    words = [
        "a",
        "dog",
        "runs",
        "over",
        "the",
        "green",
        "grass",
        "red",
        "ball",
        "man",
        "woman",
        "and",
        "child",
        "street",
    ]
    for i in range(pictures):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(file, "PNG")
        records.append(Record(str(i), file.getvalue(), (), i))
        captions.append([" ".join(rng.choice(words, 9)) for _ in range(texts)])
    scorer, single = (Scorer(imglish.load(path), block=block) for block in (16, 1))
    list(scorer.score(records[:2], captions[:2]))
    start = time.perf_counter()
    together = torch.tensor(np.stack([np.stack(one) for one in scorer.score(records, captions)]))
    middle = time.perf_counter()
    alone = [[next(single.score([record], [[text]])) for text in own] for record, own in zip(records, captions)]
    end = time.perf_counter()
    other = torch.tensor(np.array(alone)[..., 0]).transpose(1, 2)
    first, second = middle - start, end - middle
    pairs = pictures * texts
    print(f"{pairs / first:.1f} texts/s together, {pairs / second:.1f} one pair at a time: {second / first:.1f} times")
    print(f"largest difference of a score: {(together - other).nan_to_num().abs().max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("filter", "score"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--texts", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.what == "filter":
        run_filter(arguments.rows)
    elif arguments.model is None:
        parser.error("score needs --model")
    else:
        run_score(arguments.model, arguments.pictures, arguments.texts)


if __name__ == "__main__":
    main()
