"""First values for those weights of a model that a checkpoint lacks; the others are neither drawn nor allocated."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_SEED = 0


def drawn(build: Callable[[], nn.Module], wanted: Callable[[str, nn.Parameter], bool]) -> nn.Module:
    """The model that ``build`` makes, with first values for the parameters that are ``wanted`` (by name and shape) and
    the others on the meta device.

    The model's own code draws them, so they are distributed as in a new model. The seed is fixed and the random numbers
    of the process stay as they are. The same choice gives the same values, another one others: random numbers are
    handed out in the order in which the model asks for them.
    """
    made: list[nn.Parameter] = []
    with torch.device("meta"), _Registered(made.append):
        model = build()
    chosen = {id(held) for name, held in model.named_parameters(remove_duplicate=False) if wanted(name, held)}
    numbers = {number for number, parameter in enumerate(made) if id(parameter) in chosen}
    count = -1

    def away(parameter: nn.Parameter) -> nn.Parameter | None:
        nonlocal count
        count += 1
        if count in numbers or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _Registered(away):
        warnings.filterwarnings("ignore", ".*which is a no-op")  # parts that begin as copies of others
        torch.manual_seed(_SEED)
        model = build()
    left = [name for name, held in model.named_parameters() if held.is_meta and wanted(name, held)]
    assert not left, f"{left[:3]} were never registered by a module: copied from what is not there"
    return model


class _Registered:
    """Within ``with``: ``see`` is given every parameter when a module of this thread takes it, and may give another in
    its place, before anything is drawn for it."""

    def __init__(self, see: Callable[[nn.Parameter], nn.Parameter | None]) -> None:
        self._see, self._thread = see, threading.get_ident()

    def __enter__(self) -> None:
        self._handle = register_module_parameter_registration_hook(self._hook)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _hook(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        mine = parameter is not None and threading.get_ident() == self._thread
        return self._see(parameter) if mine and parameter is not None else None
