"""BEiT-3 as released against the official code: states, heads, losses, gradients, contrast over ranks, 5 steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.checkpoints import beit3 as official
from imglish.checkpoints.rules import Rule, Table
from imglish.data.batch import Batch, PatchMasks, TextBatch
from imglish.data.tasks.batch import TaskBatch
from imglish.evaluation.metrics import recalls
from imglish.generation.beam import BeamRule, search
from imglish.generation.config import GenerationConfig
from imglish.models.beit3 import Beit3, Beit3Config, beit3_base, beit3_large
from imglish.models.beit3_heads import Beit3Classifier, Beit3Nlvr2, Beit3Vqa
from imglish.models.expert_sizes import HALF
from imglish.models.heads import ClassModel, HeadConfig
from imglish.models.multiway import Multiway, MultiwayConfig
from imglish.models.vit import ImageInput
from imglish.nn.packing import Packing
from imglish.nn.segments import Segments
from imglish.objectives.itc import itc_loss
from imglish.objectives.mlm import smoothed_mlm_loss
from imglish.training.config import OptimiserRecipe, ScheduleRecipe
from imglish.training.optim import build_optimiser, layer_rates, learning_rate, set_learning_rate
from tests.golden.support import Case, M, cases, check, check_grad_norms, filled, golden_root, official_gradients
from tests.golden.test_beit import masks_of, state_dict_of
from tests.ranks import run_ranks


def config_of(case: Case, *outputs: Any, objective: Any = "itc") -> Beit3Config:
    given = case.config["encoder_config"]
    positions = next(s for name, s, _ in case.meta["parameters"] if name.endswith("embed_positions.B.weight"))
    assert given["multiway"]
    assert not given["layernorm_embedding"]
    (eps,) = case.meta["layer_norm_eps"]
    return Beit3Config(
        image=ImageInput(given["img_size"], HALF, HALF),
        patch=given["patch_size"],
        vocab_size=given["vocab_size"],
        max_length=positions[0] - official.UNREAD,
        width=given["encoder_embed_dim"],
        depth=given["encoder_layers"],
        heads=given["encoder_attention_heads"],
        hidden=given["encoder_ffn_embed_dim"],
        norm_eps=float(eps),
        drop_path=0.0,
        outputs=outputs or ("itc",),
        objective=objective,
        mask_id=case.meta.get("generation", {}).get("ids", {}).get("mask", given["vocab_size"] - 1),
    )


def texts_of(case: Case, ids: str = "text_ids", pad: bool = True) -> TextBatch:
    tokens = case.inputs[ids]
    mask = ~case.inputs["padding_mask"].bool() if pad else torch.ones_like(tokens, dtype=torch.bool)
    return TextBatch(tokens[mask], Segments.of(mask.sum(1).tolist()))


def load(case: Case, build: Callable[[], M], table: Table) -> M:
    return filled(build, lambda target: table.convert(case.weights(), target).state)


def states_of(body: Multiway, images: Tensor | None, texts: TextBatch | None, masked: PatchMasks | None = None) -> Any:
    """Embeddings without positions, states after each layer, final states: each as (picture rows, text rows)."""
    alone = images is None or texts is None
    none = Segments(())
    rows, bare, picture_segments, text_segments = [], [], none, none
    if images is not None:
        pictures = body.picture_rows(images, masked)
        picture_segments = Segments.equal(*pictures.shape[:2])
        rows.append(pictures.flatten(0, 1))
        bare.append((pictures - body.image_positions).flatten(0, 1))
    if texts is not None:
        rows.append(body.text_rows(texts))
        bare.append(body.words(texts.ids))
        text_segments = texts.segments
    if alone:
        packing = Packing(image=picture_segments, text=text_segments)
    else:
        packing = Packing(fused_image=picture_segments, fused_text=text_segments)
    states = [torch.cat(rows)]
    for block in body.blocks:
        states.append(block(states[-1], packing))
    cut = [picture_segments.total, text_segments.total]
    return [state.split(cut) for state in (torch.cat(bare), *states[1:], body.normed(states[-1], packing))]


def laid_out(case: Case, parts: tuple[Tensor, Tensor], count: int, valid: Tensor | None, like: Tensor) -> Tensor:
    """Rows as the official code lays them out ``(B, L, D)``; where a text is padded, the expected value itself."""
    pictures, words = parts
    image = pictures.unflatten(0, (count, -1)) if pictures.numel() else like[:, :0]
    if not words.numel():
        return image
    text = like[:, image.shape[1] :].clone()
    text[valid if valid is not None else torch.ones(text.shape[:2], dtype=torch.bool)] = words
    return torch.cat([image, text], dim=1)


def check_states(case: Case, name: str, states: Any, count: int, valid: Tensor | None) -> None:
    for suffix, which in (("encoder_embedding", states[0]), ("encoder_out", states[-1])):
        if f"{name}.{suffix}" in case.outputs:
            expected = case.outputs[f"{name}.{suffix}"]
            check(case, f"{name}.{suffix}", laid_out(case, which, count, valid, expected))
    if f"{name}.hidden" in case.outputs:
        expected = case.outputs[f"{name}.hidden"]
        each = [laid_out(case, part, count, valid, expected[i]) for i, part in enumerate(states[1:-1])]
        check(case, f"{name}.hidden", torch.stack(each))
    if f"{name}.encoder_out.slice" in case.outputs:  # first and last four tokens, every eighth channel
        expected = case.outputs[f"{name}.encoder_out.slice"]
        pictures, words = (part[:, ::8] for part in states[-1])
        rows = [pictures.unflatten(0, (count, -1))] if pictures.numel() else []
        if words.numel():
            length = valid.shape[1] if valid is not None else words.shape[0] // count
            text = torch.full((count, length, words.shape[1]), torch.nan)
            text[valid if valid is not None else torch.ones(count, length, dtype=torch.bool)] = words
            rows.append(text)
        whole = torch.cat(rows, dim=1)
        some = torch.cat([whole[:, :4], whole[:, -4:]], dim=1)
        check(case, f"{name}.encoder_out.slice", torch.where(some.isnan(), expected, some))


@pytest.mark.parametrize("path", cases("beit3-encoder"), ids=lambda p: p.name)
def test_encoder(path: Path) -> None:
    case = Case(path)
    model = load(case, lambda: Multiway(config_of(case)), body_table())
    assert isinstance(model, Multiway)
    images, masked = case.inputs["image"], masks_of(case.inputs["vision_masked_position"])
    padded, whole = texts_of(case), texts_of(case, pad=False)
    valid, count = ~case.inputs["padding_mask"].bool(), len(images)
    with torch.no_grad():
        for name, picture, text, masks, shown in (
            ("image", images, None, None, None),
            ("text", None, padded, None, valid),
            ("pair", images, padded, None, valid),
            ("pair_nopad", images, whole, None, None),
            ("image_masked", images, None, masked, None),
            ("pair_masked", images, padded, masked, valid),
        ):
            check_states(case, name, states_of(model, picture, text, masks), count, shown)
    found = {name.split(".")[0] for name in case.outputs}
    assert found == {"image", "text", "pair", "pair_nopad", "image_masked", "pair_masked"}


def body_table() -> Table:
    """The rules of the body, for a model that is nothing else, under names of its own."""

    def bare(rule: Rule) -> Rule:
        sources = tuple(source.removeprefix("beit3.") for source in rule.sources)
        return Rule(sources, rule.target.removeprefix("body."), rule.transform)

    return Table(*map(bare, official.body_rules()))


def check_gradients(case: Case, model: nn.Module, table: Table) -> None:
    if not case.grad_norms:
        return
    target = {name: value.double() for name, value in model.state_dict().items()}
    found = official_gradients(lambda numbers: numbered(numbers, target, table), case.shapes, model)
    check_grad_norms(case, case.grad_norms, found)
    for name in (n for n in case.outputs if n.startswith("grad.")):
        gradient = found[name.removeprefix("grad.")]
        assert gradient is not None
        expected = case.outputs[name]
        limit = 1e-5 * max(1.0, max(v for v in case.grad_norms.values() if v is not None))  # key biases are noise
        torch.testing.assert_close(gradient.float().reshape(expected.shape), expected, rtol=1e-3, atol=limit)


def numbered(numbers: dict[str, Tensor], target: dict[str, Tensor], table: Table) -> dict[str, Tensor]:
    return table.convert(numbers, target).state


@pytest.mark.parametrize("path", cases("beit3-retrieval-tiny"), ids=lambda p: p.name)
def test_retrieval(path: Path) -> None:
    case = Case(path)
    model = load(case, config_of(case).build, retrieval_table())
    assert isinstance(model, Beit3)
    images, texts = case.inputs["image"], texts_of(case)
    count = len(images)
    with torch.no_grad():
        check_states(case, "image", states_of(model.body, images, None), count, None)
        check_states(case, "text", states_of(model.body, None, texts), count, ~case.inputs["padding_mask"].bool())
        check(case, "vision_cls", model.encode_images(images).features)
        check(case, "language_cls", model.encode_texts(texts).features)
    embedded = model.embed(batch_of(images, texts))
    assert model.logit_scale is not None
    logits = model.logit_scale.exp() * embedded.image @ embedded.text.T
    check(case, "logits_per_image", logits)
    check(case, "logits_per_text", logits.T)
    loss = model.losses(batch_of(images, texts))["itc"]
    check(case, "loss", loss)
    loss.backward()
    check_gradients(case, model, retrieval_table())


def retrieval_table() -> Table:
    rules = [r for r in official.table().rules if "mlm_head" not in str(r) and "mim_head" not in str(r)]
    return Table(*rules)


def batch_of(images: Tensor, texts: TextBatch) -> Batch:
    return Batch(images, texts, torch.arange(len(images)), torch.zeros(len(images), 2))


def bare_body(config: MultiwayConfig) -> Multiway:
    """Without a final norm, as below the heads of answers and classes."""
    return Multiway(config, final_norm=False)


@pytest.mark.parametrize("path", cases("beit3-vqa"), ids=lambda p: p.name)
def test_question_answering(path: Path) -> None:
    case = Case(path)
    model = load(case, lambda: Beit3Vqa(bare_body(config_of(case)), case.config["num_classes"]), official.vqa_table())
    images, texts = case.inputs["image"], texts_of(case)
    if "labels" in case.inputs:
        labels = case.inputs["labels"]
    else:
        labels = torch.zeros(len(images), case.config["num_classes"])
        labels[tuple(case.inputs["labels_index"].T)] = case.inputs["labels_value"]
    logits = model(images, texts)
    check(case, "logits", logits)
    check(case, "pooled", model.pooled(images, texts))
    check(case, "vqa_score", labels[torch.arange(len(images)), logits.argmax(1)].mean())
    with torch.no_grad():
        states = states_of(model.body, images, texts)
        check_states(case, "pair", states, len(images), ~case.inputs["padding_mask"].bool())
    loss = model.loss(images, texts, labels)
    check(case, "loss", loss)
    loss.backward()
    check_gradients(case, model, official.vqa_table())


@pytest.mark.parametrize("path", cases("beit3-nlvr2"), ids=lambda p: p.name)
def test_pairs_of_pictures(path: Path) -> None:
    case = Case(path)
    model = load(
        case, lambda: Beit3Nlvr2(Multiway(config_of(case)), case.config["num_classes"]), official.nlvr2_table()
    )
    first, second, texts = case.inputs["image_a"], case.inputs["image_b"], texts_of(case)
    logits = model([first, second], texts)
    check(case, "logits", logits)
    check(case, "acc", (logits.argmax(1) == case.inputs["labels"]).float().mean())
    with torch.no_grad():
        for name, images in (("pair_a", first), ("pair_b", second)):
            states = states_of(model.body, images, texts)
            check_states(case, name, states, len(images), ~case.inputs["padding_mask"].bool())
    loss = model.loss([first, second], texts, case.inputs["labels"])
    check(case, "loss", loss)
    loss.backward()
    check_gradients(case, model, official.nlvr2_table())


@pytest.mark.parametrize("path", cases("beit3-imagenet"), ids=lambda p: p.name)
def test_classes(path: Path) -> None:
    case = Case(path)
    model = load(
        case, lambda: Beit3Classifier(bare_body(config_of(case)), case.config["num_classes"]), official.imagenet_table()
    )
    images, labels = case.inputs["image"], case.inputs["labels"]
    with torch.no_grad():
        check_states(case, "image", states_of(model.body, images, None), len(images), None)
    check(case, "logits", model(images))
    check(case, "loss_soft_target", F.cross_entropy(model(images), case.inputs["soft_labels"]))
    batch = TaskBatch((images,), TextBatch.of([[] for _ in labels]), labels)
    for name, smoothing in (("loss_ce", 0.0), ("loss_label_smoothing_0.1", 0.1)):
        classes = tuple(map(str, range(case.config["num_classes"])))
        head = HeadConfig("classification", classes=classes, texts=False, smoothing=smoothing)
        check(case, name, ClassModel(config_of(case).build(), head, model).losses(batch)["classes"])


def captioner_of(case: Case) -> Beit3:
    config = config_of(case, "mlm", objective="captions")
    return filled(config.build, lambda target: official.convert(case.weights(), target).state)


@pytest.mark.parametrize("path", cases("beit3-captioning"), ids=lambda p: p.name)
def test_captioning(path: Path) -> None:
    case = Case(path)
    given = case.meta["generation"]
    model = captioner_of(case)
    images, texts, masked = case.inputs["image"], texts_of(case), texts_of(case, "masked_tokens")
    valid = ~case.inputs["padding_mask"].bool()
    asked = case.inputs["language_masked_pos"].bool()
    index = torch.nonzero(asked[valid]).squeeze(1)
    labels, counts = texts.ids[index], tuple((asked & valid).sum(1).tolist())
    logits = model.fill_caption_masks(images, masked, index, counts)
    check(case, "masked_logits", logits)
    everything = torch.arange(masked.segments.total)
    with torch.no_grad():
        found = model.fill_caption_masks(images, masked, everything, masked.segments.lengths)
    expected = case.outputs["all_logits"].clone()
    expected[valid] = found
    check(case, "all_logits", expected)
    check(case, "acc", (logits.argmax(1) == labels).float().mean())
    loss = smoothed_mlm_loss(logits, labels, given["label_smoothing"])
    check(case, "loss", loss)
    check(
        case, "loss_drop_worst", smoothed_mlm_loss(logits, labels, given["label_smoothing"], given["drop_worst_ratio"])
    )
    loss.backward()
    target = {name: value.double() for name, value in model.state_dict().items()}
    gradients = official_gradients(lambda numbers: official.convert(numbers, target).state, case.shapes, model)
    check_grad_norms(case, case.grad_norms, gradients)


PUBLISHED_BEIT3 = BeamRule(prompt_counts=True)  # its lengths count the start token and one [MASK] at the end


@pytest.mark.parametrize("path", cases("beit3-captioning"), ids=lambda p: p.name)
def test_captions_by_masked_decoding(path: Path) -> None:
    case = Case(path)
    given, ids = case.meta["generation"], case.meta["generation"]["ids"]
    model = captioner_of(case).eval()
    prompts = [[ids["cls"]]] * len(case.inputs["image"])
    for beams in given["num_beams"]:
        config = GenerationConfig(beams=beams, max_length=given["max_len"], length_penalty=given["length_penalty"])
        with torch.no_grad():
            state = model.start_captions(model.encode_images(case.inputs["image"]), config.max_length)
            logits = model.continue_captions(state, TextBatch.of(prompts))
            found = search(model, state, logits, prompts, ids["sep"], config, PUBLISHED_BEIT3)
        for (text,), row in zip([texts[:1] for texts in found], case.outputs[f"generate.beams{beams}"], strict=True):
            words = row[1 : row.tolist().index(ids["mask"])].tolist()
            cut = len(words) + 3 == given["max_len"]  # start, [MASK], end: officially the last token is lost then
            assert list(text.ids)[: len(words)] == words
            assert len(text.ids) in (len(words), len(words) + cut)


@pytest.mark.parametrize("path", cases("beit3-train5"), ids=lambda p: p.name)
def test_five_steps(path: Path) -> None:
    case = Case(path)
    given = case.meta["train"]
    model = load(case, config_of(case).build, retrieval_table())
    recipe = OptimiserRecipe(
        lr=given["lr"],
        betas=tuple(given["betas"]),
        eps=given["eps"],
        weight_decay=given["weight_decay"],
        layer_decay=given["layer_decay"],
        clip_norm=given["clip"],
    )
    optimiser = build_optimiser(model, recipe)
    scales = layer_rates(model, given["layer_decay"])
    named = {id(p): name for name, p in model.named_parameters()}
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            assert group["scale"] == pytest.approx(scales.get(named[id(parameter)], 1.0))
    theirs = {g["lr_scale"] for g in case.meta["optimizer_groups"]["groups"]}
    assert {round(s, 9) for s in scales.values()} == {round(s, 9) for s in theirs}
    total, warmup = given["total_iterations"], given["warmup_steps"]
    schedule = ScheduleRecipe(steps=total, warmup_steps=warmup - 1, lr_min=given["min_lr"])
    batch, losses = batch_of(case.inputs["image"], texts_of(case)), []
    for step in range(len(case.outputs["loss_per_step"])):
        lr = learning_rate(step - 1, total, given["lr"], schedule)
        assert lr == pytest.approx(float(case.outputs["lr_schedule"][step]), abs=1e-12)
        set_learning_rate(optimiser, lr)
        assert isinstance(model, Beit3)
        loss = model.losses(batch)["itc"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), case.outputs["loss_per_step"], rtol=1e-3, atol=1e-4)
    after, begun = retrieval_table().revert(model.state_dict()), case.weights()
    for name, value in after.items():
        if "embed_positions" in name:  # rows that nothing reads are not in our model
            value[: official.UNREAD] = begun[name][: official.UNREAD]
        if "k_proj" not in name or not name.endswith("bias"):  # their gradient is rounding noise
            assert float(value.norm()) == pytest.approx(case.meta["parameter_norm_after"][name], rel=1e-3), name
    for name in (n for n in case.outputs if n.startswith("after.")):
        mine = after[name.removeprefix("after.")]
        torch.testing.assert_close(mine, case.outputs[name].reshape(mine.shape), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("path", cases("beit3-cosine"), ids=lambda p: p.name)
def test_schedule(path: Path) -> None:
    """Officially the first step has the starting rate itself: the same curve as ours, a step later."""
    case = Case(path)
    for name, given in case.config.items():
        total = given["epochs"] * given["niter_per_ep"]
        warmup = given.get("warmup_steps", 0) or given.get("warmup_epochs", 0) * given["niter_per_ep"]
        later = 1 if warmup else 0
        schedule = ScheduleRecipe(
            steps=total,
            warmup_steps=max(0, warmup - 1),
            lr_min=given["final_value"],
            lr_start=given.get("start_warmup_value", 0.0),
            shape=given.get("sched_type", "cosine"),
        )
        ours = [learning_rate(step - later, total, given["base_value"], schedule) for step in range(total)]
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), case.outputs[name], rtol=1e-9, atol=1e-12)


def sized(name: str) -> Beit3Config:
    """The configuration of a published model by the words of its name."""
    config = beit3_large() if "large" in name else beit3_base()
    size = int(name.split("patch16_")[1].split("_")[0])
    return replace(config, image=replace(config.image, size=size))


@pytest.mark.parametrize("path", sorted(golden_root().rglob("param-shapes/beit3_*.json")), ids=lambda p: p.stem)
def test_published_sizes(path: Path) -> None:
    listed = json.loads(path.read_text())
    config, task = sized(listed["model"]), listed["model"].rsplit("_", 1)[1]
    with torch.device("meta"):
        weights = {str(name): torch.empty(shape) for name, shape, *_ in state_dict_of(listed)}
        model, table = {
            "retrieval": lambda: (replace(config, outputs=("itc",), objective="itc").build(), retrieval_table()),
            "captioning": lambda: (replace(config, outputs=("mlm",), objective="captions").build(), official.table()),
            "vqav2": lambda: (Beit3Vqa(bare_body(config)), official.vqa_table()),
            "nlvr2": lambda: (Beit3Nlvr2(Multiway(config)), official.nlvr2_table()),
            "imageclassification": lambda: (Beit3Classifier(bare_body(config)), official.imagenet_table()),
        }[task]()
        converted = table.convert(weights, model.state_dict())
        assert not converted.report
        assert set(table.revert(converted.state)) == set(weights)
    unread = 2 * official.UNREAD * config.width  # two rows of each of the two position tables
    assert sum(p.numel() for p in model.parameters()) + unread == listed["parameter_count"]


@pytest.mark.parametrize("path", cases("beit3-posembed"), ids=lambda p: p.name)
def test_position_resize(path: Path) -> None:
    case = Case(path)
    (name,) = case.outputs
    config = config_of(case)
    larger = replace(config, image=replace(config.image, size=case.meta["target_image"])).build()
    weights = {**case.weights(), **case.inputs}
    table = official.resized(weights, larger.state_dict())[name]
    check(case, name, table)
    converted = official.convert(weights, larger.state_dict()).state
    torch.testing.assert_close(converted["body.image_positions"], table[official.UNREAD :])


def contrast(rank: int, images: Tensor, texts: Tensor, scale: float) -> tuple[Tensor, ...]:
    size = len(images) // 2
    image, text = (x[rank * size : (rank + 1) * size].clone().requires_grad_(True) for x in (images, texts))
    factor = torch.tensor(scale, requires_grad=True)
    loss = itc_loss(image, text, factor)
    loss.backward()
    assert image.grad is not None
    assert text.grad is not None
    assert factor.grad is not None
    return loss.detach(), image.grad, text.grad, factor.grad


@pytest.mark.parametrize("path", cases("beit3-cliploss"), ids=lambda p: p.name)
def test_contrast_over_ranks(path: Path) -> None:
    case = Case(path)
    images, texts = case.inputs["image_features"], case.inputs["text_features"]
    world, scale = case.config["world_size"], case.config["logit_scale"]
    assert world == 2
    results = run_ranks(world, contrast, images, texts, scale)
    for position, name in enumerate(("loss", "grad_image", "grad_text", "grad_scale")):
        check(case, name, torch.stack([result[position] for result in results]))
    logits = scale * images @ texts.T
    check(case, "logits_per_image", logits.unflatten(0, (world, -1)))
    check(case, "logits_per_text", logits.T.unflatten(0, (world, -1)))


@pytest.mark.parametrize("path", cases("beit3-retrieval-metrics"), ids=lambda p: p.name)
def test_metrics(path: Path) -> None:
    case = Case(path)
    unique, owner = torch.unique(case.inputs["image_ids"], return_inverse=True)
    first = torch.stack([torch.nonzero(owner == i)[0, 0] for i in range(len(unique))])
    scores = case.inputs["image_features_per_caption"][first] @ case.inputs["text_features"].T
    names = [name for name in case.outputs if name != "average_score"]
    found = recalls(scores, owner, sorted({int(name.split("_r")[1]) for name in names}))
    ours = {name: found[name.replace("tr_", "i2t_").replace("ir_", "t2i_")] for name in names}
    ours["average_score"] = sum(ours.values()) / len(ours)
    for name, value in ours.items():
        check(case, name, torch.tensor(value))
