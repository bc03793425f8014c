from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import imglish
from imglish.checkpoints import native
from imglish.checkpoints.drawing import drawn
from imglish.checkpoints.foreign import load_foreign
from imglish.checkpoints.loading import load_any
from imglish.models import registry
from tests.checkpoints import official
from tests.checkpoints.test_foreign import blip


class _Written(TorchDispatchMode):
    """Counts the numbers that are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::normal_", "aten::uniform_") and not args[0].is_meta:
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", official.FAMILIES)
def test_what_is_wanted_is_distributed_as_in_a_new_model(family: str) -> None:
    build = official.config(family).build
    torch.manual_seed(0)
    whole = dict(build().named_parameters())
    names = list(whole)[1::5]
    found = dict(drawn(build, lambda name, _: name in names).named_parameters())
    assert list(found) == list(whole)
    assert {name for name, parameter in found.items() if not parameter.is_meta} == set(names)
    for name in names:
        mine, expected = found[name].detach().float(), whole[name].detach().float()
        if expected.numel() == 1 or expected.std() == 0:  # ones, zeros, a temperature
            torch.testing.assert_close(mine, expected)
        elif expected.numel() >= 256:
            assert 0.8 < mine.std() / expected.std() < 1.25, name


def test_the_same_choice_gives_the_same_values_and_no_number_of_the_process_is_used() -> None:
    build = registry.named("albef-tiny").build
    torch.manual_seed(5)
    first, second = (drawn(build, lambda name, _: name.startswith("itm_head.")) for _ in range(2))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(first.get_parameter("itm_head.weight"), second.get_parameter("itm_head.weight"))


def test_only_what_a_checkpoint_lacks_is_drawn(tmp_path: Path) -> None:
    """A captioning model has neither ITM head nor projections: these are drawn, and once as many again by their
    modules, before the model's own rule."""
    _, folder = blip("BlipForConditionalGeneration", tmp_path)
    with _Written() as written:
        loaded = load_foreign(folder)
    lacking = {name for name, said in loaded.meta["conversion"].items() if said.startswith("fresh")}
    weights = {name: value for name, value in loaded.model.state_dict().items() if name in lacking}
    assert {"itm_head.weight", "text_proj.weight", "layers.0.attn.qkv.weight"} <= set(weights)
    assert 0 < written.count <= 2.5 * sum(value.numel() for value in weights.values())
    assert written.count < sum(value.numel() for value in loaded.model.state_dict().values())
    assert not any(value.is_meta for value in loaded.model.state_dict().values())


def test_positions_alone_are_drawn_for_another_size(tmp_path: Path) -> None:
    _, path = official.write("albef", tmp_path)
    with _Written() as written:
        model = load_any(path, image_size=48).model
    assert not any(value.is_meta for value in [*model.state_dict().values(), *model.buffers()])
    assert 0 < written.count <= 2 * model.state_dict()["vision.positions"].numel()


def test_loading_does_not_wake_the_compiler(tmp_path: Path) -> None:
    """Its import takes longer than loading does. In a new process: here others have imported it already."""
    for family in ("albef", "clip", "coca"):
        (tmp_path / family).mkdir()
        official.write(family, tmp_path / family)
    saved = imglish.load(tmp_path / "albef" / "albef.pth", device="cpu")
    native.export(tmp_path / "own", saved.network, saved.tokenizer)
    program = """
import sys, imglish
from imglish.checkpoints.drawing import undrawn
from imglish.models import registry
for path in sys.argv[1:]:
    imglish.load(path, device="cpu")
    assert "torch._dynamo" not in sys.modules, path
for name in ("clip-rn50", "siglip-b-16", "vilt-tiny", "vlmo-tiny", "beit-tiny", "beit3-tiny"):
    with undrawn():
        registry.named(name).build()
    assert "torch._dynamo" not in sys.modules, name
"""
    paths = [tmp_path / "own", tmp_path / "albef" / "albef.pth", tmp_path / "clip" / "clip.pth", tmp_path / "coca"]
    subprocess.run([sys.executable, "-c", program, *map(str, paths)], check=True)
