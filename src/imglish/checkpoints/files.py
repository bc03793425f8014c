"""Weight files of other projects, read without running anything that they contain.

safetensors; PyTorch pickles by ``weights_only``; and the TorchScript archives in which openai/CLIP is published: of
those only the tensors are read, through an unpickler that knows nothing but tensors, and the code in them is searched
for the names of parameters and buffers, never compiled.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_NESTED = ("state_dict", "model")


class WeightFileError(ValueError):
    """A file that is not a weight file we can read safely; the message names it."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Name -> tensor (on the CPU) of a ``.safetensors``, ``.pt``/``.pth``/``.bin`` or TorchScript file.

    A training checkpoint that holds its weights under ``state_dict`` or ``model`` gives those; the prefix ``module.``
    of data-parallel training is taken off. Raises :class:`WeightFileError`, or :class:`OSError` for a missing file.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            return _read_torchscript(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # what a damaged or foreign file does to its reader cannot be foreseen
        raise WeightFileError(f"{path}: not a weight file that can be read safely ({error})") from error
    for key in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise WeightFileError(f"{path}: does not hold a state dict (names and tensors, or them under {_NESTED})")
    if loaded and all(name.startswith("module.") for name in loaded):
        loaded = {name.removeprefix("module."): value for name, value in loaded.items()}
    return dict(loaded)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class _Module:
    """A scripted module: its class and its attributes, without any behaviour."""

    kind = ""

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes


class _TensorUnpickler(pickle.Unpickler):
    """Builds tensors, containers and :class:`_Module`; every other class is an error."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(archive.open(f"{folder}/data.pkl"))
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type(name, (_Module,), {"kind": f"{module}.{name}"})
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        if count == 0:
            return torch.empty(0, dtype=dtype)
        data = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
        return torch.frombuffer(data, dtype=dtype, count=count)


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset).contiguous()


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        folder = next(n for n in archive.namelist() if n.endswith("/constants.pkl")).removesuffix("/constants.pkl")
        registered = _registered_names(archive, folder)
        root = _TensorUnpickler(archive, folder).load()
    return dict(_tensors(root, registered, ""))


def _registered_names(archive: zipfile.ZipFile, folder: str) -> dict[str, set[str]]:
    """Class -> names of its parameters and buffers, which the archived class declarations list."""
    found: dict[str, set[str]] = {}
    for file in archive.namelist():
        if file.startswith(f"{folder}/code/") and file.endswith(".py"):
            module = file.removeprefix(f"{folder}/code/").removesuffix(".py").replace("/", ".")
            for block in re.split(r"^class ", archive.read(file).decode(), flags=re.MULTILINE)[1:]:
                lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*?)\]", block, flags=re.MULTILINE)
                kind = re.match(r"\w+", block)
                if kind is not None:
                    found[f"{module}.{kind.group()}"] = set(re.findall(r'"([^"]+)"', " ".join(lists)))
    return found


def _tensors(module: _Module, registered: dict[str, set[str]], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in module.attributes.items():
        if isinstance(value, _Module):
            yield from _tensors(value, registered, f"{prefix}{name}.")
        elif isinstance(value, Tensor) and name in registered.get(module.kind, set()):
            yield prefix + name, value
