from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

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
    same(read_weights(tmp_path / "model.pt"), model.state_dict())


def test_state_dicts_in_their_usual_wrappings(tmp_path: Path) -> None:
    weights = Outer().state_dict()
    parallel = {f"module.{name}": value for name, value in weights.items()}
    for number, content in enumerate([weights, {"state_dict": parallel, "epoch": 3}, {"model": weights}]):
        torch.save(content, tmp_path / f"{number}.pt")
        same(read_weights(tmp_path / f"{number}.pt"), weights)
    save_file({n: v.contiguous() for n, v in weights.items()}, tmp_path / "model.safetensors")
    same(read_weights(tmp_path / "model.safetensors"), weights)


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
    for name in ("pickle.pt", "script.pt"):
        with pytest.raises(WeightFileError, match=f"{name}: not a weight file that can be read safely"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "harm").exists()


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(WeightFileError, match=r"text\.pt"):
        read_weights(tmp_path / "text.pt")
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "missing.pt")
    torch.save({"numbers": [1, 2]}, tmp_path / "list.pt")
    with pytest.raises(WeightFileError, match="does not hold a state dict"):
        read_weights(tmp_path / "list.pt")
