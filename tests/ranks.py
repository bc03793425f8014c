"""Run a test function on several real gloo processes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """``work(rank, *args)`` on ``world`` processes of one group; their results, in order.

    ``work`` must be a function of a module, because the processes import it.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(world, folder, work, args), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        torch.save(work(rank, *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
