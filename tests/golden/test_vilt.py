"""ViLT against the official implementation: pre-training step, pictures of several sizes, alignment, task heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.checkpoints import vilt as official
from imglish.data.batch import MaskedTexts, TextBatch
from imglish.data.patches import PatchBatch, Patches
from imglish.models.vilt import Pairs, Vilt, ViltConfig
from imglish.models.vilt_heads import ViltAnswers, ViltRanking, ViltReasoning
from imglish.models.vilt_pictures import AspectInput, PatchRows
from imglish.nn.embed import grid_positions
from imglish.nn.segments import Ragged, Segments
from imglish.objectives.mlm import mlm_loss
from imglish.objectives.wpa import alignment_distance, cosine_cost, transport_plan
from tests.golden.support import Case, cases, check, check_grad_norms, official_gradients


def config_of(case: Case) -> ViltConfig:
    """Our configuration from the official dictionary of the case; the position grid decides the picture's size."""
    run = case.config["config"]
    vit = case.config["vit_overrides"] if isinstance(case.config["vit_overrides"], dict) else {}
    names = {name for name, _, _ in case.meta["parameters"]}
    shapes = {name: shape for name, shape, _ in case.meta["parameters"]}
    size, patch = vit.get("img_size", run["image_size"]), vit.get("patch_size", run["patch_size"])
    return ViltConfig(
        image=AspectInput(size, longest=int(1333 / 800 * size), patch=patch),
        vocab_size=run["vocab_size"],
        max_length=run["max_text_len"],
        width=run["hidden_size"],
        depth=run["num_layers"],
        heads=run["num_heads"],
        mlp_ratio=run["mlp_ratio"],
        dropout=run["drop_rate"],
        types=shapes["token_type_embeddings.weight"][0],
        itm="itm_score.fc.weight" in names,
        mlm="mlm_score.bias" in names,
        wpa="itm_score.fc.weight" in names,
    )


def build(case: Case) -> Vilt:
    model = config_of(case).build().train()
    load(case, model)
    return model


def load(case: Case, model: torch.nn.Module) -> None:
    """The weights of the fill rule, through the checkpoint conversion, which must lead back to them."""
    weights = case.weights()
    model.load_state_dict(official.convert(weights, model.state_dict()).state)
    back = official.table(official.head_of(weights)).revert(model.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in back.items())
    assert back.keys() == {name for name in weights if not name.endswith("position_ids")}


def pictures_of(images: Tensor, patch: int, index: Tensor | None = None, mask: Tensor | None = None) -> PatchBatch:
    """Padded official pictures ``(B, 3, H, W)`` as patches: the picture ends where all channels are zero.

    index ``(B, L, 2)``, mask ``(B, 1 + L)``: places of the selected patches in the padded grid, and which are real.
    """
    shown = (images.sum(1) != 0)[:, ::patch, ::patch]
    made = []
    for b, picture in enumerate(images):
        h, w = int(shown[b, :, 0].sum()), int(shown[b, 0].sum())
        whole = PatchBatch.cut(picture[None, :, : h * patch, : w * patch], patch)
        kept = None
        if index is not None and mask is not None:
            places = index[b][mask[b, 1:].bool()]
            kept = (places[:, 0] * w + places[:, 1]).numpy()
        made.append(Patches(whole.pixels if kept is None else whole.pixels[kept], (h, w), kept))
    return PatchBatch.of(made)


def texts_of(ids: Tensor, mask: Tensor) -> TextBatch:
    return TextBatch(ids[mask.bool()], Segments.of(mask.sum(1).tolist()))


def pieces_of(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of all texts and of all pictures."""
    pieces = Segments.of(n for w, total in zip(pairs.words, pairs.segments.lengths) for n in (w, total - w))
    return pieces.rows_of(range(0, pieces.count, 2)), pieces.rows_of(range(1, pieces.count, 2))


def check_rows(case: Case, name: str, rows: Tensor, mask: Tensor) -> None:
    """Compare packed rows with the valid places of an official padded output, which may be stored whole or sampled."""
    how = case.meta["outputs"][name]
    padded = rows.new_zeros(*mask.shape, rows.shape[1])
    padded[mask.bool()] = rows
    step = 1 if how["stored"] == "full" else int(how["stored"].split("::")[1].rstrip("]"))
    valid = mask.bool()[..., None].expand(padded.shape).reshape(-1)[::step]
    actual, expected = padded.detach().reshape(-1)[::step][valid], case.outputs[name].reshape(-1)[valid]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * how["absmax"], msg=lambda m: f"{name}: {m}")


def check_states(case: Case, prefix: str, model: Vilt, states: Tensor, pairs: Pairs, text_mask: Tensor) -> None:
    text, image = pieces_of(pairs)
    check_rows(case, f"{prefix}text_feats", states[text], text_mask)
    check_rows(case, f"{prefix}image_feats", states[image], case.outputs[f"{prefix}image_masks"])
    cls = states[pairs.segments.starts(states.device)]
    check(case, f"{prefix}raw_cls_feats", cls)
    check(case, f"{prefix}cls_feats", model.pool(cls))


def own_pairs(model: Vilt, pictures: PatchBatch, texts: TextBatch, images: list[int] | None = None) -> Pairs:
    rows, number = model.embed_images(pictures).tokens, np.arange(len(texts))
    assert isinstance(rows, Ragged)
    return Pairs.of(model._texts(texts), rows, number, number if images is None else np.asarray(images))


@pytest.mark.parametrize("path", cases("vilt-pretrain"), ids=lambda p: p.name)
def test_pretraining_step(path: Path) -> None:
    case = Case(path)
    model = build(case)
    inputs, patch = case.inputs, config_of(case).image.patch
    matched = inputs["itm_labels"].bool()
    chosen = torch.where(matched[:, None, None, None], inputs["image"], inputs["false_image_0"])
    seen = {
        name: pictures_of(images, patch, case.outputs[f"{name}/patch_index"], case.outputs[f"{name}/image_masks"])
        for name, images in (("mlm_infer", inputs["image"]), ("itm_infer", chosen))
    }
    mask, labels = inputs["text_masks"], inputs["text_labels_mlm"]
    masked_ids = texts_of(inputs["text_ids_mlm"], mask)

    read = labels[mask.bool()] != -100
    masked = MaskedTexts(
        masked_ids.ids,
        read.nonzero().flatten(),
        labels[mask.bool()][read],
        tuple((labels != -100).sum(1).tolist()),
    )
    tokens = model.embed_images(seen["mlm_infer"]).tokens
    losses = {"mlm": mlm_loss(model.fill_masks(tokens, masked, masked_ids.segments), masked.labels)}
    pairs = own_pairs(model, seen["mlm_infer"], masked_ids)
    states = model.read_pairs(pairs)
    check_states(case, "mlm_infer/", model, states, pairs, mask)
    check_rows(case, "mlm_logits", model._words(states[pieces_of(pairs)[0]]), mask)

    pairs = own_pairs(model, seen["itm_infer"], texts_of(inputs["text_ids"], mask))
    found, states = model.itm_wpa(pairs, matched.numpy())
    check_states(case, "itm_infer/", model, states, pairs, mask)
    check(case, "itm_logits", model.itm_head(model.pool(states[pairs.segments.starts(states.device)])))
    losses |= {name: value for name, value in found.items() if not name.startswith("metric/")}
    check_alignment(case, model, states, pairs, matched)
    check(case, "mlm_loss", losses["mlm"])
    check(case, "itm_loss", losses["itm"])
    check(case, "itm_wpa_loss", losses["wpa"])
    total = sum(losses.values())
    assert isinstance(total, Tensor)
    check(case, "loss_total", total)
    total.backward()
    check_gradients(case, model)


def check_alignment(case: Case, model: Vilt, states: Tensor, pairs: Pairs, matched: Tensor) -> None:
    words, word_segments, patches, patch_segments = pairs.aligned(1)
    distance = model.align(states, pairs)
    check(case, "wpa/distance", distance)
    check(case, "wpa/ot_loss", torch.where(matched, distance, -distance).mean())
    cost, valid = cosine_cost(states[words], word_segments, states[patches], patch_segments)
    plan = transport_plan(cost, valid)
    officially = ~case.outputs["wpa/txt_pad"].bool()[:, :, None] & ~case.outputs["wpa/img_pad"].bool()[:, None]
    for name, ours in (("wpa/cost", cost), ("wpa/T", plan)):
        found = torch.zeros(officially.shape)
        found[officially] = ours.detach()[valid]
        check(case, name, found if name == "wpa/cost" else found.mT.contiguous())


def check_gradients(case: Case, model: torch.nn.Module) -> None:
    shapes = {name: shape for name, shape in case.shapes.items() if not name.endswith("position_ids")}

    def convert(given: dict[str, Tensor]) -> dict[str, Tensor]:
        target = {name: value.double() for name, value in model.state_dict().items()}
        return official.convert(given, target).state

    check_grad_norms(case, case.grad_norms, official_gradients(convert, shapes, model))


@pytest.mark.parametrize("path", cases("vilt-base"), ids=lambda p: p.name)
def test_encoding(path: Path) -> None:
    case = Case(path)
    model = build(case)
    mask = case.inputs["text_masks"]
    pictures = pictures_of(case.inputs["image"], config_of(case).image.patch)
    pairs = own_pairs(model, pictures, texts_of(case.inputs["text_ids"], mask))
    with torch.no_grad():
        states = model.read_pairs(pairs)
        check_states(case, "", model, states, pairs, mask)
        check(case, "itm_logits", model.itm_head(model.pool(states[pairs.segments.starts(states.device)])))
        logits = model._words(states[pieces_of(pairs)[0]])
    check_rows(case, "mlm_logits", logits, mask)


@pytest.mark.parametrize("path", cases("vilt-visualembed"), ids=lambda p: p.name)
def test_pictures_of_several_sizes(path: Path) -> None:
    case = Case(path)
    vit = case.config["vit_overrides"]
    config = AspectInput(vit["img_size"], longest=2 * vit["img_size"], patch=vit["patch_size"])
    rows = PatchRows(config, vit["embed_dim"], 0.0)
    weights = case.weights()
    with torch.no_grad():
        rows.class_token.copy_(weights["cls_token"][0, 0])
        rows.positions.copy_(weights["pos_embed"][0])
        rows.patch_embed.weight.copy_(weights["patch_embed.proj.weight"])
        assert rows.patch_embed.bias is not None
        rows.patch_embed.bias.copy_(weights["patch_embed.proj.bias"])
    for run in range(len(case.config["runs"])):
        mask = case.outputs[f"{run}/mask"].bool()
        pictures = pictures_of(
            case.inputs[f"{run}/image"], config.patch, case.outputs[f"{run}/patch_index"], mask.long()
        )
        assert [h for h, _ in pictures.grids] == case.outputs[f"{run}/x_h"].tolist()
        assert [w for _, w in pictures.grids] == case.outputs[f"{run}/x_w"].tolist()
        made = rows(pictures)
        check_rows(case, f"{run}/embed", made.rows, mask)
        positions = grid_positions(rows.positions[1:], pictures)
        patches = mask.clone()
        patches[:, 0] = False
        check_rows(case, f"{run}/pos_embed_selected", positions, patches)


@pytest.mark.parametrize("path", cases("vilt-wpa"), ids=lambda p: p.name)
def test_alignment(path: Path) -> None:
    case = Case(path)
    for number in sorted({name.split("/")[0] for name in case.outputs}):
        text, image = (case.inputs[f"{number}/{side}_emb"] for side in ("txt", "img"))
        present = [~case.inputs[f"{number}/{side}_pad"].bool() for side in ("txt", "img")]
        segments = [Segments.of(mask.sum(1).tolist()) for mask in present]
        for name in sorted({name.split("/")[1] for name in case.outputs if name.startswith(f"{number}/")}):
            beta, iterations = (float(part.lstrip("betair")) for part in name.split("_")[:2])
            leaf = text.clone().requires_grad_()
            rows = leaf[present[0]], image[present[1]]
            distance = alignment_distance(rows[0], segments[0], rows[1], segments[1], beta, int(iterations))
            check(case, f"{number}/{name}/distance", distance)
            distance.sum().backward()
            assert leaf.grad is not None
            check(case, f"{number}/{name}/grad_txt_emb", leaf.grad)
            cost, valid = cosine_cost(rows[0], segments[0], rows[1], segments[1])
            plan = transport_plan(cost.detach(), valid, beta, int(iterations))
            officially = present[0][:, :, None] & present[1][:, None]
            found = torch.zeros(officially.shape)
            found[officially] = plan[valid]
            check(case, f"{number}/{name}/T", found.mT.contiguous())
            found[officially] = cost.detach()[valid]
            check(case, f"{number}/{name}/cost", found)


@pytest.mark.parametrize("path", cases("vilt-irtr"), ids=lambda p: p.name)
def test_ranking_head(path: Path) -> None:
    case = Case(path)
    model = ViltRanking(config_of(case).build()).train()
    load(case, model)
    for parameter in model.vilt.itm_head.parameters():
        parameter.requires_grad_(False)  # as officially
    inputs = case.inputs
    false = sorted({name.removesuffix("_ids") for name in inputs if name.startswith("false_") and name.endswith("ids")})
    ids = torch.stack([inputs["text_ids"], *(inputs[f"{name}_ids"] for name in false)], 1).flatten(0, 1)
    mask = torch.stack([inputs["text_masks"], *(inputs[f"{name}_masks"] for name in false)], 1).flatten(0, 1)
    pictures, texts = pictures_of(inputs["image"], config_of(case).image.patch), texts_of(ids, mask)
    score = model(pictures, texts)
    check(case, "score", score)
    owner = [b for b in range(len(pictures)) for _ in range(1 + len(false))]
    pairs = own_pairs(model.vilt, pictures, texts, owner)
    check_states(case, "", model.vilt, model.vilt.read_pairs(pairs), pairs, mask)
    loss = F.cross_entropy(score, torch.zeros(len(score), dtype=torch.int64))
    check(case, "irtr_loss", loss)
    loss.backward()
    check_gradients(case, model)


@pytest.mark.parametrize("path", cases("vilt-vqa"), ids=lambda p: p.name)
def test_answers_head(path: Path) -> None:
    case = Case(path)
    model = ViltAnswers(config_of(case).build(), case.config["config"]["vqav2_label_size"]).train()
    load(case, model)
    pictures = pictures_of(case.inputs["image"], config_of(case).image.patch)
    logits = model(pictures, texts_of(case.inputs["text_ids"], case.inputs["text_masks"]))
    check(case, "vqa_logits", logits)
    targets = torch.zeros_like(logits)
    for row, labels, scores in zip(targets, case.config["vqa_labels"], case.config["vqa_scores"]):
        row[labels] = torch.tensor(scores)
    loss = F.binary_cross_entropy_with_logits(logits, targets) * targets.shape[1]
    check(case, "vqa_loss", loss)
    loss.backward()
    check_gradients(case, model)


@pytest.mark.parametrize("path", cases("vilt-nlvr2"), ids=lambda p: p.name)
def test_reasoning_head(path: Path) -> None:
    case = Case(path)
    model = ViltReasoning(config_of(case).build()).train()
    load(case, model)
    patch, texts = config_of(case).image.patch, texts_of(case.inputs["text_ids"], case.inputs["text_masks"])
    logits = model([pictures_of(case.inputs[f"image_{n}"], patch) for n in (0, 1)], texts)
    check(case, "nlvr2_logits", logits)
    answers: Any = case.inputs["answers"]
    loss = F.cross_entropy(logits, answers)
    check(case, "nlvr2_loss", loss)
    loss.backward()
    check_gradients(case, model)
