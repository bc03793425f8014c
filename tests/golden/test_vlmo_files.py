"""VLMo's checkpoints and five steps of its official training: names, sizes, resizing, a BEiT as the beginning."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from imglish.checkpoints import vlmo as official
from imglish.models.vlmo import Vlmo, VlmoConfig, vlmo_base, vlmo_base_plus, vlmo_large
from imglish.models.vlmo_heads import VlmoAnswers, VlmoReasoning
from imglish.nn.embed import resize_grid
from imglish.nn.relative import resize_relative
from tests.golden.aligned import draws_for
from tests.golden.support import Case, cases, check, golden_root
from tests.golden.test_vlmo import batch_of, build, config_of, weights_of

SHAPES = sorted(golden_root().rglob("param-shapes/vlmo-*.json"))


@pytest.mark.parametrize("path", cases("vlmo-train"), ids=lambda p: p.name)
def test_five_steps_of_training(path: Path) -> None:
    case = Case(path)
    model, batch = build(case), batch_of(case.inputs)
    optimiser = OfficialAdamW(case, model)
    for step, lr in enumerate(case.outputs["lr_per_step"].tolist()):
        assert lr == pytest.approx(official_rate(case, step), rel=1e-6)
        drawn = [case.inputs[f"{name}_per_step"][step] for name in ("neg_image_for_text", "neg_text_for_image")]
        draws = [draws_for(weights, chosen) for weights, chosen in zip(weights_of(model, batch), drawn, strict=True)]
        losses = model.losses(replace(batch, draws=torch.stack(draws, dim=1)))
        total = torch.stack([value for name, value in losses.items() if not name.startswith("metric/")]).sum()
        torch.testing.assert_close(total, case.outputs["total_loss_per_step"][step], rtol=1e-3, atol=1e-5)
        model.zero_grad()
        total.backward()
        optimiser.step(lr)
    after = official.table(model.config).revert(model.state_dict())
    for name, norm in case.meta["parameter_norm_after"].items():
        if name in after:
            assert float(after[name].norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), name
    for name, expected in case.outputs.items():
        if name.startswith("after."):
            torch.testing.assert_close(after[name.removeprefix("after.")], expected, rtol=1e-3, atol=1e-5, msg=name)


def official_rate(case: Case, step: int) -> float:
    """Linear warm-up from zero, then a line to ``end_lr``; the case does not say how long the run is."""
    run = case.config["vlmo_config"]
    peak, warmup = run["learning_rate"], run["warmup_steps"]
    rates = case.outputs["lr_per_step"].tolist()
    if step <= warmup:
        return float(peak * step / warmup)
    slope = (peak - rates[int(warmup) + 1]) if len(rates) > warmup + 1 else 0.0
    return float(peak - slope * (step - warmup))


class OfficialAdamW:
    """AdamW of transformers 4.8.1: eps before the bias correction, weight decay after the update."""

    def __init__(self, case: Case, model: Vlmo) -> None:
        self.model, self.steps = model, 0
        decays = {name: g["weight_decay"] for g in case.meta["optimizer_groups"] for name in g["names"]}
        marks = {name: torch.full(shape, decays[name]) for name, shape in case.shapes.items()}
        self.decays = official.convert(marks, model.state_dict(), model.config).state
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}

    @torch.no_grad()
    def step(self, lr: float, betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-8) -> None:
        self.steps += 1
        size = lr * math.sqrt(1 - betas[1] ** self.steps) / (1 - betas[0] ** self.steps)
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            first, second = self.moments[name]
            first.lerp_(parameter.grad, 1 - betas[0])
            second.lerp_(parameter.grad**2, 1 - betas[1])
            parameter -= size * first / (second.sqrt() + eps)
            parameter -= lr * self.decays[name] * parameter


@pytest.mark.parametrize("path", cases("vlmo-relpos"), ids=lambda p: p.name)
def test_relative_table_resize(path: Path) -> None:
    case = Case(path)
    patch = case.config["transformer_arguments"]["patch_size"]
    before, after = (case.config[f"{which}_image"] // patch for which in ("source", "target"))
    table = case.inputs["relative_position_bias_table"]
    check(case, "relative_position_bias_table", resize_relative(table, before, after))


@pytest.mark.parametrize("path", cases("vlmo-abspos"), ids=lambda p: p.name)
def test_position_resize(path: Path) -> None:
    case = Case(path)
    side = case.config["target_image"] // case.config["transformer_arguments"]["patch_size"]
    table = case.inputs["transformer.pos_embed"][0]
    check(case, "transformer.pos_embed", resize_grid(table, (side, side))[None])


@pytest.mark.parametrize("path", cases("vlmo-from-beit"), ids=lambda p: p.name)
def test_beginning_from_a_beit(path: Path) -> None:
    """Every key of ours comes from the official one that the official conversion takes it from."""
    case = Case(path)
    model = config_of(case.config).build()
    ours = model.state_dict()
    back = official.table(model.config).revert({name: torch.zeros_like(value) for name, value in ours.items()})
    sources, shapes = case.meta["key_map"], {name: value.shape for name, value in back.items()}
    known = {target: source for target, source in sources.items() if target in shapes}
    numbers = {source: torch.full(shapes[target], float(i + 1)) for i, (target, source) in enumerate(known.items())}
    beit = numbers | case.inputs | {name: torch.zeros(1) for name in sources.values() if name not in numbers}
    found = official.from_beit(beit, ours, model.config)
    reverted = official.table(model.config).revert(found.state)
    for target, source in known.items():
        assert torch.equal(reverted[target], numbers[source]), target
    check(case, "relative_position_bias_table", reverted["relative_position_bias_table"])
    fresh = {name for name, why in found.report.items() if why.startswith("fresh")}
    marked = {name: torch.full_like(value, float(name in fresh)) for name, value in ours.items()}
    missing = {name for name, value in official.table(model.config).revert(marked).items() if value.all()}
    assert missing <= set(case.meta["missing_keys"])
    dropped = set(case.meta["missing_keys"]) - missing  # what our model has no place for
    assert all(("position" in name) or ("pooler" in name) for name in dropped), dropped


def shaped(path: Path) -> tuple[dict[str, torch.Size], VlmoConfig, int]:
    """The published state dict, the configuration it belongs to, and its number of parameters."""
    listed = json.loads(path.read_text())
    shapes = {name: torch.Size(shape) for name, shape, *_ in listed["state_dict"]}
    sizes = {"base_plus": vlmo_base_plus, "large": vlmo_large, "base": vlmo_base}
    config = next(make() for name, make in sizes.items() if f"-{name}" in path.stem)
    words = shapes["text_embeddings.position_ids"][1]
    if "irtr" in path.stem or "vqa" in path.stem or "nlvr2" in path.stem:
        side = int(path.stem.split("-")[-1])
        config = replace(config, image=replace(config.image, size=side), itc_fused=False, itm=False, mlm=False)
    if "textmlm" in path.stem:
        config = replace(config, itc=False, itc_fused=False, itm=False, fused_layers=0)
    if "vqa" in path.stem or "nlvr2" in path.stem:
        types = shapes["token_type_embeddings.weight"][0]
        config = replace(config, itc=False, types=types)
    return shapes, replace(config, max_length=words), listed["parameter_count"]


@pytest.mark.parametrize("path", SHAPES, ids=lambda p: p.stem)
def test_published_state_dict(path: Path) -> None:
    """Every published name has its place in our model, and ours has no parameter beside them."""
    shapes, config, count = shaped(path)
    head = next((name.split(".")[0] for name in shapes if name.split(".")[0].endswith("_classifier")), None)
    with torch.device("meta"):
        model: torch.nn.Module = config.build()
        if head is not None:
            model = VlmoAnswers(model) if head.startswith("vqa") else VlmoReasoning(model)  # type: ignore[arg-type]
        published = {name: torch.empty(shape) for name, shape in shapes.items()}
    table = official.table(config) if head is None else official.task_table(config, head)
    converted = table.convert(published, model.state_dict())
    assert not [name for name, why in converted.report.items() if why.startswith("fresh")]
    dropped = {name for name, why in converted.report.items() if why.startswith("dropped")}
    extra = sum(shapes[name].numel() for name in dropped if not name.endswith("position_ids"))
    assert sum(p.numel() for p in model.parameters()) + extra == count
    assert set(table.revert(model.state_dict())) | dropped == set(shapes)
    unused = {"text_embeddings.position_ids", "text_embeddings.position_embeddings.weight"}
    assert all(name in unused or name.startswith("pooler") for name in dropped)
