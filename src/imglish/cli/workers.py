"""Options of the commands that work on shards in several processes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imglish.bootstrapping.stage import Done, Stage


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("shards and workers")
    add = group.add_argument
    add("--per-shard", type=int, default=2000, help="records of a shard, where the data have none (default: 2000)")
    add("--worker", metavar="I/N", help="this is worker I of N, from 0 (default: as torchrun or Slurm says)")
    add("--lease", type=float, default=120, help="seconds without a sign of life: a worker is dead (default: 120)")


def worker_of(text: str | None) -> tuple[int, int]:
    """(rank, workers) of an option, or of the environment. Raises ``ValueError``."""
    if text is not None:
        rank, _, world = text.partition("/")
        if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
            raise ValueError(f"--worker {text}: expected I/N with I from 0 to N - 1")
        return int(rank), int(world)
    for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if all(os.environ.get(name, "").isdigit() for name in names):
            return int(os.environ[names[0]]), int(os.environ[names[1]])
    return 0, 1


def device_of(device: str | None) -> str | None:
    """Of several workers on a machine each has a GPU of its own."""
    import torch

    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if device is None and local is not None and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return device


def said(line: str) -> None:
    from imglish.data.errors import printable

    print(printable(line), file=sys.stderr)


def failures(command: str, stage: Stage, done: Done) -> int:
    """Say which shards failed; the exit status."""
    for name, why in done.failed.items():
        said(f"{command}: shard {name} is left out: {why}")
    if done.failed:
        said(f"{command}: {len(done.failed)} of {len(stage.shards)} shards failed; the same command tries them again")
    return 1 if done.failed else 0


def is_stage_folder(out: Path | None) -> bool:
    """Whether ``--out`` asks for a folder of shards: a name without an ending, or a folder."""
    return out is not None and (out.is_dir() or (not out.suffix and not out.is_file()))
