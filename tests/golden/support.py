"""Golden data: where it lies, how weights and inputs are made by rule, how results are compared.

The folder is ``IMGLISH_GOLDEN``, else ``shared/golden`` beside the repository, else the copies in
``tests/golden/data``.
A case is any folder below it that holds a ``meta.json``; nothing else of the layout above it matters.
"""

from __future__ import annotations

import ast
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from imglish.checkpoints.native import load_weights

REPOSITORY = Path(__file__).resolve().parents[2]
M = TypeVar("M", bound=nn.Module)


def golden_root() -> Path:
    if named := os.environ.get("IMGLISH_GOLDEN"):
        root = Path(named)
        if not root.is_dir():
            raise FileNotFoundError(f"IMGLISH_GOLDEN={named} is not a folder")
        return root
    beside = REPOSITORY.parent / "shared" / "golden"
    return beside if beside.is_dir() else REPOSITORY / "tests" / "golden" / "data"


def cases(*prefixes: str) -> list[Path]:
    """Case folders whose name starts with one of ``prefixes``, at any depth below the root."""
    found = [meta.parent for meta in golden_root().rglob("meta.json") if meta.parent.name.startswith(prefixes)]
    return sorted(found)


@dataclass(frozen=True)
class Case:
    """One golden case: ``meta.json``, inputs, outputs; tensors stored in half precision or bytes are widened."""

    path: Path

    @property
    def name(self) -> str:
        """The name that seeds the inputs made by rule."""
        return str(self.meta.get("case", self.path.name))

    @cached_property
    def meta(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.path / "meta.json").read_text())
        return loaded

    @cached_property
    def config(self) -> dict[str, Any]:
        return dict(self.meta["config"])

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        stored = {
            k: v.float() if v.is_floating_point() else v for k, v in load_file(self.path / "inputs.safetensors").items()
        }
        for name, made in self.meta.get("inputs_not_stored", {}).items():
            stored[name] = self._input_by_rule(name, made)
        return stored

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return load_file(self.path / "outputs.safetensors")

    @cached_property
    def grad_norms(self) -> dict[str, float | None]:
        file = self.path / "grad_norms.json"
        found = json.loads(file.read_text()) if file.exists() else self.meta.get("grad_norms", {})
        return dict(found or {})

    @property
    def kind(self) -> str:
        """Which fill rule made the weights: "a" (official_repo in the meta) or "b" (fill in the meta)."""
        return "b" if "official" in self.meta else "a"

    def _input_by_rule(self, name: str, made: dict[str, Any]) -> Tensor:
        """``inputs_not_stored``: seeded noise, with a coarse pattern on top where a rule says so.

        The stored sample decides: in one case the rule names a pattern that neither sample nor outputs have.
        """
        shape, rule = made["shape"], made["rule"]
        sample = load_file(self.path / "inputs.safetensors")[f"{name}.sample"].float()
        value = torch.from_numpy(input_fill(self.name, name, shape))
        if "plus" in rule and not torch.allclose(value.reshape(-1)[: sample.numel()], sample, rtol=1e-5, atol=1e-5):
            factor = float(rule.split("plus", 1)[1].split("*")[0])
            coarse_shape = json.loads(rule.split("of shape", 1)[1].split("]")[0].strip() + "]")
            coarse = torch.from_numpy(input_fill(self.name, f"{name}.coarse", coarse_shape))
            repeat = shape[-1] // coarse_shape[-1]
            value = value + factor * coarse.repeat_interleave(repeat, -1).repeat_interleave(repeat, -2)
        if "set to 0 with (h_b,w_b) =" in rule:
            for picture, (high, wide) in zip(
                value, ast.literal_eval(rule.split("(h_b,w_b) =")[1].strip()), strict=True
            ):
                picture[:, high:] = 0
                picture[:, :, wide:] = 0
        torch.testing.assert_close(value.reshape(-1)[: sample.numel()], sample, rtol=1e-5, atol=1e-5)
        return value

    def weights(self) -> dict[str, Tensor]:
        """The official state dict by the fill rule: name -> tensor, ties and kept scalars included."""
        return fill_a(self.meta) if self.kind == "a" else fill_b(self.meta)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Those of :meth:`weights`, without making them."""
        left_out = set() if self.kind == "a" else set(self.meta["buffers_kept"]) - set(self.meta["scalars_kept"])
        return {name: torch.Size(shape) for name, shape, _ in self.meta["parameters"] if name not in left_out}


def filled(build: Callable[[], M], convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> M:
    """A model with the weights of ``convert(its state dict)``; nothing is drawn that these would replace."""
    with torch.device("meta"):
        model = build()
    load_weights(model, convert(model.state_dict()), "what the conversion gives")
    return model


def input_fill(case: str, name: str, shape: list[int]) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(zlib.crc32(f"{case}/{name}".encode())))
    return rng.standard_normal(tuple(shape), dtype=np.float32)


def _normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(np.random.Philox(zlib.crc32(name.encode()))).standard_normal(shape, dtype=np.float32)


def _rule_a(name: str, shape: tuple[int, ...]) -> np.ndarray:
    n = _normal(name, shape)
    if name.endswith("running_var"):
        n = 1 + np.float32(0.1) * np.abs(n)
    elif len(shape) == 1 and name.endswith("weight"):
        n = 1 + np.float32(0.1) * n
    elif len(shape) == 4:
        n = n * np.float32(1.0 / np.sqrt(np.prod(shape[1:])))
    elif name.split(".")[-1] in ("image_queue", "text_queue"):
        n = n / np.sqrt((n.astype(np.float64) ** 2).sum(0, keepdims=True))
    elif len(shape) == 2:
        n = n * np.float32(0.8 / np.sqrt(shape[1]))
    elif len(shape) == 3:
        n = np.float32(0.2) * n
    else:
        n = np.float32(0.05) * n
    return n.astype(np.float32)


def _rule_b(name: str, shape: tuple[int, ...], w_std: float) -> np.ndarray:
    n = _normal(name, shape)
    if len(shape) == 1:
        if name.split(".")[-1].startswith("gamma"):
            return (np.float32(0.1) + np.float32(0.02) * n).astype(np.float32)
        if name.endswith("weight"):
            return (np.float32(1.0) + np.float32(0.1) * n).astype(np.float32)
        return (np.float32(0.05) * n).astype(np.float32)
    return (np.float32(w_std) * n).astype(np.float32)


def fill_a(meta: dict[str, Any]) -> dict[str, Tensor]:
    tied = {other: first for first, other in meta["ties"]}
    filled: dict[str, Tensor] = {}
    for name, shape, dtype in meta["parameters"]:
        if name in tied:
            filled[name] = filled[tied[name]]
        elif name in meta["scalars"]:
            filled[name] = torch.tensor(meta["scalars"][name])
        elif name in meta["kept_official"]:
            filled[name] = _kept(name, shape, meta)
        else:
            assert dtype == "float32", f"{name}: no rule for {dtype}"
            filled[name] = torch.from_numpy(_rule_a(name, tuple(shape)))
    return filled


def fill_b(meta: dict[str, Any]) -> dict[str, Tensor]:
    filled: dict[str, Tensor] = {}
    for name, shape, _ in meta["parameters"]:
        if name in meta["ties"]:
            filled[name] = filled[meta["ties"][name]]
        elif name in meta["scalars_kept"]:
            filled[name] = torch.tensor(meta["scalars_kept"][name])
        elif name not in meta["buffers_kept"]:
            filled[name] = torch.from_numpy(_rule_b(name, tuple(shape), meta["fill"]["w_std"]))
    for name, index, value in meta.get("parameter_overrides", []):
        filled[name][tuple(index) if isinstance(index, list) else index] = value
    return filled


def _kept(name: str, shape: list[int], meta: dict[str, Any]) -> Tensor:
    """Integer buffers keep the official starting value: positions count up, pointers and counters start as stated."""
    if name.endswith("position_ids"):
        return torch.arange(shape[-1]).expand(shape)
    if name == "queue_ptr":
        return torch.full(shape, int(meta["config"].get("initial_queue_ptr", 0)))
    return torch.full(shape, -100) if name == "idx_queue" else torch.zeros(shape, dtype=torch.int64)


def stored(case: Case, name: str, value: Tensor) -> Tensor:
    """``value`` sampled as the case stores it: whole, or every p-th entry of the flattened tensor."""
    how = case.meta["outputs"][name]
    if isinstance(how, dict) and how["stored"] != "full":
        return value.reshape(-1)[:: int(how["stored"].split("::")[1].rstrip("]"))]
    return value


def check(case: Case, name: str, value: Tensor) -> None:
    """Compare with the stored output at the tolerance that the fill rules suggest for the kind of case."""
    expected = case.outputs[name]
    actual = stored(case, name, value.detach()).to(expected.dtype).reshape(expected.shape)
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), f"{case.name}: {name} differs"
        return
    if case.kind == "a":
        how = case.meta["outputs"][name]
        limits = {"rtol": 0.0, "atol": 1e-4 * max(float(how["absmax"]), 1e-6)}
    elif case.meta.get("size", case.name).endswith("base"):
        limits = {"rtol": 1e-3, "atol": 5e-5}
    else:
        limits = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(actual, expected, msg=lambda m: f"{case.name}: {name}: {m}", **limits)


def check_grad_norms(case: Case, norms: dict[str, float | None], actual: dict[str, Tensor | None]) -> None:
    """Gradient norms per official parameter name; ``actual`` maps the same names to gradients (None = no gradient)."""
    assert norms, f"{case.name} has no gradient norms"
    largest = max(v for v in norms.values() if v is not None)
    for name, expected in norms.items():
        gradient = actual[name]
        norm = 0.0 if gradient is None else float(gradient.double().norm())
        if expected is None:
            assert norm == 0.0, f"{case.name}: {name} has a gradient ({norm}), officially none"
        elif expected > 1e-5 * max(largest, 1.0):  # below it: gradients that are zero in theory, such as key biases
            assert abs(norm - expected) <= 1e-3 * expected, f"{case.name}: |grad {name}| is {norm}, not {expected}"
        else:
            assert norm <= 2e-5 * max(largest, 1.0), f"{case.name}: |grad {name}| is {norm}, not {expected}"


def official_gradients(
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    shapes: dict[str, torch.Size],
    model: nn.Module,
) -> dict[str, Tensor | None]:
    """Gradients of ``model`` under the official names, whatever the conversion joins, splits or transposes.

    Every official entry is numbered, the numbers are converted like weights, and each gradient entry is carried back
    to the number that lies in its place. ``None``: no parameter of ours with a gradient came from it.
    """
    numbers, first = {}, 0
    for name, shape in shapes.items():
        numbers[name] = torch.arange(first, first + shape.numel(), dtype=torch.float64).reshape(shape)
        first += shape.numel()
    flat, reached = torch.zeros(first, dtype=torch.float64), torch.zeros(first, dtype=torch.bool)
    places = convert(numbers)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            index = places[name].reshape(-1).long()
            flat[index] = parameter.grad.double().reshape(-1)
            reached[index] = True
    found: dict[str, Tensor | None] = {}
    for name, number in numbers.items():
        index = number.reshape(-1).long()
        found[name] = flat[index] if bool(reached[index].any()) else None
    return found
