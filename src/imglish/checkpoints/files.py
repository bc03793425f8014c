"""Weight files of other projects, read without running anything that they contain.

safetensors; PyTorch pickles by ``weights_only``, with stand-ins for what the record of a training holds beside its
weights; and the TorchScript archives in which openai/CLIP is published: of those only the tensors are read, through an
unpickler that knows nothing but tensors, and the code in them is searched for the names of parameters and buffers,
never compiled.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from imglish.checkpoints.mistaken import seems

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_NESTED = ("state_dict", "model", "module", "model_state_dict", "state_dict_ema", "model_ema")
_IN_FRONT = ("module.", "model.")  # of all names: parallel training, a module of Lightning around the model
_WITHIN = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # torch.compile, shards
_RECORDS = re.compile(  # classes that records of trainings hold beside their weights
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|yacs|easydict|pathlib)\.[\w.]+|argparse\.Namespace|"
    r"numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|ndarray|dtype|dtypes\.\w+)|collections\.defaultdict|typing\.Any|"
    r"builtins\.(dict|list|tuple|frozenset|int|float|bool|str|bytes|object)"
)
_MAPPINGS = (".defaultdict", ".AttributeDict", ".CfgNode", ".EasyDict")
_ASKED = re.compile(r"GLOBAL ([\w.]+)|asks for (\S+)")
_CODE = 2**24  # bytes of one file of code in a TorchScript archive


class WeightFileError(ValueError):
    """A file that is not a weight file we can read safely; the message names it."""


@dataclass(frozen=True)
class WeightFile:
    """weights: name -> tensor on the CPU; beside: names of what else the record of a training holds."""

    weights: dict[str, Tensor]
    beside: tuple[str, ...] = ()


class _Record:
    """Stands for whatever object a training has put beside its weights (hyper-parameters, call-backs): does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Mapping:
    """Stands for a dictionary of a class of its own: gives an ordinary one."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def read_weights(path: str | Path) -> WeightFile:
    """The tensors of a ``.safetensors``, ``.pt``/``.pth``/``.bin``/``.ckpt`` or TorchScript file, by their names.

    The record of a training gives what it holds under one of ``_NESTED``; prefixes that all names have from parallel
    training or ``torch.compile`` are taken off. Raises :class:`WeightFileError`, which says what the file seems to be,
    or :class:`OSError` for a missing one.
    """
    path = Path(path)
    if (what := seems(path)) is not None:
        raise WeightFileError(f"{path} holds no weights: it is {what}")
    try:
        loaded = _loaded(path)
    except Exception as error:  # what a damaged or foreign file does to its reader cannot be foreseen
        raise WeightFileError(f"{path}: not a weight file that can be read safely: {_reason(error)}") from error
    beside: tuple[str, ...] = ()
    for key in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            beside += tuple(str(name) for name in loaded if name != key)
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise WeightFileError(f"{path}: does not hold a state dict: it has no names and tensors")
    if strange := [f"{n!r}" for n, value in loaded.items() if not (isinstance(n, str) and isinstance(value, Tensor))]:
        raise WeightFileError(
            f"{path}: does not hold a state dict (names and tensors, or them under {', '.join(_NESTED)}): not so "
            f"{', '.join(strange[:6])}"
        )
    size = path.stat().st_size
    for name, value in loaded.items():
        if value.is_meta or value.layout != torch.strided:
            raise WeightFileError(f"{path}: {name} is no dense tensor with numbers of its own")
        if value.nbytes > size:
            raise WeightFileError(f"{path}: {name} claims {value.nbytes} bytes, more than the file has")
    return WeightFile({name: value.detach() for name, value in _unwrapped(loaded).items()}, beside)


def _loaded(path: Path) -> Any:
    with path.open("rb") as stream:
        first = stream.read(9)
    if first[8:] == b"{":  # behind its length: the header of safetensors
        return load_file(path)
    if not zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True)
    if _is_torchscript(path):
        return _read_torchscript(path)
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    records: list[Any] = [
        (_Mapping if name.endswith(_MAPPINGS) else _Record, name) for name in named if _RECORDS.fullmatch(name)
    ]
    with torch.serialization.safe_globals(records):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wraps them."""
    names = [_WITHIN.sub("", name) for name in weights]
    while wrapper := next((w for w in _IN_FRONT if all(name.startswith(w) for name in names)), None):
        names = [name.removeprefix(wrapper) for name in names]
    return dict(zip(names, weights.values(), strict=True)) if len(set(names)) == len(names) else dict(weights)


def _reason(error: Exception) -> str:
    """Of what torch says in a page, what matters."""
    if (asked := _ASKED.search(str(error))) is not None:
        return (
            f"it asks for {asked.group(1) or asked.group(2)}, and nothing that a file names is run. Where the file is "
            "your own, save the names and tensors alone: torch.save(model.state_dict(), ...)"
        )
    said = str(error).split("WeightsUnpickler error:")[-1].split("Check the documentation")[0]
    return " ".join(said.split()) or type(error).__name__


def _is_torchscript(path: Path) -> bool:
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
        name = f"{self.folder}/data/{key}"
        if self.archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError("its tensors are compressed, as PyTorch does not write them")
        data = bytearray(self.archive.read(name))
        return torch.frombuffer(data, dtype=dtype, count=count)


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


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
            if archive.getinfo(file).file_size > _CODE:
                raise pickle.UnpicklingError(f"{file} is larger than code is")
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
