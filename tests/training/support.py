"""Small data and recipes with which a run takes a second."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from imglish.data.records import Record
from imglish.training.config import Recipe, recipe_from

torch.set_num_threads(1)  # two cores are shared by the test processes

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
THINGS = ("square", "stripe", "frame", "half")
SIZE = 16

MODELS: dict[str, dict[str, Any]] = {
    "albef": {
        "name": "albef-tiny",
        "vision": {"image": {"size": SIZE}, "width": 32, "depth": 1, "heads": 2},
        "width": 32,
        "depth": 2,
        "fusion_layer": 1,
        "heads": 2,
        "hidden": 64,
        "embed_dim": 16,
        "max_length": 16,
        "teacher": {"queue_size": 20, "momentum": 0.9, "ramp_epochs": 1.0},
    },
    "blip": {
        "name": "blip-tiny",
        "vision": {"image": {"size": SIZE}, "width": 32, "depth": 1, "heads": 2},
        "width": 32,
        "depth": 2,
        "heads": 2,
        "hidden": 64,
        "embed_dim": 16,
        "max_length": 20,
        "teacher": {"queue_size": 20, "momentum": 0.9, "ramp_epochs": 1.0},
    },
    "coca": {
        "name": "coca-tiny",
        "vision": {"image": {"size": SIZE}, "width": 32, "depth": 1, "heads": 2},
        "width": 32,
        "heads": 2,
        "unimodal_depth": 1,
        "multimodal_depth": 1,
        "embed_dim": 32,
        "queries": 4,
        "pool_heads": 2,
        "max_length": 20,
    },
    "vilt": {
        "name": "vilt-tiny",
        "image": {"size": SIZE, "longest": 24, "most": 4},
        "width": 32,
        "depth": 2,
        "heads": 2,
        "max_length": 16,
    },
    "vlmo": {
        "name": "vlmo-tiny",
        "image": {"size": SIZE},
        "width": 32,
        "depth": 2,
        "fused_layers": 1,
        "heads": 2,
        "hidden": 64,
        "embed_dim": 16,
        "max_length": 20,
        "text_distances": 20,
    },
    "clip": {
        "name": "clip-tiny",
        "vision": {"image": {"size": SIZE}, "width": 32, "depth": 1, "heads": 2},
        "text": {"width": 32, "depth": 1, "heads": 2},
        "embed_dim": 16,
        "max_length": 16,
    },
}


def records(count: int = 48) -> list[Record]:
    """Drawn pictures as PNG bytes, two captions each."""
    made = []
    for number in range(count):
        colour = list(COLOURS)[number % 4]
        thing = THINGS[number // 4 % 4]
        pixels = np.full((20, 20, 3), 255 - 3 * (number // 16), dtype=np.uint8)
        area = {
            "square": (slice(6, 14), slice(6, 14)),
            "stripe": (slice(8, 12), slice(0, 20)),
            "frame": (slice(0, 20), slice(0, 4)),
            "half": (slice(0, 10), slice(0, 20)),
        }[thing]
        pixels[area] = COLOURS[colour]
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        captions = (f"a {colour} {thing} number {number}", f"the {thing} is {colour}, {number} times")
        made.append(Record(f"picture-{number}", file.getvalue(), captions, image_id=number))
    return made


def recipe(output: Path | str, family: str = "albef", **groups: Any) -> Recipe:
    """A run of 12 steps of 8 pairs; ``groups`` replace settings inside their group."""
    data: dict[str, Any] = {
        "model": MODELS[family],
        "output": str(output),
        "data": {"workers": 0, "cache": True},
        "tokenizer": {"vocab_size": 90},
        "batch": {"size": 8},
        "optimiser": {"lr": 0.002},
        "schedule": {"steps": 12, "warmup_steps": 2},
        "compute": {"device": "cpu", "threads": 1},
        "checkpoint": {"every_steps": 4},
        "log": {"every": 4},
    }
    for name, group in groups.items():
        data[name] = data[name] | group if isinstance(data.get(name), dict) and isinstance(group, dict) else group
    return recipe_from(data)


def flatten(state: Any, where: str = "") -> dict[str, torch.Tensor]:
    """Every tensor and number of a nested state by its path."""
    if isinstance(state, torch.Tensor):
        return {where: state}
    if isinstance(state, (int, float)):
        return {where: torch.tensor(state)}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    flat: dict[str, torch.Tensor] = {}
    for name, value in items:
        flat |= flatten(value, f"{where}/{name}")
    return flat


def final_state(output: Path | str) -> dict[str, torch.Tensor]:
    """Weights, moments, teacher with queue, average and position in the newest checkpoint of a run."""
    newest = max((Path(output) / "checkpoints").glob("step-*.pt"))
    state = torch.load(newest, weights_only=True)
    kept = ("step", "position", "model", "optimiser", "teacher", "average")
    return flatten({name: state[name] for name in kept})


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different[:5]
