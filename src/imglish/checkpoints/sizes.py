"""Configurations from the shapes of released weights, for files that come without settings.

Widths, depths, vocabularies and picture sizes can be read off; heads cannot, and are 64 wide in every released model of
these families.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from imglish.checkpoints import beit3
from imglish.checkpoints.rules import ConversionError
from imglish.models.albef import AlbefConfig
from imglish.models.beit import BeitConfig
from imglish.models.beit3 import Beit3Config
from imglish.models.blip import BlipConfig
from imglish.models.expert_sizes import HALF
from imglish.models.vilt import ViltConfig
from imglish.models.vilt_pictures import AspectInput
from imglish.models.vit import ImageInput, VitConfig
from imglish.models.vlmo import VlmoConfig

HEAD = 64
VLMO_DISTANCES = 196
"""Longest text that the relative tables of the released VLMo know, whatever they were fine-tuned with."""


def count(names: Mapping[str, Tensor], pattern: str) -> int:
    """Different numbers that ``pattern`` captures at the start of a name."""
    return len({found.group(1) for name in names if (found := re.match(pattern, name))})


def heads(width: int, name: str) -> int:
    """Attention heads of a layer ``width`` wide."""
    if width % HEAD:
        raise ConversionError(f"{name} is {width} wide, no multiple of {HEAD}: how many heads it has cannot be told")
    return width // HEAD


def vit_config(weights: Mapping[str, Tensor], prefix: str) -> VitConfig:
    """The timm-style vision Transformer whose names begin with ``prefix``."""
    width, _, patch, _ = _shape(weights, f"{prefix}.patch_embed.proj.weight")
    grid = math.isqrt(_shape(weights, f"{prefix}.pos_embed")[1] - 1)
    hidden = _shape(weights, f"{prefix}.blocks.0.mlp.fc1.weight")[0]
    return VitConfig(
        image=ImageInput(grid * patch),
        patch=patch,
        width=width,
        depth=count(weights, rf"{re.escape(prefix)}\.blocks\.(\d+)\."),
        heads=heads(width, prefix),
        mlp_ratio=hidden / width,
    )


def albef_config(weights: Mapping[str, Tensor], pictures: int = 1) -> AlbefConfig:
    """Of an ALBEF checkpoint, in which each fusion layer is there ``pictures`` times."""
    text = "text_encoder.bert" if "text_encoder.bert.embeddings.word_embeddings.weight" in weights else "text_encoder"
    layer = rf"{re.escape(text)}\.encoder\.layer\.(\d+)\."
    sizes = _bert(weights, text)
    fused = count(weights, layer + r"crossattention\.")
    alone = sizes["depth"] - fused
    sizes["depth"] = alone + fused // pictures
    return AlbefConfig(vision=vit_config(weights, "visual_encoder"), fusion_layer=alone, **sizes)


def blip_config(weights: Mapping[str, Tensor]) -> BlipConfig:
    """Of BLIP's pre-training, retrieval, matching or captioning checkpoint."""
    encoder = any(name.startswith("text_encoder.") for name in weights)
    return BlipConfig(
        vision=vit_config(weights, "visual_encoder"),
        **_bert(weights, "text_encoder" if encoder else "text_decoder.bert"),
    )


def vilt_config(weights: Mapping[str, Tensor]) -> ViltConfig:
    """Of ViLT's pre-training checkpoint or of one of its task models."""
    width, _, patch, _ = _shape(weights, "transformer.patch_embed.proj.weight")
    size = math.isqrt(_shape(weights, "transformer.pos_embed")[1] - 1) * patch
    return ViltConfig(
        image=AspectInput(size, int(1333 / 800 * size), patch),
        vocab_size=_shape(weights, "text_embeddings.word_embeddings.weight")[0],
        max_length=_shape(weights, "text_embeddings.position_embeddings.weight")[0],
        width=width,
        depth=count(weights, r"transformer\.blocks\.(\d+)\."),
        heads=heads(width, "transformer"),
        mlp_ratio=_shape(weights, "transformer.blocks.0.mlp.fc1.weight")[0] / width,
        types=_shape(weights, "token_type_embeddings.weight")[0],
        itm="itm_score.fc.weight" in weights or "rank_output.weight" in weights,
        mlm="mlm_score.bias" in weights,
        wpa="itm_score.fc.weight" in weights,
    )


def vlmo_config(weights: Mapping[str, Tensor]) -> VlmoConfig:
    """Of VLMo's checkpoint of pre-training, of its text stage or of retrieval."""
    vocab_size, width = _shape(weights, "text_embeddings.word_embeddings.weight")
    patch = _shape(weights, "transformer.patch_embed.proj.weight")[-1]
    depth = count(weights, r"transformer\.blocks\.(\d+)\.")
    if (table := weights.get("relative_position_bias_table")) is not None:
        grid, positions = _grid_of(table.shape[0] - 5 - 2 * VLMO_DISTANCES), "relative"
        head_count = table.shape[1] // depth
    else:  # base-plus, whose 16 heads are 34 wide
        grid, positions = math.isqrt(_shape(weights, "transformer.pos_embed")[1] - 1), "absolute"
        head_count = width // 34 if width == 544 else heads(width, "transformer")
    projection = weights.get("itc_text_proj.fc.weight")
    return VlmoConfig(
        image=ImageInput(grid * patch, HALF, HALF),
        patch=patch,
        vocab_size=vocab_size,
        max_length=_shape(weights, "text_embeddings.position_embeddings.weight")[0],
        text_distances=VLMO_DISTANCES,
        width=width,
        depth=depth,
        heads=head_count,
        hidden=_shape(weights, "transformer.blocks.0.mlp_imag.fc1.weight")[0],
        fused_layers=count(weights, r"transformer\.blocks\.(\d+)\.mlp_vl\."),
        types=_shape(weights, "token_type_embeddings.weight")[0],
        positions=positions,  # type: ignore[arg-type]
        layer_scale=0.1 if "transformer.blocks.0.gamma_1" in weights else None,
        embed_dim=width if projection is None else projection.shape[0],
        itc=projection is not None,
        itc_fused="itc_vl_text_proj.fc.weight" in weights,
        itm="itm_score.fc.weight" in weights,
        mlm="mlm_score.bias" in weights,
    )


def beit_config(weights: Mapping[str, Tensor]) -> BeitConfig:
    """Of BEiT's or BEiT-2's checkpoint of masked image modelling."""
    codes = _shape(weights, "lm_head.weight")[0]
    return replace(_beit_body(weights, "rel_pos_bias.relative_position_bias_table"), codes=codes)


def beit_classifier_config(weights: Mapping[str, Tensor]) -> BeitConfig:
    """Of their classifiers of ImageNet."""
    found = _beit_body(weights, "blocks.0.attn.relative_position_bias_table")
    return replace(found, image=_centred(found.image))


def _beit_body(weights: Mapping[str, Tensor], table: str) -> BeitConfig:
    width, _, patch, _ = _shape(weights, "patch_embed.proj.weight")
    offsets, head_count = _shape(weights, table)
    return BeitConfig(
        image=ImageInput(_grid_of(offsets - 3) * patch, HALF, HALF),
        patch=patch,
        width=width,
        depth=count(weights, r"blocks\.(\d+)\."),
        heads=head_count,
        hidden=_shape(weights, "blocks.0.mlp.fc1.weight")[0],
    )


def _centred(image: ImageInput) -> ImageInput:
    """As BEiT and BEiT-3 look at ImageNet: pictures below 384 pixels are the centre of one 256/224 as large."""
    return replace(image, resize="center", crop=1.0 if image.size >= 384 else 224 / 256)


def multiway_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of the body of any BEiT-3 checkpoint."""
    vocab_size, width = _shape(weights, "beit3.text_embed.weight")
    patch = _shape(weights, "beit3.vision_embed.proj.weight")[-1]
    side = math.isqrt(_shape(weights, "beit3.encoder.embed_positions.A.weight")[0] - beit3.UNREAD - 1)
    return {
        "image": ImageInput(side * patch, HALF, HALF),
        "patch": patch,
        "vocab_size": vocab_size,
        "max_length": _shape(weights, "beit3.encoder.embed_positions.B.weight")[0] - beit3.UNREAD,
        "width": width,
        "depth": count(weights, r"beit3\.encoder\.layers\.(\d+)\."),
        "heads": heads(width, "beit3"),
        "hidden": _shape(weights, "beit3.encoder.layers.0.ffn.A.fc1.weight")[0],
    }


def beit3_config(weights: Mapping[str, Tensor]) -> Beit3Config:
    """Of BEiT-3's checkpoint of pre-training, retrieval or captioning; the objective is one that its heads allow."""
    there = {"mlm": "mlm_head.weight", "mim": "mim_head.weight", "itc": "vision_head.weight"}
    outputs: Any = tuple(head for head, name in there.items() if name in weights) or ("itc",)
    objective: Any = "itc" if "itc" in outputs else "mdm" if "mim" in outputs else "captions"
    codes: dict[str, Any] = {"codes": weights["mim_head.weight"].shape[0]} if "mim" in outputs else {}
    return Beit3Config(**multiway_sizes(weights), **codes, outputs=outputs, objective=objective)


def beit3_classifier_config(weights: Mapping[str, Tensor]) -> Beit3Config:
    """Of BEiT-3's classifiers of ImageNet; no objective is trained in them."""
    found = beit3_config(weights)
    return replace(found, image=_centred(found.image))


def _grid_of(offsets: int) -> int:
    """Patches a side of the pictures whose relative positions are so many."""
    side = math.isqrt(max(offsets, 0))
    if side * side != offsets or side % 2 == 0:
        raise ConversionError(f"{offsets} relative positions are no square: the size of the pictures cannot be told")
    return (side + 1) // 2


def _bert(weights: Mapping[str, Tensor], text: str) -> dict[str, Any]:
    """Settings that ALBEF and BLIP share, of the text Transformer ``text`` and the projections."""
    vocab_size, width = _shape(weights, f"{text}.embeddings.word_embeddings.weight")
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_length": _shape(weights, f"{text}.embeddings.position_embeddings.weight")[0],
        "width": width,
        "depth": count(weights, rf"{re.escape(text)}\.encoder\.layer\.(\d+)\."),
        "heads": heads(width, text),
        "hidden": _shape(weights, f"{text}.encoder.layer.0.intermediate.dense.weight")[0],
    }
    if "text_proj.weight" in weights:
        sizes["embed_dim"] = weights["text_proj.weight"].shape[0]
    return sizes


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in weights:
        raise ConversionError(f"{name} is missing: the size of the model cannot be told")
    return tuple(weights[name].shape)
