"""How long exact recall takes, by number of pictures and of queries at once; and what rereading a table costs.

    python benchmarks/search_index.py [--rows 10000,100000,1000000] [--dimension 256]

Vectors are random; the time does not depend on what they hold. Prints milliseconds a query (p50, p95) and the memory of
the matrix. Compare numbers of one run only: they depend on the machine and on what else it does.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from imglish.search.exact import Matrix

TRIALS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="10000,100000")
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--k", type=int, default=50)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {arguments.dimension} numbers, k = {arguments.k}")
    print(f"{'rows':>9} {'MiB':>6} {'queries':>8} {'filter':>7} {'p50 ms':>8} {'p95 ms':>8}  a query")
    for rows in map(int, arguments.rows.split(",")):
        keys = np.array([f"photos/{i:08d}.jpg" for i in range(rows)], dtype=object)
        matrix = Matrix(torch.randn(rows, arguments.dimension).half(), keys, np.arange(rows))
        few = np.sort(np.random.default_rng(0).choice(rows, rows // 100, replace=False))
        for count, chosen in ((1, None), (8, None), (32, None), (1, few)):
            queries = np.random.default_rng(1).normal(size=(count, arguments.dimension)).astype(np.float32)
            matrix.search(queries, arguments.k, chosen)
            times = []
            for _ in range(TRIALS):
                began = time.perf_counter()
                matrix.search(queries, arguments.k, chosen)
                times.append((time.perf_counter() - began) / count * 1e3)
            p50, p95 = np.percentile(times, [50, 95])
            size = matrix.vectors.numel() * 2 / 2**20
            share = "1 %" if chosen is not None else "none"
            print(f"{rows:>9} {size:>6.0f} {count:>8} {share:>7} {p50:>8.2f} {p95:>8.2f}")


if __name__ == "__main__":
    main()
