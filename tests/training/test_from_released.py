"""Fine-tuning from released files: every family, at another resolution, with a learning rate that falls with depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from imglish.checkpoints.loading import load_any
from imglish.checkpoints.native import export, load
from imglish.models import registry
from imglish.models.depths import depths
from imglish.training.config import recipe_from
from imglish.training.settings import SettingsError
from imglish.training.trainer import train
from tests.checkpoints import official
from tests.training.support import records

DECAY, STEPS, RATE = 0.5, 8, 2e-3
LOW = {
    "albef": ("vision.blocks.0.mlp.fc1.weight", "fusion_layers.0.mlp.fc1.weight"),
    "blip": ("vision.blocks.0.mlp.fc1.weight", "layers.1.mlp.fc1.weight"),
    "clip": ("text.blocks.0.mlp.fc1.weight", "vision.blocks.1.mlp.fc1.weight"),
    "coca": ("vision.patch_embed.weight", "layers.0.cross.mlp.fc1.weight"),
    "vilt": ("pictures.patch_embed.weight", "blocks.1.mlp.fc1.weight"),
    "vlmo": ("patch_embed.weight", "blocks.1.attn.qkv.all.weight"),
    "beit": ("patch_embed.weight", "blocks.1.ffn.all.fc1.weight"),
    "beit3": ("body.words.weight", "body.blocks.1.ffn.text.fc1.weight"),
}


def fine_tuning(family: str, path: Path, **changes: Any) -> Any:
    """A recipe that begins with the file ``path``, writing beside it."""
    image: Any = {"size": 48} | ({"longest": 56, "most": 12} if family == "vilt" else {})
    nested = {"vision": {"image": image}} if family in ("albef", "blip", "clip", "coca") else {"image": image}
    own = {"teacher": {"queue_size": 0}} if family in ("albef", "blip") else {}
    groups: dict[str, Any] = {
        "output": str(path.parent / "run"),
        "compute": {"device": "cpu"},
        "model": {"init": str(path), **nested, **own, **changes},
        "data": {"workers": 0, "crop": None, "flip": False},
        "batch": {"size": 8},
        "optimiser": {"lr": RATE, "layer_decay": DECAY, "weight_decay": 0.0, "temperature_lr": 1e-5},
        "schedule": {"steps": STEPS, "warmup_steps": 0, "lr_min": RATE},
        "log": {"every": 1},
    }
    if family == "beit":
        groups["data"]["patches"] = {"min_patches": 4}
    return groups


@pytest.mark.parametrize("family", official.FAMILIES)
def test_a_few_steps_at_a_new_resolution(family: str, tmp_path: Path) -> None:
    _, path = official.write(family, tmp_path)
    groups = fine_tuning(family, path)
    if family == "beit":
        codes = registry.named("dvae-tiny").build()
        groups["targets"] = str(export(tmp_path / "codes", codes, None))
    result = train(recipe_from(groups), records(16))
    losses = [sum(e["losses"].values()) for e in result.events if e["event"] == "step"]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3
    trained = load(Path(groups["output"]) / "model")
    assert trained.config.image.size == 48
    began, ended = load_any(path, image_size=48).model.state_dict(), trained.model.state_dict()
    levels = depths(trained.model)
    moved = []
    for name in LOW[family]:
        furthest = float((ended[name] - began[name]).abs().max())
        assert 0 < furthest <= 1.2 * STEPS * RATE * DECAY ** levels[name], name
        moved.append(furthest)
    assert levels[LOW[family][0]] > levels[LOW[family][1]]
    assert moved[0] < moved[1]


def test_other_changes_than_sizes_need_a_stage(tmp_path: Path) -> None:
    _, path = official.write("albef", tmp_path)
    with pytest.raises(SettingsError, match=r"model\.init: its weights do not fit the changed configuration"):
        train(recipe_from(fine_tuning("albef", path, width=128, heads=2)), records(16))


def test_an_unknown_file_is_named(tmp_path: Path) -> None:
    torch.save({"some.weight": torch.ones(2)}, tmp_path / "odd.pth")
    with pytest.raises(SettingsError, match=r"model\.init: .*odd\.pth is of no known kind"):
        train(recipe_from(fine_tuning("albef", tmp_path / "odd.pth")), records(16))
