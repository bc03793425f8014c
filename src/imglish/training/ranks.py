"""Processes of a run: started by torchrun, or a single one without any launcher."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from imglish.objectives.gather import world_size
from imglish.training.settings import SettingsError


def pick_device(name: str | None) -> torch.device:
    """The device of this process: as named, or a GPU where there is one (its number from torchrun), else the CPU."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise SettingsError("compute.device", f"{name!r} is not a device; use cpu, cuda or cuda:0") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SettingsError("compute.device", f"{wanted} was asked for, but torch sees no GPU; use cpu")
        device = torch.device("cuda", device.index if device.index is not None else local)
        torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device, meeting: str = "env://") -> Iterator[None]:
    """Join the group that torchrun describes in the environment; without torchrun, or inside a group, do nothing.

    meeting: where the processes find each other, torch's ``init_method``. The group has a CPU backend on GPUs too:
    small decisions (stop, save) travel there without waiting for the device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world < 2 or dist.is_initialized():
        yield
        return
    # Its functions take the world's group as a default argument: imported first inside a group (torch's activation
    # checkpointing does) they would keep it, and gloo's threads would outlive it and abort the process as it ends.
    import torch.distributed.nn  # noqa: F401

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=int(os.environ["RANK"]), world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean over ranks of a tensor of equal shape on all of them."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values = values / world_size()
    return values


class Agreement:
    """Numbers on which all ranks act in the same step: the largest that any rank said.

    With several ranks the answer of a step is what was said one step before: it travels while the step computes.
    """

    def __init__(self) -> None:
        self._under_way: tuple[Tensor, dist.Work | None] | None = None

    def say(self, *values: int) -> tuple[int, ...]:
        """Say this rank's numbers; returns what all ranks agreed on (zeros at first when there are several)."""
        if world_size() == 1:
            return values
        before = self._under_way
        said = torch.tensor(values, dtype=torch.int64)
        self._under_way = (said, dist.all_reduce(said, op=dist.ReduceOp.MAX, async_op=True))
        if before is None:
            return (0,) * len(values)
        agreed, work = before
        if work is not None:
            work.wait()
        return tuple(int(n) for n in agreed.tolist())

    def finish(self) -> None:
        """Wait for what is under way, before the group ends."""
        if self._under_way is not None and self._under_way[1] is not None:
            self._under_way[1].wait()
        self._under_way = None
