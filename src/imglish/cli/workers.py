"""Options of the commands that work on shards in several processes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imglish.bootstrapping.stage import Done, Stage


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which part of the work this process does."""
    group = parser.add_argument_group("shards and workers")
    add = group.add_argument
    add("--per-shard", type=int, default=2000, help="records of a shard, where the data have none (default: 2000)")
    add("--worker", metavar="I/N", help="this is worker I of N, from 0 (default: as torchrun or Slurm says)")
    add("--ray", type=int, metavar="N", help="be N workers, tasks of a Ray cluster (RAY_ADDRESS; else of this machine)")
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


def on_ray(command: str, argv: Sequence[str], workers: int) -> int:
    """Run a command as ``workers`` tasks of Ray Data, each of them the plain worker I/N of it; the worst status.

    Ray chooses the machines, gives each task a GPU where there is one for each, and starts anew what died; the shards
    are the workers' own affair, as without Ray. All machines need the same file system.
    """
    try:
        ray, data = import_module("ray"), import_module("ray.data")
    except ImportError as error:
        raise ValueError("--ray needs Ray: pip install 'imglish[ray]'") from error
    if workers < 1:
        raise ValueError(f"--ray {workers}: at least one worker")
    own, folder = list(argv), os.getcwd()
    place = next(i for i, argument in enumerate(own) if argument.split("=")[0] in ("--ray", "--ra"))
    del own[place : place + (1 if "=" in own[place] else 2)]

    def work(row: dict[str, Any]) -> dict[str, Any]:
        from imglish.cli import main

        os.chdir(folder)
        return {"status": main([command, *own, "--worker", f"{row['id']}/{workers}"])}

    ray.init(ignore_reinit_error=True)
    enough = ray.cluster_resources().get("GPU", 0) >= workers
    tasks = data.range(workers, override_num_blocks=workers).map(work, num_gpus=1 if enough else 0)
    return max(int(row["status"]) for row in tasks.take_all())


def device_of(device: str | None) -> str | None:
    """Of several workers on a machine each has a GPU of its own."""
    import torch

    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if device is None and local is not None and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return device


def said(line: str) -> None:
    """Print a line to the standard error, harmless in a terminal."""
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
