"""Run a test function on several real gloo processes."""

from __future__ import annotations

import os
import tempfile
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
    """Names of the threads of this process that gloo started."""
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


def _rank(rank: int, world: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    with process_group(torch.device("cpu"), f"file://{folder}/meeting"):
        torch.save(work(rank, *args), Path(folder) / f"{rank}.pt")
    assert not gloo_threads(), "they would abort the process when it ends"
