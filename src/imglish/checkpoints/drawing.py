"""Models whose weights come from a file: nothing is drawn or allocated for them but what the file lacks."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

_SEED = 0


@contextmanager
def undrawn() -> Iterator[None]:
    """Models that are built within are on the meta device: names and shapes alone."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """On the meta device normal numbers are not drawn: torch's rule for doing so imports its compiler, which costs
    every command seconds and a hundred megabytes, and then does nothing."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__name__", "") == "normal_" and (tensor := args[0] if args else given["tensor"]).is_meta:
            return tensor
        return func(*args, **given)


def drawn(build: Callable[[], nn.Module], wanted: Callable[[str, nn.Parameter], bool]) -> nn.Module:
    """The model that ``build`` makes, with first values for the parameters that are ``wanted`` (by name and shape) and
    the others on the meta device.

    The model's own code draws them, so they are distributed as in a new model. The seed is fixed and the random numbers
    of the process stay as they are. The same choice gives the same values, another one others: random numbers are
    handed out in the order in which the model asks for them.
    """
    made: list[nn.Parameter] = []
    with undrawn(), _Registered(made.append):
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

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _NothingDrawn(), _Registered(away):
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
