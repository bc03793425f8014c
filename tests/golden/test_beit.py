"""BEiT against the official pre-training model: states, logits, loss, gradients; names of the published sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from imglish.checkpoints import beit as official
from imglish.data.batch import PatchMasks
from imglish.models.beit import Beit, BeitConfig, beit_base, beit_large
from imglish.models.expert_sizes import HALF
from imglish.models.vit import ImageInput
from imglish.nn.relative import image_index
from tests.golden.support import Case, cases, check, check_grad_norms, filled, golden_root, official_gradients


def config_of(case: Case) -> BeitConfig:
    given = case.config
    assert given["use_shared_rel_pos_bias"]
    assert not given["use_abs_pos_emb"]
    return BeitConfig(
        image=ImageInput(given["img_size"], HALF, HALF),
        patch=given["patch_size"],
        codes=given["vocab_size"],
        width=given["embed_dim"],
        depth=given["depth"],
        heads=given["num_heads"],
        hidden=int(given["embed_dim"] * given["mlp_ratio"]),
        layer_scale=given["init_values"],
        norm_eps=given["norm_eps"],
        drop_path=0.0,
    )


def masks_of(flags: Tensor) -> PatchMasks:
    flags = flags.bool()
    return PatchMasks(torch.nonzero(flags.flatten()).squeeze(1), tuple(flags.sum(1).tolist()), flags.shape[1])


@pytest.mark.parametrize("path", cases("beit-mim"), ids=lambda p: p.name)
def test_masked_image_modelling(path: Path) -> None:
    case = Case(path)
    model = filled(config_of(case).build, lambda target: official.convert(case.weights(), target).state)
    images, masked = case.inputs["image"], masks_of(case.inputs["bool_masked_pos"])
    codes = case.inputs["visual_tokens"].flatten()[masked.rows]
    logits = model.fill_patches(images, masked)
    found = model.mim(logits, codes)
    check(case, "labels", codes)
    check(case, "loss", found["mim"])
    check(case, "accuracy", found["metric/mim_accuracy"])
    with torch.no_grad():
        check_states(case, model, images, masked, logits)
    found["mim"].backward()
    target = {n: v.double() for n, v in model.state_dict().items()}
    gradients = official_gradients(lambda numbers: official.convert(numbers, target).state, case.shapes, model)
    check_grad_norms(case, case.grad_norms, gradients)


def check_states(case: Case, model: Beit, images: Tensor, masked: PatchMasks, logits: Tensor) -> None:
    tokens = model.tokens(images, masked)
    rows, packing = model.embed(images, masked)
    bias = model.relative(packing)[0]
    values = {
        "features": tokens,
        "features.slice": tokens[:, ::14, ::8],
        "logits_all_tokens": model.head(tokens[:, 1:]),
        "logits_masked": logits,
        "logits_masked.slice": logits[::10, ::32],
        "rel_pos_bias": bias[0],
        "rel_pos_bias.slice": bias[0][:2, ::8, ::8],
        "relative_position_index": torch.from_numpy(image_index(model.config.grid)),
    }
    if "hidden" in case.outputs:
        states = []
        for block in model.blocks:
            rows = block(rows, packing, bias)
            states.append(rows.unflatten(0, (len(images), -1)))
        values["hidden"] = torch.stack(states)
    for name in set(case.outputs) - {"labels", "loss", "accuracy"}:
        check(case, name, values[name])


@pytest.mark.parametrize("path", sorted((golden_root()).rglob("param-shapes/beit_*.json")), ids=lambda p: p.stem)
def test_published_sizes(path: Path) -> None:
    listed = json.loads(path.read_text())
    config = beit_large() if "large" in listed["model"] else beit_base()
    with torch.device("meta"):
        model = config.build()
        weights = {name: torch.empty(shape) for name, shape, *_ in state_dict_of(listed)}
    converted = official.convert(weights, model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == listed["parameter_count"]
    dropped = [name for name, reason in converted.report.items() if reason.startswith("dropped")]
    assert set(official.table().revert(converted.state)) == set(weights) - set(dropped)


def state_dict_of(listed: dict[str, object]) -> list[list[object]]:
    found = next(value for value in listed.values() if isinstance(value, list) and value and isinstance(value[0], list))
    assert isinstance(found, list)
    return found
