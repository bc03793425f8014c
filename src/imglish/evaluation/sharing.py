"""Work of an evaluation split over ranks by blocks of fixed size, so that results do not depend on how many ranks.

Block b belongs to rank ``b % world``. A block's arithmetic is the same whoever does it, and what others made arrives by
broadcast or as a sum with zeros: one process and eight give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from imglish.objectives.gather import rank, world_size

Result = TypeVar("Result")


def blocks(total: int, size: int) -> list[range]:
    """``total`` items in consecutive blocks of ``size``, the last one shorter."""
    return [range(low, min(low + size, total)) for low in range(0, total, size)]


def mine(count: int) -> range:
    """Which of ``count`` blocks this rank does."""
    return range(rank(), count, world_size())


def share(part: Tensor | None, block: int, device: torch.device) -> Tensor:
    """The result of ``block`` on every rank's ``device``: its owner passes it, the others None."""
    if world_size() == 1:
        if part is None:
            raise ValueError(f"block {block} has one owner, which has to pass it")
        return part
    source = block % world_size()
    header: list[Any] = [None if part is None else (part.shape, part.dtype)]
    dist.broadcast_object_list(header, src=source)
    shape, dtype = header[0]
    held = _for_transport(torch.empty(shape, dtype=dtype, device=device) if part is None else part.contiguous())
    dist.broadcast(held.view(torch.uint8), src=source)
    return held.to(device)


def add_up(part: Tensor) -> Tensor:
    """Sum over ranks of tensors that hold each rank's own entries and zeros elsewhere."""
    if world_size() == 1:
        return part
    held = _for_transport(part)
    dist.all_reduce(held)
    return held.to(part.device)


def from_first(value: Tensor) -> Tensor:
    """Rank 0's host tensor on every rank: for decisions that all have to share to the last bit."""
    if world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def on_first(work: Callable[[], Result]) -> Result:
    """What ``work`` gives, done on rank 0 alone, on every rank; a ``ValueError`` is raised on all."""
    if world_size() == 1:
        return work()
    held: list[Any] = [None]
    if rank() == 0:
        try:
            held = [work()]
        except ValueError as error:
            held = [error]
    dist.broadcast_object_list(held, src=0)
    if isinstance(held[0], ValueError):
        raise held[0]
    found: Result = held[0]
    return found


def _for_transport(x: Tensor) -> Tensor:
    """``x`` where the process group can send it: NCCL alone sends from GPUs only."""
    return x.cuda() if dist.get_backend() == "nccl" else x
