"""Official BEiT-3 checkpoints: pre-training, retrieval, captioning, VQA, NLVR2 and ImageNet.

There ``A`` is the vision expert and ``B`` the language expert; queries, keys and values are matrices of their own; the
position tables have two rows in front that nothing reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from imglish.checkpoints.beit import TOKEN
from imglish.checkpoints.rules import Converted, Drop, Fresh, Rule, Table, Transform
from imglish.nn.embed import resize_grid

UNREAD = 2
"""Rows in front of the official position tables that nothing reads."""

POSITIONS = Transform(lambda x: x[UNREAD:], lambda x: torch.cat([x.new_zeros(UNREAD, x.shape[1]), x]))
EXPERTS = (("A", "image"), ("B", "text"))


def body_rules(final_norm: bool = True) -> Iterator[Rule]:
    """Embeddings, layers and, where the task has them, final norms of the released Multiway Transformer."""
    yield Rule("beit3.text_embed.weight", "body.words.weight")
    yield Rule("beit3.vision_embed.mask_token", "body.mask_token", TOKEN)
    yield Rule("beit3.vision_embed.cls_token", "body.class_token", TOKEN)
    yield Rule("beit3.vision_embed.proj.{leaf}", "body.patch_embed.{leaf}")
    yield Rule("beit3.encoder.embed_positions.A.weight", "body.image_positions", POSITIONS)
    yield Rule("beit3.encoder.embed_positions.B.weight", "body.text_positions", POSITIONS)
    for theirs, ours in EXPERTS:
        layer, block = "beit3.encoder.layers.{i}.", "body.blocks.{i}."
        attention, ffn = f"{layer}self_attn.", f"{layer}ffn.{theirs}."
        projections = tuple(f"{attention}{name}_proj.{theirs}.{{leaf}}" for name in ("q", "k", "v"))
        yield Rule(f"{layer}self_attn_layer_norm.{theirs}.{{leaf}}", f"{block}attn.norm.{ours}.{{leaf}}")
        yield Rule(projections, f"{block}attn.qkv.{ours}.{{leaf}}")
        yield Rule(f"{attention}inner_attn_ln.{theirs}.{{leaf}}", f"{block}attn.sub_norm.{ours}.{{leaf}}")
        yield Rule(f"{attention}out_proj.{theirs}.{{leaf}}", f"{block}attn.out.{ours}.{{leaf}}")
        yield Rule(f"{layer}final_layer_norm.{theirs}.{{leaf}}", f"{block}ffn.{ours}.norm.{{leaf}}")
        yield Rule(f"{ffn}ffn_layernorm.{{leaf}}", f"{block}ffn.{ours}.sub_norm.{{leaf}}")
        yield Rule(f"{ffn}{{matrix}}.{{leaf}}", f"{block}ffn.{ours}.{{matrix}}.{{leaf}}")
        if final_norm:
            yield Rule(f"beit3.encoder.layer_norm.{theirs}.{{leaf}}", f"body.norm.{ours}.{{leaf}}")


def table() -> Table:
    """Pre-training, retrieval and captioning: heads that a checkpoint lacks stay as they are in the model."""
    return Table(
        *body_rules(),
        Rule("mlm_head.{leaf}", "mlm_head.{leaf}"),
        Rule("mim_head.{leaf}", "mim_head.{leaf}"),
        Rule("vision_head.weight", "image_proj.weight"),
        Rule("language_head.weight", "text_proj.weight"),
        Rule("logit_scale", "logit_scale"),
    )


def vqa_table() -> Table:
    """Of the released models for VQA: body, pooler and the head of answers."""
    return Table(
        *body_rules(final_norm=False),
        Rule("pooler.norm.{leaf}", "pool_norm.{leaf}"),
        Rule("pooler.dense.{leaf}", "pool.{leaf}"),
        Rule("head.0.{leaf}", "hidden.{leaf}"),
        Rule("head.1.{leaf}", "hidden_norm.{leaf}"),
        Rule("head.3.{leaf}", "answer.{leaf}"),
    )


def nlvr2_table() -> Table:
    """Of the released models for NLVR2: body and a head of two layers."""
    return Table(*body_rules(), Rule("head.{part}.{leaf}", "{part}.{leaf}"))


def imagenet_table() -> Table:
    """Of the released classifiers: body, a norm of the mean patch and one layer."""
    return Table(
        *body_rules(final_norm=False), Rule("fc_norm.{leaf}", "norm.{leaf}"), Rule("head.{leaf}", "head.{leaf}")
    )


HEADS = {
    "mlm_head.{leaf}": "mlm_head.",
    "mim_head.{leaf}": "mim_head.",
    "image_proj.weight": "vision_head.",
    "text_proj.weight": "language_head.",
    "logit_scale": "logit_scale",
}
"""Heads of ours, and how the names of their official counterparts begin."""


def convert(official: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Converted:
    """The state dict of :class:`imglish.models.beit3.Beit3` from a pre-training, retrieval or captioning checkpoint.

    ``target``: the model's state dict; heads that the checkpoint does not have stay as they are there, heads that the
    model does not have are dropped. Positions of pictures of another size are resampled.
    """
    there = {ours: any(name.startswith(theirs) for name in official) for ours, theirs in HEADS.items()}
    wanted = {ours: any(name.startswith(ours.split("{")[0]) for name in target) for ours in HEADS}
    extra: list[Drop | Fresh] = []
    for ours, theirs in HEADS.items():
        if wanted[ours] and not there[ours]:
            extra.append(Fresh(ours, "the checkpoint has no such head"))
        elif there[ours] and not wanted[ours]:
            found = [name for name in official if name.startswith(theirs)]
            extra += [Drop(name, "the model has no such head") for name in found]
    return (Table(*extra) + table()).convert(resized(official, target), target)


def resized(official: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``official`` with the picture's position table resampled to the size of the model's, where they differ.

    The rows that nothing reads and the class token's stay, patches are resampled bicubically without antialias.
    """
    name = "beit3.encoder.embed_positions.A.weight"
    made = dict(official)
    side = round((target["body.image_positions"].shape[0] - 1) ** 0.5)
    made[name] = resize_grid(official[name], (side, side), prefix=UNREAD + 1)
    return made
