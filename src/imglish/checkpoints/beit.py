"""Official BEiT and BEiT-2 checkpoints: of masked image modelling (``beit_*_patch16_224_pt22k`` and alike), and
fine-tuned for ImageNet.

There queries and values have biases, keys none; the patch embedding is a convolution; LayerScale is ``gamma_1`` and
``gamma_2``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from imglish.checkpoints.rules import Converted, Drop, Rule, Table, Transform

TOKEN = Transform(lambda x: x[0, 0], lambda x: x[None, None])
"""A learned token ``(1, 1, D)`` as a vector."""

INDEX = "made from the size of the grid"
_CLASS_LAYERS = "BEiT-2 trains its class token through them, and throws them away"


def body_rules(prefix: str = "") -> Iterator[Rule]:
    """Patches, class token and blocks; prefix: of our names."""
    block, ours = "blocks.{i}.", f"{prefix}blocks.{{i}}."
    yield Rule("cls_token", f"{prefix}class_token", TOKEN)
    yield Rule("patch_embed.proj.{leaf}", f"{prefix}patch_embed.{{leaf}}")
    yield Rule(block + "gamma_{n}", ours + "scale{n}.gamma")
    yield Rule(block + "norm1.{leaf}", ours + "attn.norm.all.{leaf}")
    yield Rule(block + "attn.qkv.weight", ours + "attn.qkv.all.weight")
    yield Rule((block + "attn.q_bias", block + "attn.v_bias"), ours + "attn.qkv.all.bias")
    yield Rule(block + "attn.proj.{leaf}", ours + "attn.out.all.{leaf}")
    yield Rule(block + "norm2.{leaf}", ours + "ffn.all.norm.{leaf}")
    yield Rule(block + "mlp.{matrix}.{leaf}", ours + "ffn.all.{matrix}.{leaf}")


def table() -> Table:
    """Masked image modelling: official name -> ours."""
    return Table(
        *body_rules(),
        Rule("mask_token", "mask_token", TOKEN),
        Rule("rel_pos_bias.relative_position_bias_table", "relative.table"),
        Drop("rel_pos_bias.relative_position_index", INDEX),
        Rule("norm.{leaf}", "norm.{leaf}"),
        Rule("lm_head.{leaf}", "head.{leaf}"),
        *(Drop(f"cls_pt_layers.{{i}}.{rest}", _CLASS_LAYERS) for rest in ("{aa}", "{aa}.{bb}", "{aa}.{bb}.{cc}")),
        Drop("cls_pt_lm_head.{leaf}", _CLASS_LAYERS),
    )


def classifier_table() -> Table:
    """The classifiers of ImageNet, each layer with a table of relative positions of its own."""
    return Table(
        *body_rules("body."),
        Rule("blocks.{i}.attn.relative_position_bias_table", "body.relative.{i}.table"),
        Drop("blocks.{i}.attn.relative_position_index", INDEX),
        Rule("fc_norm.{leaf}", "norm.{leaf}"),
        Rule("head.{leaf}", "head.{leaf}"),
    )


def convert(official: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Converted:
    """Our state dict, of the names and shapes of ``target``; errors name what does not fit."""
    return table().convert(official, target)
