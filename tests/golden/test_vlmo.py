"""VLMo against the official pre-training, text stage and retrieval: outputs, losses, gradients, five steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from imglish.checkpoints import vlmo as official
from imglish.data.batch import Batch, TextBatch
from imglish.models.expert_sizes import HALF
from imglish.models.vit import ImageInput
from imglish.models.vlmo import Vlmo, VlmoConfig, vlmo_base, vlmo_base_plus, vlmo_large
from imglish.nn.packing import Packing
from imglish.nn.relative import image_index, relative_index
from imglish.nn.segments import Segments
from imglish.objectives.itm import negative_weights
from imglish.training.optim import train_only
from tests.golden.aligned import draws_for, masked_of, texts_of
from tests.golden.support import REPOSITORY, Case, cases, check, check_grad_norms, filled, official_gradients

RECIPE = yaml.safe_load((REPOSITORY / "recipes" / "vlmo-staged.yaml").read_text())
TEXT_STAGE = RECIPE["stages"]["texts"]["optimiser"]["only"]

ARCHITECTURES = {
    "vlmo_base_patch16": vlmo_base,
    "vlmo_base_plus_patch16": vlmo_base_plus,
    "vlmo_large_patch16": vlmo_large,
}


def config_of(meta_config: dict[str, Any]) -> VlmoConfig:
    """Our configuration from the official dictionaries of a case."""
    run, sizes = meta_config["vlmo_config"], meta_config["transformer_arguments"]
    losses = run["loss_names"]
    if isinstance(sizes, str):
        config = ARCHITECTURES[sizes]()
    else:
        relative = sizes.get("need_relative_position_embed", True)
        config = VlmoConfig(
            patch=sizes["patch_size"],
            width=sizes["embed_dim"],
            depth=sizes["depth"],
            heads=sizes["num_heads"],
            hidden=int(sizes["embed_dim"] * sizes.get("mlp_ratio", 4)),
            fused_layers=sizes["depth"] - sizes["vlffn_start_layer_index"],
            positions="relative" if relative else "absolute",
            layer_scale=sizes.get("layer_scale_init_values", 0.1),
            embed_dim=sizes["embed_dim"],
        )
    contrast = bool(losses["itc"] or losses["irtr"])
    return replace(
        config,
        image=ImageInput(run["image_size"], HALF, HALF),
        vocab_size=run["vocab_size"],
        max_length=run["max_text_len"],
        text_distances=run["max_text_len_of_initckpt"],
        fused_layers=0 if losses["textmlm"] else config.fused_layers,
        drop_path=run["drop_path_rate"],
        itc=contrast,
        itc_fused=bool(losses["itc"]),
        itm=bool(losses["itm"]),
        mlm=bool(losses["mlm"] or losses["textmlm"]),
    )


def build(case: Case) -> Vlmo:
    """The model with the weights of the fill rule, through the checkpoint conversion."""
    config = config_of(case.config)
    return filled(config.build, lambda target: official.convert(case.weights(), target, config).state).train()


def batch_of(inputs: dict[str, Tensor]) -> Batch:
    mask = inputs["text_masks"]
    texts, count = texts_of(inputs["text_ids"], mask), len(mask)
    masked = None
    if "text_ids_mlm" in inputs:
        masked = masked_of(inputs["text_ids_mlm"], inputs["text_labels_mlm"], mask)
    images = inputs.get("image", torch.zeros(count, 3, 0, 0))
    return Batch(images, texts, torch.arange(count), torch.zeros(count, 2), masked)


def padded(rows: Tensor, mask: Tensor) -> Tensor:
    """Packed text rows ``(T, D)`` where the official code has ``(B, L, D)``; NaN where it computes padding."""
    full = torch.full((*mask.shape, rows.shape[-1]), float("nan"))
    full[mask.bool()] = rows.detach()
    return full


def compare(case: Case, name: str, value: Tensor) -> None:
    """``check`` against ``name``, or against its stored slice; NaN stands for values that only padding has."""
    value = value.detach()
    if name in case.outputs:
        check(case, name, torch.where(value.isnan(), case.outputs[name], value))
    elif f"{name}.slice" in case.outputs:
        tokens = [0, 1, 2, value.shape[-2] - 2, value.shape[-2] - 1]
        some = value[..., :3, :32] if name.endswith("hidden") else value[..., tokens, :64]
        check(case, f"{name}.slice", torch.where(some.isnan(), case.outputs[f"{name}.slice"], some))


def layer_outputs(model: Vlmo, rows: Tensor, packing: Packing, first: int = 0) -> list[Tensor]:
    """Rows after each layer from number ``first`` on."""
    bias, found = model._bias(packing), []
    for layer in range(first, model.config.depth):
        rows = model.blocks[layer](rows, packing, bias[layer])
        found.append(rows)
    return found


class Passes:
    """The official forwards, one at a time and with every row, from the pieces of our model."""

    def __init__(self, case: Case, model: Vlmo, batch: Batch, mask: Tensor) -> None:
        self.case, self.model, self.mask = case, model, mask
        self.texts, self.config = batch.texts, model.config
        self.rows = model.text_rows(batch.texts)
        self.pictures = model.picture_rows(batch.squares) if batch.has_images else None

    def pairs(self) -> None:
        assert self.pictures is not None
        count, tokens, case = *self.pictures.shape[:2], self.case
        packing = Packing(fused_image=Segments.equal(count, tokens), fused_text=self.texts.segments)

        def laid(rows: Tensor) -> Tensor:
            image, text = rows.split([count * tokens, self.texts.segments.total])
            return torch.cat([padded(text, self.mask), image.unflatten(0, (count, tokens))], dim=1)

        hidden = layer_outputs(self.model, torch.cat([self.pictures.flatten(0, 1), self.rows]), packing)
        compare(case, "infer.hidden", torch.stack([laid(rows) for rows in hidden]))
        normed = laid(self.model.norm(hidden[-1]))
        compare(case, "infer.text_feats", normed[:, : self.mask.shape[1]])
        compare(case, "infer.image_feats", normed[:, self.mask.shape[1] :])
        compare(case, "infer.raw_cls_feats", normed[:, 0])
        if self.config.itm:
            compare(case, "infer.cls_feats", torch.tanh(self.model.pooler(normed[:, 0])))

    def alone(self, kind: str, suffix: str = "") -> None:
        """``kind``: image or text."""
        case, model, name = self.case, self.model, f"infer_{kind}{suffix}"
        if kind == "image":
            assert self.pictures is not None
            count, tokens = self.pictures.shape[:2]
            packing = Packing(image=Segments.equal(count, tokens))
            fused = Packing(fused_image=packing.image, fused_text=Segments.equal(count, 0))
            rows = self.pictures.flatten(0, 1)
        else:
            packing, rows = Packing(text=self.texts.segments), self.rows
            fused = Packing(fused_image=Segments.equal(packing.text.count, 0), fused_text=packing.text)

        def laid(rows: Tensor) -> Tensor:
            return padded(rows, self.mask) if kind == "text" else rows.unflatten(0, (count, tokens)).detach()

        hidden = layer_outputs(model, rows, packing)
        compare(case, f"{name}.hidden", torch.stack([laid(x) for x in hidden]))
        compare(case, f"{name}.{kind}_feats", laid(model.norm(hidden[-1])))
        compare(case, f"{name}.raw_cls_feats", laid(hidden[-1])[:, 0])
        below = self.config.depth - self.config.fused_layers
        if self.config.itc_fused:
            top = layer_outputs(model, hidden[below - 1], fused, below)
            compare(case, f"{name}.vlffn_hidden", torch.stack([laid(x) for x in top]))


def check_relative(case: Case, model: Vlmo, text: int) -> None:
    """Indices and biases; the official order is text before picture."""
    if model.relative is None:
        return
    table, tokens = model.relative, model.config.tokens
    rows = table.table.shape[0]
    order = torch.cat([torch.arange(tokens, tokens + text), torch.arange(tokens)])
    indices = {
        "relative_position_index": torch.from_numpy(image_index(table.grid)),
        "text_relative_position_index": torch.from_numpy(relative_index(0, text, table.offsets, rows)),
        "text_imag_relative_position_index": torch.from_numpy(relative_index(table.grid, text, table.offsets, rows))[
            order
        ][:, order],
    }
    for name, index in indices.items():
        if name in case.outputs:
            check(case, name, index)
    pair = torch.stack(table.pairwise(True, text))[..., order, :][..., order]
    kinds = {"image": table.pairwise(True, 0), "text": table.pairwise(False, text), "pair": pair.unbind(0)}
    for kind, bias in kinds.items():
        compare(case, f"rel_pos_bias.{kind}", torch.stack(list(bias)))
        compare(case, f"rel_pos_bias.{kind}.layer0_head0", bias[0][0])
        compare(case, f"rel_pos_bias.{kind}.lastlayer_lasthead", bias[-1][-1])


def gradients(case: Case, model: Vlmo) -> dict[str, Tensor | None]:
    """Under the official names."""
    target = {name: value.double() for name, value in model.state_dict().items()}
    return official_gradients(lambda n: official.convert(n, target, model.config).state, case.shapes, model)


def check_gradients(case: Case, model: Vlmo) -> None:
    found = gradients(case, model)
    buffers = case.meta["buffers_kept"]
    check_grad_norms(case, {n: v for n, v in case.grad_norms.items() if n not in buffers}, found)
    for name in case.outputs:
        if name.startswith("grad."):
            gradient = found[name.removeprefix("grad.")]
            assert gradient is not None
            check(case, name, gradient.reshape(-1)[: case.outputs[name].numel()])


def weights_of(model: Vlmo, batch: Batch) -> tuple[Tensor, Tensor]:
    """Probabilities of the negatives: pictures for each text, texts for each picture."""
    embedded, width = model.embed(batch), model.config.embed_dim
    logits = model.logit_scale.exp() * embedded.image[:, :width] @ embedded.text[:, :width].T
    ids = batch.image_ids
    return negative_weights(logits.T, ids, ids), negative_weights(logits, ids, ids)


_PRETRAINING = [  # the published size takes minutes and 10 GB of memory: `make test-slow`
    pytest.param(path, id=path.name, marks=[pytest.mark.slow] if path.name.endswith("-base") else [])
    for path in cases("vlmo-pretrain")
    if "ranks" not in path.name
]


@pytest.mark.parametrize("path", _PRETRAINING)
def test_pretraining_step(path: Path) -> None:
    case = Case(path)
    model, inputs = build(case), case.inputs
    batch, mask = batch_of(inputs), inputs["text_masks"]
    with torch.no_grad():
        check_relative(case, model, mask.shape[1])
        passes = Passes(case, model, batch, mask)
        passes.pairs()
        passes.alone("image")
        passes.alone("text")
        check_contrast(case, model, batch)

    pictures, texts = weights_of(model, batch)
    for name, weights in (("itm.weights_t2i", pictures), ("itm.weights_i2t", texts)):
        expected = case.outputs[name]  # officially zeroed after the softmax, not normalised again
        torch.testing.assert_close(weights, expected / expected.sum(1, keepdim=True), rtol=1e-3, atol=1e-4)
    drawn = inputs["itm_neg_image_for_text"], inputs["itm_neg_text_for_image"]
    batch = replace(batch, draws=torch.stack([draws_for(pictures, drawn[0]), draws_for(texts, drawn[1])], dim=1))
    check_pairs(case, model, batch, mask)

    losses = {name: value for name, value in model.losses(batch).items() if not name.startswith("metric/")}
    for name, value in losses.items():
        check(case, f"{name}.loss", value)
    total = torch.stack(list(losses.values())).sum()
    check(case, "total_loss", total)
    total.backward()
    check_gradients(case, model)


def check_contrast(case: Case, model: Vlmo, batch: Batch) -> None:
    embedded, width = model.embed(batch), model.config.embed_dim
    images, texts = model.encode_images(batch.squares), model.encode_texts(batch.texts)
    torch.testing.assert_close(images.features, embedded.image[:, :width], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(texts.features, embedded.text[:, :width], atol=1e-5, rtol=1e-5)
    target = torch.arange(len(batch))
    for form, name, scale in ((0, "", model.logit_scale), (1, "vl_", model.logit_scale_fused)):
        image, text = (x.split(width, 1)[form] for x in (embedded.image, embedded.text))
        logits = scale.exp() * image @ text.T
        check(case, f"itc.{name}i2t_logits", logits)
        check(case, f"itc.{name}t2i_logits", logits.T)
        check(case, f"itc.ce_{name}i2t", torch.nn.functional.cross_entropy(logits, target))
        check(case, f"itc.ce_{name}t2i", torch.nn.functional.cross_entropy(logits.T, target))
        feature = "vlffn_feats" if form else "feats"
        compare(case, f"infer_image.cls_{feature}", image)
        compare(case, f"infer_text.cls_{feature}", text)


def check_pairs(case: Case, model: Vlmo, batch: Batch, mask: Tensor) -> None:
    """ITM logits in the official order, by ``match``; MLM logits at every position, by ``fill_masks``."""
    with torch.no_grad():
        images, texts = model.encode_images(batch.squares), model.encode_texts(batch.texts)
        assert isinstance(images.tokens, Tensor)
        memory, own = model.project_images(images.tokens), list(range(len(batch)))
        pictures = own + case.inputs["itm_neg_image_for_text"].tolist() + own
        captions = own + own + case.inputs["itm_neg_text_for_image"].tolist()
        check(case, "itm.logits", model.match(memory, texts, pictures, captions))
        assert batch.masked is not None
        everywhere = replace(batch.masked, rows=torch.arange(len(batch.texts.ids)), counts=batch.texts.segments.lengths)
        logits = model.fill_masks(images.tokens, everywhere, batch.texts.segments)
        full = padded(logits, mask)
        compare(case, "mlm.logits", full)
        if "mlm.logit_positions" in case.outputs:
            row, token = case.outputs["mlm.logit_positions"].T
            check(case, "mlm.logits_at_positions", full[row, token][:, ::16])


@pytest.mark.parametrize("path", cases("vlmo-textmlm"), ids=lambda p: p.name)
def test_text_stage(path: Path) -> None:
    case = Case(path)
    model, inputs = build(case), case.inputs
    batch, mask = batch_of(inputs), inputs["text_masks"]
    train_only(model, TEXT_STAGE)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, gradient in trained_officially(case, model).items() if gradient}
    with torch.no_grad():
        check_relative(case, model, mask.shape[1])
        assert batch.masked is not None
        masked = TextBatch(batch.masked.ids, batch.texts.segments)
        passes = Passes(case, model, replace(batch, texts=masked), mask)
        hidden = layer_outputs(model, passes.rows, Packing(text=masked.segments))
        compare(case, "hidden", torch.stack([padded(rows, mask) for rows in hidden]))
        compare(case, "text_feats", padded(model.norm(hidden[-1]), mask))
        everywhere = replace(batch.masked, rows=torch.arange(len(masked.ids)), counts=masked.segments.lengths)
        compare(case, "mlm.logits", padded(model.fill_text_masks(everywhere, masked.segments), mask))
    losses = model.losses(batch)
    check(case, "mlm.loss", losses["mlm"])
    losses["mlm"].backward()
    check_gradients(case, model)


def trained_officially(case: Case, model: Vlmo) -> dict[str, bool]:
    """Our parameter names -> whether the official text stage trains them."""
    trained = set(case.meta["requires_grad_true"])
    marks = {name: torch.full(shape, float(name in trained)) for name, shape in case.shapes.items()}
    return {n: bool(v.any()) for n, v in official.convert(marks, model.state_dict(), model.config).state.items()}


@pytest.mark.parametrize("path", cases("vlmo-irtr"), ids=lambda p: p.name)
def test_retrieval_step(path: Path) -> None:
    case = Case(path)
    model, inputs = build(case), case.inputs
    batch, mask = batch_of(inputs), inputs["text_masks"]
    with torch.no_grad():
        check_relative(case, model, mask.shape[1])
        passes = Passes(case, model, batch, mask)
        passes.alone("image", "_ft")
        passes.alone("text", "_ft")
        embedded = model.embed(batch)
        compare(case, "infer_image_ft.cls_feats", embedded.image)
        compare(case, "infer_text_ft.cls_feats", embedded.text)
        check(case, "irtr_i2t_logits", model.logit_scale.exp() * embedded.image @ embedded.text.T)
    losses = model.losses(batch)
    assert list(losses) == ["itc"]
    check(case, "irtr_loss", losses["itc"])
    losses["itc"].backward()
    check_gradients(case, model)
