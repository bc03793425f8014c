"""Weights of microsoft/unilm/vlmo, and of a BEiT that a VLMo begins with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from imglish.checkpoints.rules import Converted, Drop, Fresh, Rule, Table, Transform
from imglish.models.vlmo import VlmoConfig

EXPERTS = {"text": "text", "imag": "image", "vl": "fused"}
"""Their names of the experts, and ours."""


def table(config: VlmoConfig) -> Table:
    """Official name -> ours, for any of the official checkpoints: pre-training, text stage, retrieval.

    What a checkpoint has beyond the objectives of ``config`` is dropped, except for VL experts and positions, which
    are part of the Transformer: those must agree.
    """
    return Table(*_embeddings(config), *_blocks(config), *_heads(config))


def _embeddings(config: VlmoConfig) -> Iterator[Rule | Drop]:
    yield Rule("transformer.cls_token", "class_token", _FLAT)
    yield Rule("transformer.patch_embed.proj.{leaf}", "patch_embed.{leaf}")
    yield Rule("token_type_embeddings.weight", "types.weight")
    words = "text_embeddings"
    yield Rule(f"{words}.word_embeddings.weight", "embedding.words.weight")
    yield Rule(f"{words}.token_type_embeddings.weight", "embedding.types.weight")
    yield Rule(f"{words}.LayerNorm.{{leaf}}", "embedding.norm.{leaf}")
    yield Drop(f"{words}.position_ids", "counts up from zero")
    if config.positions == "absolute":
        yield Rule("transformer.pos_embed", "positions", Transform(lambda x: x[0], lambda x: x[None]))
        yield Rule(f"{words}.position_embeddings.weight", "embedding.positions.weight")
    else:
        yield Rule("relative_position_bias_table", "relative.table")
        yield Drop(f"{words}.position_embeddings.weight", "not used beside relative positions")


def _blocks(config: VlmoConfig) -> Iterator[Rule]:
    block, ours = "transformer.blocks.{i}", "blocks.{i}"
    for number in (1, 2):
        yield Rule(f"{block}.gamma_{number}", f"{ours}.scale{number}.gamma")
    yield Rule(f"{block}.norm1.{{leaf}}", f"{ours}.attn.norm.all.{{leaf}}")
    yield Rule((f"{block}.attn.q_bias", f"{block}.attn.v_bias"), f"{ours}.attn.qkv.all.bias")
    yield Rule(f"{block}.attn.qkv.weight", f"{ours}.attn.qkv.all.weight")
    yield Rule(f"{block}.attn.proj.{{leaf}}", f"{ours}.attn.out.all.{{leaf}}")
    for theirs, expert in EXPERTS.items():
        yield Rule(f"{block}.norm2_{theirs}.{{leaf}}", f"{ours}.ffn.{expert}.norm.{{leaf}}")
        yield Rule(f"{block}.mlp_{theirs}.{{part}}.{{leaf}}", f"{ours}.ffn.{expert}.{{part}}.{{leaf}}")
    yield Rule("transformer.norm.{leaf}", "norm.{leaf}")


def _heads(config: VlmoConfig) -> Iterator[Rule | Drop]:
    wanted = [
        ("pooler.dense.{leaf}", "pooler.{leaf}", config.itm),
        ("itm_score.fc.{leaf}", "itm_head.{leaf}", config.itm),
        ("mlm_score.bias", "mlm_head.bias", config.mlm),
        ("mlm_score.transform.dense.{leaf}", "mlm_head.dense.{leaf}", config.mlm),
        ("mlm_score.transform.LayerNorm.{leaf}", "mlm_head.norm.{leaf}", config.mlm),
        ("mlm_score.decoder.weight", "mlm_words.weight", config.mlm),
        ("logit_scale", "logit_scale", config.itc),
        ("itc_text_proj.fc.weight", "text_proj.weight", config.itc),
        ("itc_image_proj.fc.weight", "image_proj.weight", config.itc),
        ("logit_vl_scale", "logit_scale_fused", config.itc_fused),
        ("itc_vl_text_proj.fc.weight", "text_proj_fused.weight", config.itc_fused),
        ("itc_vl_image_proj.fc.weight", "image_proj_fused.weight", config.itc_fused),
    ]
    for theirs, ours, used in wanted:
        yield Rule(theirs, ours) if used else Drop(theirs, "a head of an objective that is switched off")


def task_table(config: VlmoConfig, head: str) -> Table:
    """A task model of :mod:`imglish.models.vlmo_heads`; head: official name, ``vqa_classifier`` or
    ``nlvr2_classifier``. ``config`` is that of its Transformer, without objectives."""
    body = [replace(r, target=f"vlmo.{r.target}") if isinstance(r, Rule) else r for r in table(config).rules]
    rules = [rule for rule in body if not (isinstance(rule, Drop) and rule.source.startswith("pooler."))]
    return Table(
        *rules, Rule("pooler.dense.{leaf}", "pooler.{leaf}"), Rule(f"{head}.{{i}}.{{leaf}}", "head.{i}.{leaf}")
    )


_FLAT = Transform(lambda x: x[0, 0], lambda x: x[None, None])


def convert(official: Mapping[str, Tensor], target: Mapping[str, Tensor], config: VlmoConfig) -> Converted:
    """Our state dict, of the names and shapes of ``target``; errors name what does not fit."""
    return table(config).convert(official, target)


def convert_task(
    official: Mapping[str, Tensor], target: Mapping[str, Tensor], config: VlmoConfig, head: str
) -> Converted:
    """The state dict of a task model, see :func:`task_table`."""
    return task_table(config, head).convert(official, target)


def beit_table(config: VlmoConfig) -> Table:
    """Names of an official BEiT -> ours: the first of the three stages (section 3.3) gives attention and V experts.

    A layer's own relative table, or one that all layers share, becomes its columns of ours; what BEiT does not know
    (texts, pairs) is fresh.
    """
    block, ours, rows = "blocks.{i}", "blocks.{i}", (2 * config.grid - 1) ** 2 + 3
    own = tuple(f"blocks.{i}.attn.relative_position_bias_table" for i in range(config.depth))
    rules: list[Rule | Drop | Fresh] = [
        Rule("cls_token", "class_token", _FLAT),
        Rule("patch_embed.proj.{leaf}", "patch_embed.{leaf}"),
        Rule("norm.{leaf}", "norm.{leaf}"),
        Rule(f"{block}.norm1.{{leaf}}", f"{ours}.attn.norm.all.{{leaf}}"),
        Rule((f"{block}.attn.q_bias", f"{block}.attn.v_bias"), f"{ours}.attn.qkv.all.bias"),
        Rule(f"{block}.attn.qkv.weight", f"{ours}.attn.qkv.all.weight"),
        Rule(f"{block}.attn.proj.{{leaf}}", f"{ours}.attn.out.all.{{leaf}}"),
        Rule(f"{block}.gamma_1", f"{ours}.scale1.gamma"),
        Rule(f"{block}.gamma_2", f"{ours}.scale2.gamma"),
        Rule(f"{block}.norm2.{{leaf}}", f"{ours}.ffn.image.norm.{{leaf}}"),
        Rule(f"{block}.mlp.{{part}}.{{leaf}}", f"{ours}.ffn.image.{{part}}.{{leaf}}"),
        Drop("mask_token", "pictures are not masked any more"),
        Drop("lm_head.{leaf}", "predicts visual tokens"),
        Drop("head.{leaf}", "classifies"),
        Drop("rel_pos_bias.relative_position_index", "counted from the grid"),
        Drop("blocks.{i}.attn.relative_position_index", "counted from the grid"),
        *(Fresh(name, "BEiT has no texts and no pairs") for name in _NOT_OF_PICTURES),
    ]
    if config.positions == "relative":
        total, depth = rows + 2 + 2 * config.text_distances, config.depth
        rules += [
            Rule(own, "relative.table", Transform(lambda x: _side_by_side(x, depth, total), _not_back)),
            Rule(
                "rel_pos_bias.relative_position_bias_table",
                "relative.table",
                Transform(lambda x: _side_by_side(x.repeat(depth, 1), depth, total), _not_back),
            ),
        ]
    else:
        rules.append(Rule("pos_embed", "positions", Transform(lambda x: x[0], lambda x: x[None])))
    return Table(*rules)


_NOT_OF_PICTURES = (
    "types.weight",
    "embedding.{part}.{leaf}",
    "blocks.{i}.ffn.text.{part}.{leaf}",
    "blocks.{i}.ffn.fused.{part}.{leaf}",
    "pooler.{leaf}",
    "itm_head.{leaf}",
    "mlm_head.{leaf}",
    "mlm_head.{part}.{leaf}",
    "mlm_words.weight",
    "image_proj.weight",
    "text_proj.weight",
    "image_proj_fused.weight",
    "text_proj_fused.weight",
    "logit_scale",
    "logit_scale_fused",
)


def _side_by_side(tables: Tensor, layers: int, total: int) -> Tensor:
    """Tables of the layers, one below the other, ``(layers * rows, heads)`` -> ``(total, layers * heads)``; rows that
    only texts use are zero, as in a new model."""
    stacked = torch.cat(tables.chunk(layers), dim=1)
    return torch.cat([stacked, stacked.new_zeros(total - stacked.shape[0], stacked.shape[1])])


def _not_back(table: Tensor) -> Tensor:
    raise NotImplementedError("a VLMo does not become a BEiT again")


def from_beit(official: Mapping[str, Tensor], target: Mapping[str, Tensor], config: VlmoConfig) -> Converted:
    """Our state dict from an official BEiT; what BEiT does not know keeps the values of ``target``."""
    return beit_table(config).convert(official, target)
