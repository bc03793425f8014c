"""Official BEiT checkpoints of masked image modelling (``beit_*_patch16_224_pt22k`` and alike).

There queries and values have biases, keys none; the patch embedding is a convolution; LayerScale is ``gamma_1`` and
``gamma_2``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from imglish.checkpoints.rules import Converted, Drop, Rule, Table, Transform

TOKEN = Transform(lambda x: x[0, 0], lambda x: x[None, None])
"""A learned token ``(1, 1, D)`` as a vector."""

_CLASS_LAYERS = "BEiT-2 trains its class token through them, and throws them away"


def table() -> Table:
    """Official name -> ours."""
    block = "blocks.{i}."
    return Table(
        Rule("cls_token", "class_token", TOKEN),
        Rule("mask_token", "mask_token", TOKEN),
        Rule("patch_embed.proj.{leaf}", "patch_embed.{leaf}"),
        Rule("rel_pos_bias.relative_position_bias_table", "relative.table"),
        Drop("rel_pos_bias.relative_position_index", "made from the size of the grid"),
        Rule(block + "gamma_{n}", block + "scale{n}.gamma"),
        Rule(block + "norm1.{leaf}", block + "attn.norm.all.{leaf}"),
        Rule(block + "attn.qkv.weight", block + "attn.qkv.all.weight"),
        Rule((block + "attn.q_bias", block + "attn.v_bias"), block + "attn.qkv.all.bias"),
        Rule(block + "attn.proj.{leaf}", block + "attn.out.all.{leaf}"),
        Rule(block + "norm2.{leaf}", block + "ffn.all.norm.{leaf}"),
        Rule(block + "mlp.{matrix}.{leaf}", block + "ffn.all.{matrix}.{leaf}"),
        Rule("norm.{leaf}", "norm.{leaf}"),
        Rule("lm_head.{leaf}", "head.{leaf}"),
        *(Drop(f"cls_pt_layers.{{i}}.{rest}", _CLASS_LAYERS) for rest in ("{aa}", "{aa}.{bb}", "{aa}.{bb}.{cc}")),
        Drop("cls_pt_lm_head.{leaf}", _CLASS_LAYERS),
    )


def convert(official: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Converted:
    """Our state dict, of the names and shapes of ``target``; errors name what does not fit."""
    return table().convert(official, target)
