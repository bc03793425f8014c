"""What decays: the official lists, and where ours differ from them on purpose (docs/models.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from imglish.checkpoints import vlmo as official_vlmo
from imglish.training.config import OptimiserRecipe
from imglish.training.optim import parameter_groups
from tests.golden import test_beit3 as beit3
from tests.golden import test_vlmo as vlmo
from tests.golden.support import Case, cases


def decayed(model: nn.Module) -> set[str]:
    members = {id(p) for p in parameter_groups(model, OptimiserRecipe())[0]["params"]}  # type: ignore[attr-defined]
    return {name for name, p in model.named_parameters() if id(p) in members}


def marks(case: Case, groups: list[dict[str, object]]) -> dict[str, Tensor]:
    """For each official weight ones where it decays."""
    listed = {name: float(g["weight_decay"] > 0) for g in groups for name in g["names"]}  # type: ignore
    return {name: torch.full(shape, listed.get(name, 0.0)) for name, shape in case.shapes.items()}


@pytest.mark.parametrize("path", cases("vlmo-train"), ids=lambda p: p.name)
def test_vlmo(path: Path) -> None:
    case = Case(path)
    model = vlmo.build(case)
    given = marks(case, case.meta["optimizer_groups"])
    found = official_vlmo.convert(given, model.state_dict(), model.config).state
    theirs = {name for name, _ in model.named_parameters() if float(found[name].mean()) == 1}
    ours = decayed(model)
    assert ours < theirs
    assert {name.rpartition(".")[0].rpartition(".")[2] or name for name in theirs - ours} == {
        *("norm", "scale1", "scale2"),  # the feed-forwards' norms and LayerScale of each block
        *("class_token", "logit_scale", "logit_scale_fused"),
    }
    assert all(".ffn." in name for name in theirs - ours if name.endswith("norm.weight"))


@pytest.mark.parametrize("path", cases("beit3-train5"), ids=lambda p: p.name)
def test_beit3(path: Path) -> None:
    case = Case(path)
    model = beit3.load(case, beit3.config_of(case).build, beit3.retrieval_table())
    given = marks(case, case.meta["optimizer_groups"]["groups"])
    found = beit3.retrieval_table().convert(given, model.state_dict()).state
    theirs = {name for name, _ in model.named_parameters() if float(found[name].mean()) > 0}
    assert decayed(model) ^ theirs == {"body.image_positions", "body.mask_token"}
