"""BEiT and BEiT-2 in the layouts of Hugging Face transformers: ``BeitForMaskedImageModeling`` and
``BeitForImageClassification``, whose layers have tables of relative positions of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from imglish.checkpoints.beit import INDEX, TOKEN
from imglish.checkpoints.hf_settings import filled, plain_gelu, stack
from imglish.checkpoints.rules import Drop, Rule, Table
from imglish.models.beit import BeitConfig
from imglish.models.expert_sizes import HALF
from imglish.models.vit import ImageInput

_LAYER = "beit.encoder.layer.{i}."
_HEADS = _LAYER + "attention.attention."
_TABLE = "relative_position_bias.relative_position_"


def config_from_json(given: Mapping[str, Any]) -> BeitConfig:
    """Our configuration from the ``config.json`` of a BEiT. Raises ``ValueError`` for another activation."""
    whole = filled(given, "beit")
    plain_gelu(whole)
    return BeitConfig(
        image=ImageInput(whole["image_size"], HALF, HALF),
        patch=whole["patch_size"],
        **stack(whole),
        hidden=whole["intermediate_size"],
        drop_path=whole["drop_path_rate"],
        codes=whole["vocab_size"],
    )


def table() -> Table:
    """Masked image modelling: their names -> ours."""
    return Table(
        *_body(""),
        Rule("beit.embeddings.mask_token", "mask_token", TOKEN),
        Rule(f"beit.encoder.{_TABLE}bias_table", "relative.table"),
        Drop(f"beit.encoder.{_TABLE}index", INDEX),
        Rule("layernorm.{leaf}", "norm.{leaf}"),
        Rule("lm_head.{leaf}", "head.{leaf}"),
    )


def classifier_table() -> Table:
    """Classification: their names -> ours."""
    return Table(
        *_body("body."),
        Rule(f"{_HEADS}{_TABLE}bias_table", "body.relative.{i}.table"),
        Drop(f"{_HEADS}{_TABLE}index", INDEX),
        Drop("beit.embeddings.mask_token", "nothing is masked when classes are told"),
        Rule("beit.pooler.layernorm.{leaf}", "norm.{leaf}"),
        Rule("classifier.{leaf}", "head.{leaf}"),
    )


def _body(prefix: str) -> Iterator[Rule]:
    """Patches, class token and layers; prefix: of our names."""
    block = f"{prefix}blocks.{{i}}."
    yield Rule("beit.embeddings.cls_token", f"{prefix}class_token", TOKEN)
    yield Rule("beit.embeddings.patch_embeddings.projection.{leaf}", f"{prefix}patch_embed.{{leaf}}")
    yield Rule(tuple(f"{_HEADS}{name}.weight" for name in ("query", "key", "value")), block + "attn.qkv.all.weight")
    yield Rule(tuple(f"{_HEADS}{name}.bias" for name in ("query", "value")), block + "attn.qkv.all.bias")
    for theirs, ours in (
        ("lambda_{n}", "scale{n}.gamma"),
        ("layernorm_before.{leaf}", "attn.norm.all.{leaf}"),
        ("attention.output.dense.{leaf}", "attn.out.all.{leaf}"),
        ("layernorm_after.{leaf}", "ffn.all.norm.{leaf}"),
        ("intermediate.dense.{leaf}", "ffn.all.fc1.{leaf}"),
        ("output.dense.{leaf}", "ffn.all.fc2.{leaf}"),
    ):
        yield Rule(_LAYER + theirs, block + ours)
