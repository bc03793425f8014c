"""SigLIP in the layout of Hugging Face transformers (``SiglipModel``): ``config.json`` and state dict to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from imglish.checkpoints.clip import skeleton
from imglish.checkpoints.hf_clip import layers
from imglish.checkpoints.hf_settings import filled, tower
from imglish.checkpoints.rules import Converted, Cut, Drop, Rule, Table, Transform
from imglish.models.clip import ClipConfig
from imglish.models.text_towers import TextConfig
from imglish.models.vit import ImageInput, VitConfig

HALF = (0.5, 0.5, 0.5)
PAD = 1
"""Texts are filled up with the closing token, the second of the vocabulary."""

_SCALAR = Transform(lambda x: x.reshape(()), lambda x: x.reshape(1))
_ROW = Transform(lambda x: x[0, 0], lambda x: x[None, None])
_HEAD = "vision_model.head"
TABLE = (
    Table(
        Rule("logit_scale", "logit_scale", _SCALAR),
        Rule("logit_bias", "logit_bias", _SCALAR),
        Rule("text_model.embeddings.token_embedding.weight", "text.words.weight"),
        Rule("text_model.embeddings.position_embedding.weight", "text.positions"),
        Rule("text_model.final_layer_norm.{leaf}", "text.norm.{leaf}"),
        Rule("text_model.head.{leaf}", "text_proj.{leaf}"),
        Rule("vision_model.embeddings.patch_embedding.{leaf}", "vision.patch_embed.{leaf}"),
        Rule("vision_model.embeddings.position_embedding.weight", "vision.positions"),
        Drop("{tower}.embeddings.position_ids", "counts up from zero"),
        Rule("vision_model.post_layernorm.{leaf}", "vision.norm.{leaf}"),
        Rule(f"{_HEAD}.probe", "image_pool.latent", _ROW),
        Cut(f"{_HEAD}.attention.in_proj_weight", ("image_pool.q.weight", "image_pool.kv.weight"), (1, 2)),
        Cut(f"{_HEAD}.attention.in_proj_bias", ("image_pool.q.bias", "image_pool.kv.bias"), (1, 2)),
        Rule(f"{_HEAD}.attention.out_proj.{{leaf}}", "image_pool.out.{leaf}"),
        Rule(f"{_HEAD}.layernorm.{{leaf}}", "image_pool.norm.{leaf}"),
        Rule(f"{_HEAD}.mlp.{{layer}}.{{leaf}}", "image_pool.mlp.{layer}.{leaf}"),
    )
    + layers("text_model", "text")
    + layers("vision_model", "vision")
)


def config_from_json(given: Mapping[str, Any]) -> ClipConfig:
    """Our configuration from the ``config.json`` of a ``SiglipModel``."""
    whole = filled(given, "siglip")
    vision, text = whole["vision_config"], whole["text_config"]
    return ClipConfig(
        vision=VitConfig(
            image=ImageInput(vision["image_size"], HALF, HALF),
            patch=vision["patch_size"],
            class_token=False,
            **tower(vision),
        ),
        text=TextConfig(
            causal=False,
            pool="last",
            padded=True,
            pad_id=PAD,
            projection="bias",
            **tower(text),
        ),
        vocab_size=text["vocab_size"],
        max_length=text["max_position_embeddings"],
        embed_dim=text.get("projection_size", text["hidden_size"]),
        pool="map",
        image_projection=False,
        loss="siglip",
        temperature=0.1,
        logit_bias=-10.0,
    )


def convert(official: Mapping[str, Tensor], config: ClipConfig) -> Converted:
    """Our state dict from that of a ``SiglipModel``, which must hold exactly the model of ``config``."""
    return TABLE.convert(official, skeleton(config))
