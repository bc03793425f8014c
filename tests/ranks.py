"""Run a test function on several real gloo processes."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from imglish.training.ranks import process_group


def run_ranks(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """``work(rank, *args)`` on ``world`` processes of one group; their results, in order.

    ``work`` must be a function of a module, because the processes import it.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(world, folder, work, args), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def gloo_threads() -> list[str]:
    """Names of the threads of this process that gloo started (on Linux)."""
    names = []
    for task in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that ends this moment
            names.append(task.read_text().strip())
    return [name for name in names if "gloo" in name]


def _rank(rank: int, world: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    with process_group(torch.device("cpu"), f"file://{folder}/meeting"):
        torch.save(work(rank, *args), Path(folder) / f"{rank}.pt")
    ends = time.monotonic() + 10
    while gloo_threads():  # one that was joined may be seen for a moment
        assert time.monotonic() < ends, f"{gloo_threads()} would abort the process when it ends"
        time.sleep(0.001)
