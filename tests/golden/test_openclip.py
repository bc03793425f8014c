"""open_clip: CLIP and SigLIP by their model JSON, losses over real ranks, resampled positions, published sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from imglish.checkpoints import open_clip as official
from imglish.data.batch import TextBatch
from imglish.models.clip import CONFIGS, Clip
from imglish.nn.resnet import ModifiedResNet
from imglish.objectives.itc import itc_loss, siglip_loss
from tests.golden.support import Case, cases, check, check_grad_norms, golden_root
from tests.golden.test_clip import recorded, texts_as_they_are, texts_up_to_end
from tests.ranks import run_ranks

OPENCLIP = cases("openclip")
MODELS = [path for path in OPENCLIP if "parameters" in Case(path).meta]
LOSSES = [path for path in OPENCLIP if "world_size" in Case(path).meta.get("config", {})]
RESIZED = [path for path in OPENCLIP if "target" in Case(path).meta]
SIZES = sorted(path for path in golden_root().rglob("openclip-*.json") if "coca" not in path.stem)


def custom_text(case: Case) -> bool:
    return any(name == "text.positional_embedding" for name, _, _ in case.meta["parameters"])


def build(case: Case) -> Clip:
    config = official.config_from_json(case.config)
    model = config.build().eval()
    initial = official.table(config, custom_text(case)).revert(model.state_dict())
    kept = {name: initial[name] for name in case.meta["buffers_kept"]}
    model.load_state_dict(official.convert(case.weights() | kept, config).state)
    return model


def texts_of(case: Case, model: Clip) -> TextBatch:
    """A tower that reads the padding, or the last place, gets the official ids as they are."""
    ids, text = case.inputs["text"], case.config.get("text_cfg", {})
    if text.get("pool_type") == "eos":
        return TextBatch.of([row[: row.index(text.get("eos_id", 2)) + 1] for row in ids.tolist()])
    return texts_as_they_are(ids) if model.config.text.pool in ("first", "last") else texts_up_to_end(ids)


def states(model: Clip, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Outputs of all blocks of both towers, ``(layers, B, L, D)``."""
    found = {}
    with torch.no_grad():
        if not isinstance(model.vision, ModifiedResNet):
            with recorded({str(i): block for i, block in enumerate(model.vision.blocks)}) as rows:
                model.vision(images)
            found["visual.hidden"] = torch.stack(list(rows.values())).unflatten(1, (len(images), -1))
        with recorded({str(i): block for i, block in enumerate(model.text.blocks)}) as rows:
            model.text(texts_as_they_are(ids))
        found["text.hidden"] = torch.stack(list(rows.values())).unflatten(1, ids.shape)
    return found


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.name)
def test_against_open_clip(path: Path) -> None:
    case = Case(path)
    model = build(case).train(case.meta["mode"] == "train")
    images, ids = case.inputs["image"], case.inputs["text"]
    actual = states(model, images, ids)
    texts = texts_of(case, model)
    image, text = model.project_image(images), model.project_text(texts)
    actual |= {"image_features_unnormalised": image, "text_features_unnormalised": text}
    image, text = model.encode_images(images).features, model.encode_texts(texts).features
    scale, bias = model.logit_scale.exp(), model.logit_bias
    logits = scale * image @ text.T + (0 if bias is None else bias)
    actual |= {"image_features": image, "text_features": text, "logit_scale_exp": scale}
    actual |= {"logits_per_image": logits, "logits_per_text": logits.T}
    actual |= {"clip_loss": itc_loss(image, text, scale), "siglip_loss": siglip_loss(image, text, scale, bias)}
    actual[case.meta["grad_loss"]].backward()
    gradients = official.table(model.config, custom_text(case)).revert(
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    )
    for name, gradient in gradients.items():
        flat = gradient.reshape(-1)
        actual[f"grad.{name}"] = flat[:2000] if len(flat) > 20000 else flat
    for name in case.outputs:
        check(case, name, actual[name])
    check_grad_norms(case, case.grad_norms, {name: gradients.get(name) for name in case.grad_norms})
    back = official.table(model.config, custom_text(case)).revert(model.state_dict())
    assert set(back) == {name for name, _, _ in case.meta["parameters"]}
    assert all(torch.equal(back[name], value) for name, value in case.weights().items())


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.name)
def test_normalisation_constants(path: Path) -> None:
    """Outputs hardly show a wrong epsilon, so it is compared by itself, with its number of layers."""
    case = Case(path)
    with torch.device("meta"):
        model = official.config_from_json(case.config).build()
    ours = sorted(m.eps for m in model.modules() if isinstance(m, nn.LayerNorm))
    assert ours == sorted(float(eps) for eps, names in case.meta["layer_norm_eps"].items() for _ in names)


@pytest.mark.parametrize("path", RESIZED, ids=lambda p: p.name)
def test_positions_are_resampled(path: Path) -> None:
    case = Case(path)
    config = official.config_from_json(case.meta["target"])
    weights = official.table(config, custom_text=False).revert(config.build().state_dict())
    converted = official.convert(weights | case.inputs, config)
    assert set(converted.report) == {name for name in case.inputs if case.inputs[name].shape != weights[name].shape}
    back = official.table(config, custom_text=False).revert(converted.state)
    for name in case.outputs:
        check(case, name, back[name])


def _rank_losses(rank: int, path: str) -> dict[str, Tensor]:
    """Losses of one rank and the gradients of all ranks' losses with respect to this rank's features."""
    case = Case(Path(path))
    size = case.config["per_rank_batch"]
    rows = slice(rank * size, (rank + 1) * size)
    scale, bias = (torch.tensor(case.config[name]) for name in ("logit_scale", "logit_bias"))
    found = {}
    for chunk in (None, 2):
        for name in ("clip", "siglip"):
            image, text = (case.inputs[f"{k}_features"][rows].clone().requires_grad_() for k in ("image", "text"))
            if name == "clip":
                loss = itc_loss(image, text, scale, chunk=chunk)
            else:
                loss = siglip_loss(image, text, scale, bias, chunk=chunk)
            loss.backward()
            found |= {f"{name}.{chunk}.{k}": v for k, v in (("loss", loss.detach()), ("grad_image", image.grad))}
            found[f"{name}.{chunk}.grad_text"] = text.grad
    return found


@pytest.mark.parametrize("path", LOSSES, ids=lambda p: p.name)
def test_losses_of_every_rank(path: Path) -> None:
    """ITC with local rows and gathered columns, and the sigmoid loss, on as many processes as the case has."""
    case = Case(path)
    ranks = run_ranks(case.config["world_size"], _rank_losses, str(path))
    for chunk in (None, 2):
        for kind in ("loss", "grad_image", "grad_text"):
            together = {name: torch.stack([r[f"{name}.{chunk}.{kind}"] for r in ranks]) for name in ("clip", "siglip")}
            check(case, f"clip.local_true.gathergrad_true.{kind}", together["clip"])
            for variant in ("bidir", "shift", "reduce", "gather"):
                check(case, f"siglip.{variant}.{kind}", together["siglip"])


@pytest.mark.parametrize("path", LOSSES, ids=lambda p: p.name)
def test_losses_on_one_process(path: Path) -> None:
    case = Case(path)
    image, text = case.inputs["image_features"], case.inputs["text_features"]
    scale, bias = (torch.tensor(case.config[name]) for name in ("logit_scale", "logit_bias"))
    check(case, "single.logits_per_image", scale * image @ text.T)
    for chunk in (None, 2):
        check(case, "single.clip_loss", itc_loss(image, text, scale, chunk=chunk))
        check(case, "single.siglip_loss", siglip_loss(image, text, scale, bias, chunk=chunk))
        check(case, "single.siglip_loss_no_bias", siglip_loss(image, text, scale, chunk=chunk))


NAMED = {
    "openclip-ViT-B-32": "openclip-vit-b-32",
    "openclip-ViT-B-16-quickgelu": "clip-vit-b-16",
    "openclip-ViT-L-14": "openclip-vit-l-14",
}


@pytest.mark.parametrize("path", SIZES, ids=lambda p: p.stem)
def test_published_state_dicts(path: Path) -> None:
    """Every name and shape of the published sizes, and the number of parameters."""
    listed = json.loads(path.read_text())
    config = CONFIGS[NAMED[listed["model"]]]()
    with torch.device("meta"):
        model = config.build()
        weights = {name: torch.empty(shape) for name, shape, _, _ in listed["state_dict"]}
    converted = official.convert(weights, config)
    assert set(converted.state) == set(model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == listed["parameter_count"]
