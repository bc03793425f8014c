"""CLIP in the layouts of Hugging Face transformers (``CLIPModel``, ``ChineseCLIPModel``): settings and weights to ours,
and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from imglish.checkpoints import bert
from imglish.checkpoints.clip import skeleton
from imglish.checkpoints.hf_settings import bert as sizes_of_bert
from imglish.checkpoints.hf_settings import filled, token, tower
from imglish.checkpoints.rules import Converted, Drop, Rule, Table
from imglish.models.clip import ClipConfig, clip_vit
from imglish.models.text_towers import BertConfig, TextConfig
from imglish.models.vit import VitConfig


def layers(theirs: str, ours: str) -> Table:
    """Rules for the blocks of one tower, whose names begin with ``theirs`` there and ``ours`` here."""
    layer, block = f"{theirs}.encoder.layers.{{i}}.", f"{ours}.blocks.{{i}}."
    query_key_value = tuple(f"{layer}self_attn.{name}_proj.{{leaf}}" for name in "qkv")
    return Table(
        Rule(query_key_value, block + "attn.qkv.{leaf}"),
        Rule(layer + "self_attn.out_proj.{leaf}", block + "attn.out.{leaf}"),
        Rule(layer + "layer_norm{n}.{leaf}", block + "norm{n}.{leaf}"),
        Rule(layer + "mlp.fc{n}.{leaf}", block + "mlp.fc{n}.{leaf}"),
    )


_COMMON = Table(
    Rule("logit_scale", "logit_scale"),
    Rule("visual_projection.weight", "image_proj.weight"),
    Rule("text_projection.weight", "text_proj.weight"),
    Rule("vision_model.embeddings.class_embedding", "vision.class_token"),
    Rule("vision_model.embeddings.patch_embedding.weight", "vision.patch_embed.weight"),
    Rule("vision_model.embeddings.position_embedding.weight", "vision.positions"),
    Rule("vision_model.pre_layrnorm.{leaf}", "vision.norm_before.{leaf}"),
    Rule("vision_model.post_layernorm.{leaf}", "vision.norm.{leaf}"),
    Drop("{tower}.embeddings.position_ids", "counts up from zero"),
) + layers("vision_model", "vision")
TABLE = (
    Table(
        Rule("text_model.embeddings.token_embedding.weight", "text.words.weight"),
        Rule("text_model.embeddings.position_embedding.weight", "text.positions"),
        Rule("text_model.final_layer_norm.{leaf}", "text.norm.{leaf}"),
    )
    + layers("text_model", "text")
    + _COMMON
)
"""Names of a ``CLIPModel`` -> ours."""
CHINESE = (
    Table(
        *bert.embeddings("text_model.embeddings", "text.embedding", types=True),
        *bert.layer("text_model.encoder.layer.{i}", "text.blocks.{i}", [p for p in bert.PARTS if p not in bert.CROSS]),
        Drop("text_model.pooler.dense.{leaf}", "Chinese-CLIP reads the first token itself"),
    )
    + _COMMON
)
"""Names of a ``ChineseCLIPModel`` -> ours."""


def config_from_json(given: Mapping[str, Any]) -> ClipConfig:
    """Our configuration from the ``config.json`` of a ``CLIPModel``."""
    whole = filled(given, "clip")
    text = whole["text_config"]
    return ClipConfig(
        vision=_vision(whole["vision_config"]),
        text=TextConfig(**tower(text)),
        vocab_size=text["vocab_size"],
        max_length=text["max_position_embeddings"],
        embed_dim=whole["projection_dim"],
        temperature=math.exp(-whole["logit_scale_init_value"]),
    )


def closing(given: Mapping[str, Any]) -> int:
    """Number of the token at which the text tower of a ``CLIPModel`` reads a text. Files of early versions say 2, which
    nothing has: they mean the last token of the vocabulary."""
    text = filled(given, "clip")["text_config"]
    end = token(text, "eos_token_id")
    return int(text["vocab_size"]) - 1 if end == 2 else end


def chinese_from_json(given: Mapping[str, Any]) -> ClipConfig:
    """Our configuration from the ``config.json`` of a ``ChineseCLIPModel``: CLIP's pictures, BERT's texts."""
    whole = filled(given, "chinese_clip")
    text, vision = whole["text_config"], _vision(whole["vision_config"])
    return ClipConfig(
        vision=replace(vision, image=replace(vision.image, resize="squash")),
        text=BertConfig(**sizes_of_bert(text), token_types=text["type_vocab_size"], projection="linear"),
        vocab_size=text["vocab_size"],
        max_length=text["max_position_embeddings"],
        embed_dim=whole["projection_dim"],
        temperature=math.exp(-whole["logit_scale_init_value"]),
    )


def _vision(given: Mapping[str, Any]) -> VitConfig:
    sizes = tower(given)
    plain = clip_vit(given["image_size"], given["patch_size"], sizes["width"], sizes["depth"], sizes["heads"])
    return replace(plain, **sizes)


def convert(official: Mapping[str, Tensor], config: ClipConfig) -> Converted:
    """Our state dict from that of a ``CLIPModel`` or ``ChineseCLIPModel``, exactly the model of ``config``."""
    table = CHINESE if isinstance(config.text, BertConfig) else TABLE
    return table.convert(official, skeleton(config))
