"""CLIP in the layout of Hugging Face transformers (``CLIPModel``): ``config.json`` and state dict to ours, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast, get_args

from torch import Tensor

from imglish.checkpoints.clip import skeleton
from imglish.checkpoints.rules import Converted, Drop, Rule, Table
from imglish.models.clip import ClipConfig, clip_vit
from imglish.models.text_towers import TextConfig
from imglish.nn.blocks import Activation


def _layers(theirs: str, ours: str) -> Table:
    layer, block = f"{theirs}.encoder.layers.{{i}}.", f"{ours}.blocks.{{i}}."
    query_key_value = tuple(f"{layer}self_attn.{name}_proj.{{leaf}}" for name in "qkv")
    return Table(
        Rule(query_key_value, block + "attn.qkv.{leaf}"),
        Rule(layer + "self_attn.out_proj.{leaf}", block + "attn.out.{leaf}"),
        Rule(layer + "layer_norm{n}.{leaf}", block + "norm{n}.{leaf}"),
        Rule(layer + "mlp.fc{n}.{leaf}", block + "mlp.fc{n}.{leaf}"),
    )


TABLE = (
    Table(
        Rule("logit_scale", "logit_scale"),
        Rule("visual_projection.weight", "image_proj.weight"),
        Rule("text_projection.weight", "text_proj.weight"),
        Rule("text_model.embeddings.token_embedding.weight", "text.words.weight"),
        Rule("text_model.embeddings.position_embedding.weight", "text.positions"),
        Rule("text_model.final_layer_norm.{leaf}", "text.norm.{leaf}"),
        Rule("vision_model.embeddings.class_embedding", "vision.class_token"),
        Rule("vision_model.embeddings.patch_embedding.weight", "vision.patch_embed.weight"),
        Rule("vision_model.embeddings.position_embedding.weight", "vision.positions"),
        Rule("vision_model.pre_layrnorm.{leaf}", "vision.norm_before.{leaf}"),
        Rule("vision_model.post_layernorm.{leaf}", "vision.norm.{leaf}"),
        Drop("{tower}.embeddings.position_ids", "counts up from zero"),
    )
    + _layers("text_model", "text")
    + _layers("vision_model", "vision")
)


def config_from_json(given: Mapping[str, Any]) -> ClipConfig:
    """Our configuration from the ``config.json`` of a ``CLIPModel``, all entries written out (``to_dict``)."""
    vision, text = given["vision_config"], given["text_config"]
    tower = clip_vit(
        vision["image_size"],
        vision["patch_size"],
        vision["hidden_size"],
        vision["num_hidden_layers"],
        vision["num_attention_heads"],
        _activation(vision["hidden_act"]),
    )
    return ClipConfig(
        vision=replace(
            tower,
            mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
            norm_eps=vision["layer_norm_eps"],
        ),
        text=TextConfig(
            width=text["hidden_size"],
            depth=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            mlp_ratio=text["intermediate_size"] / text["hidden_size"],
            norm_eps=text["layer_norm_eps"],
            activation=_activation(text["hidden_act"]),
        ),
        vocab_size=text["vocab_size"],
        max_length=text["max_position_embeddings"],
        embed_dim=given["projection_dim"],
        temperature=math.exp(-given["logit_scale_init_value"]),
    )


def _activation(name: str) -> Activation:
    if name not in get_args(Activation):
        raise ValueError(f"hidden_act {name!r} is not supported; there are: {', '.join(get_args(Activation))}")
    return cast(Activation, name)


def convert(official: Mapping[str, Tensor], config: ClipConfig) -> Converted:
    """Our state dict from that of a ``CLIPModel``, which must hold exactly the model of ``config``."""
    return TABLE.convert(official, skeleton(config))
