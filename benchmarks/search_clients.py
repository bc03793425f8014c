"""Searching an index by words, many clients at once: latency, throughput, memory.

    python -m benchmarks.search_clients --rows 10000 100000 1000000

What the server does for a client, without HTTP: the text tower, exact recall, what a list shows of 40 pictures. Vectors
are random (the time does not depend on what they hold), the index is a real one in a temporary folder. Each client asks
again as soon as it has its answer, and never the same twice. One thread computes for all of them, with ``--threads``
cores. The first search loads the vectors.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import arguments, machine, megabytes, milliseconds, table
from imglish.api import Model
from imglish.checkpoints import native
from imglish.data.tokenizers import Tokenizer
from imglish.models import registry
from imglish.search import Index, Query
from imglish.search.manifest import describe
from imglish.search.store import Row, Store, open_store
from imglish.web.batching import Batcher

WORDS = ["a", "the", "red", "green", "black", "small", "dog", "cat", "shirt", "child", "snow", "grass", "runs", "in"]
AT_ONCE = 100_000  # rows a commit


def random_model(name: str, device: str) -> Model:
    """With random weights."""
    torch.manual_seed(0)
    words = Tokenizer.train_wordpiece([" ".join(WORDS)] * 2, 200)  # what is seen once is cut into letters
    config = registry.named(name)
    return Model(native.Loaded(registry.build(config).eval(), words, config, "itc", {}), device)


def fill(store: Store, rows: int) -> None:
    """Random vectors with names, captions and sizes, of which nothing can be seen."""
    rng = np.random.default_rng(0)
    for low in range(0, rows, AT_ONCE):
        count = min(AT_ONCE, rows - low)
        vectors = rng.normal(size=(count, store.dimension)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        names = (f"photos/{low + i:08d}.jpg" for i in range(count))
        half = vectors.astype(np.float16)
        store.upsert([Row(name, v, captions=("a dog",), width=640, height=480) for name, v in zip(names, half)])
    store.optimize()


def run(index: Index, clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each search, and searches a second."""
    batcher: Batcher[Query, object] = Batcher(index.search_many)
    taken: list[float] = []
    number = itertools.count()
    end = time.perf_counter() + seconds

    def client(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while (began := time.perf_counter()) < end:
            text = " ".join(rng.choice(WORDS, 10)) + f" {next(number)}"
            batcher.first(Query(text, k=40, rerank=0)).result()
            taken.append(time.perf_counter() - began)

    threads = [threading.Thread(target=client, args=(clients * 1000 + i,)) for i in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batcher.close()
    return taken, len(taken) / (time.perf_counter() - began)


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", default="albef-base")
    parser.add_argument("--rows", nargs="+", type=int, default=[10_000])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(options.model, options.device)
        manifest = describe(model, options.model)
        for rows in options.rows:
            before = resident()
            store = open_store(f"{folder}/{rows}", manifest.dimension)
            began = time.perf_counter()
            fill(store, rows)
            written = time.perf_counter() - began
            index = Index(store, manifest, model)
            began = time.perf_counter()
            index.search("a dog", rerank=0)
            first = time.perf_counter() - began
            for clients in options.clients:
                taken, rate = run(index, clients, options.seconds)
                p50, p95 = np.percentile(taken, [50, 95])
                lines.append([f"{rows:,}", str(clients), milliseconds(p50), milliseconds(p95), f"{rate:.1f}"])
            more = megabytes(resident() - before)
            print(f"{rows:,} rows: written in {written:.1f} s, {more} more in memory, first search {first:.2f} s")
            index.close()
    print(f"\n{options.model}, {manifest.dimension} numbers a picture; {machine(options.device)}\n")
    print(table(["pictures", "clients", "p50", "p95", "searches a second"], lines))


if __name__ == "__main__":
    main()
