from __future__ import annotations

import argparse
import gzip
import os
import pickle
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imglish.checkpoints.files import WeightFileError, read_weights


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("size", torch.tensor(7))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.mask = torch.ones(2)  # an attribute, not part of the state dict

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale + self.mask


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner(), Inner()])
        self.table = nn.Parameter(torch.randn(4, 3).T)
        self.number = 5

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x) + self.blocks[1](x) + self.table.sum()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_archives(tmp_path: Path, half: bool, how: str) -> None:
    model = Outer()
    archived = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.randn(1, 3))
    if half:
        archived, model = archived.half(), model.half()
    archived.save(str(tmp_path / "model.pt"))
    same(read_weights(tmp_path / "model.pt").weights, model.state_dict())


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda w: w,
    "data-parallel": lambda w: {"state_dict": {f"module.{name}": value for name, value in w.items()}, "epoch": 3},
    "model": lambda w: {"model": w},
    "DeepSpeed": lambda w: {"module": w, "ds_version": "0.1"},
    "average alone": lambda w: {"model_ema": w},
    "average beside": lambda w: {"model_ema": {name: value * 2 for name, value in w.items()}, "model": w},
    "compiled": lambda w: {f"_orig_mod.{name}": value for name, value in w.items()},
    "compiled blocks": lambda w: {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in w.items()},
    "compiled, then data-parallel": lambda w: {f"module._orig_mod.{name}": value for name, value in w.items()},
    "in a module of Lightning": lambda w: {"state_dict": {f"model.{name}": value for name, value in w.items()}},
    "parameters": lambda w: {name: nn.Parameter(v, v.is_floating_point()) for name, v in w.items()},
    "arguments": lambda w: {"model": w, "args": argparse.Namespace(out=Path("x")), "best": np.float64(3)},
    "random state": lambda w: {"model": w, "rng": np.random.default_rng(0).random(3), "log": defaultdict(list, a=[1])},
}


@pytest.mark.parametrize("how", WRAPPINGS)
def test_state_dicts_in_their_usual_wrappings(tmp_path: Path, how: str) -> None:
    weights = Outer().state_dict()
    torch.save(WRAPPINGS[how](weights), tmp_path / "model.pt")
    found = read_weights(tmp_path / "model.pt")
    same(found.weights, weights)
    assert not any(value.requires_grad for value in found.weights.values())
    if how == "arguments":
        assert found.beside == ("args", "best")
    if "." in next(iter(WRAPPINGS[how](weights))):
        save_file({n: v.contiguous() for n, v in WRAPPINGS[how](weights).items()}, tmp_path / "model.safetensors")
        same(read_weights(tmp_path / "model.safetensors").weights, weights)
        os.rename(tmp_path / "model.safetensors", tmp_path / "other.bin")  # what it is, its content says
        same(read_weights(tmp_path / "other.bin").weights, weights)


def test_a_record_of_lightning_is_read_without_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call-backs by their classes, hyper-parameters in a dictionary of a class of its own, objects in it."""
    module = ModuleType("pytorch_lightning.callbacks")
    for name, base in (("ModelCheckpoint", object), ("AttributeDict", dict)):
        setattr(module, name, type(name, (base,), {"__module__": module.__name__, "__setstate__": None}))
    weights = Outer().state_dict()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, module.__name__, module)
        kept = module.ModelCheckpoint()
        kept.best = 0.5
        record = {"callbacks": {module.ModelCheckpoint: {"best": 1}}, "hyper": module.AttributeDict(size=3, kept=kept)}
        torch.save({"state_dict": weights, **record}, tmp_path / "last.ckpt")
    found = read_weights(tmp_path / "last.ckpt")
    same(found.weights, weights)
    assert found.beside == ("callbacks", "hyper")


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    harm = pickle.dumps(Harmful(tmp_path / "harm"), protocol=2)
    torch.save({"model": Harmful(tmp_path / "harm")}, tmp_path / "pickle.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", harm)
    torch.save({"model": {"a": torch.ones(1)}, "args": Harmful(tmp_path / "harm")}, tmp_path / "beside.pt")
    for name in ("pickle.pt", "script.pt", "beside.pt"):
        said = rf"{name}: not a weight file that can be read safely: it asks for (posix|nt)\.mkdir, and nothing that"
        with pytest.raises(WeightFileError, match=said):
            read_weights(tmp_path / name)
    assert not (tmp_path / "harm").exists()


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "x")


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "a.py")


def broken_off(path: Path) -> None:
    torch.save(Outer().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])


def damaged(path: Path) -> None:
    torch.save(Outer().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"PK\x01\x02", b"PK\x01\x03"))  # entries of the list of contents


MISTAKEN: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "nothing": (b"", "it is empty: download the file again"),
    "text": ("héllo there\n".encode() * 400, r"it is text \(it begins 'héllo there h"),
    "page": (b"\n<!DOCTYPE html>\n<html>Not Found", "it is a web page in place of the file: download the file again"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "run `git lfs pull` there"),
    "settings": (b'{"model_type": "clip"}', "JSON, settings or a list of parts: name its folder"),
    "picture": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "it is a picture"),
    "keras": (b"\x89HDF\r\n\x1a\n" + b"0" * 20, "HDF5, weights of another library; only those of PyTorch"),
    "gzip": (gzip.compress(b"x"), "an archive of gzip: unpack it"),
    "zip": (zipped, r"zip that PyTorch did not write \(in it: notes\.txt\): unpack it"),
    "tar": (tarred, "an archive of tar: unpack it"),
    "damaged": (damaged, r"a damaged archive \(.*\): download the file again"),
    "half": (broken_off, "ends before its end, as downloads that break off do: download the file again"),
}


@pytest.mark.parametrize("what", MISTAKEN)
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_what_is_taken_for_weights_is_told_in_a_line(tmp_path: Path, what: str, name: str) -> None:
    content, said = MISTAKEN[what]
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(
        WeightFileError, match=rf"{name} holds no weights: it is .*{said.removeprefix('it is ')}"
    ) as error:
        read_weights(path)
    assert "\n" not in str(error.value)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "missing.pt")
    inside: dict[str, tuple[Any, str]] = {
        "list": ({"numbers": [1, 2]}, "not so 'numbers'"),
        "empty": ({}, "it has no names and tensors"),
        "numbered": ({1: torch.ones(2)}, "not so 1"),
        "class": (nn.Linear(2, 2), r"asks for torch\.nn\.modules\.linear\.Linear, .* save the names and tensors alone"),
        "larger": ({"a": torch.ones(1).expand(10**12)}, "a claims 4000000000000 bytes, more than the file has"),
        "hollow": ({"a": torch.ones(2, device="meta")}, "a is no dense tensor with numbers of its own"),
        "sparse": ({"a": torch.eye(2).to_sparse()}, "a is no dense tensor with numbers of its own"),
    }
    for name, (content, said) in inside.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(WeightFileError, match=rf"{name}\.pt: .*{said}") as error:
            read_weights(tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value)
    (tmp_path / "noise.pt").write_bytes(b"\x93\x01" * 50)
    with pytest.raises(WeightFileError, match=r"noise\.pt: not a weight file"):
        read_weights(tmp_path / "noise.pt")
