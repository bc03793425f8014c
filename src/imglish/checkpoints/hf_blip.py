"""BLIP in the layout of Hugging Face transformers: ``config.json`` and state dict to ours, and back.

``BlipForImageTextRetrieval`` (text encoder), ``BlipForConditionalGeneration`` (text decoder), and ``BlipModel``, the
body alone, whose projections read a pooled state that the BLIP of the paper has not. Their texts have the
official names, their vision Transformer has others. Their retrieval model leaves [CLS] in front of a text that is
matched, where the official training and this library have [ENC].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from imglish.checkpoints import bert, blip_tasks
from imglish.checkpoints.blip import Parts, text_rules
from imglish.checkpoints.hf_settings import bert as sizes_of_bert
from imglish.checkpoints.hf_settings import filled, plain_gelu, token, tower
from imglish.checkpoints.rules import Converted, Drop, Fresh, Rule, Table
from imglish.models.blip import BlipConfig
from imglish.models.vit import ImageInput, VitConfig


def _vision() -> Iterator[Rule | Drop]:
    embeddings, layer, block = "vision_model.embeddings", "vision_model.encoder.layers.{i}", "vision.blocks.{i}"
    yield Rule(f"{embeddings}.class_embedding", "vision.class_token", bert.CLASS_TOKEN)
    yield Rule(f"{embeddings}.position_embedding", "vision.positions", bert.POSITIONS)
    yield Rule(f"{embeddings}.patch_embedding.{{leaf}}", "vision.patch_embed.{leaf}")
    yield Rule(f"{layer}.self_attn.qkv.{{leaf}}", f"{block}.attn.qkv.{{leaf}}")
    yield Rule(f"{layer}.self_attn.projection.{{leaf}}", f"{block}.attn.out.{{leaf}}")
    yield Rule(f"{layer}.layer_norm{{n}}.{{leaf}}", f"{block}.norm{{n}}.{{leaf}}")
    yield Rule(f"{layer}.mlp.fc{{n}}.{{leaf}}", f"{block}.mlp.fc{{n}}.{{leaf}}")
    yield Rule("vision_model.post_layernorm.{leaf}", "vision.norm.{leaf}")


def table(config: BlipConfig, parts: Parts) -> Table:
    """Their name -> ours."""
    return Table(*_vision(), *text_rules(config, parts))


def config_from_json(given: Mapping[str, Any], **changes: Any) -> BlipConfig:
    """Our configuration from the ``config.json`` of a BLIP model.

    changes: settings that the file does not have (``prompt``, ``prompt_tokens``, which objectives go on). Raises
    ``ValueError`` for what we do not have: another activation, or opening tokens elsewhere in the vocabulary.
    """
    whole = filled(given, "blip")
    vision, text = whole["vision_config"], whole["text_config"]
    plain_gelu(vision)
    settings: dict[str, Any] = {
        "vision": VitConfig(image=ImageInput(vision["image_size"]), patch=vision["patch_size"], **tower(vision)),
        "vocab_size": text["vocab_size"],
        "max_length": text["max_position_embeddings"],
        **sizes_of_bert(text),
        "embed_dim": whole["image_text_hidden_size"],
        "smoothing": text["label_smoothing"],
    }
    config = BlipConfig(**(settings | changes))
    if text["bos_token_id"] != config.decode_id:
        raise ValueError(f"bos_token_id is {text['bos_token_id']}, expected {config.decode_id}, the last but one token")
    return config


def closing(given: Mapping[str, Any]) -> int:
    """Number of the token at which a text that is written ends."""
    return token(filled(given, "blip")["text_config"], "sep_token_id")


def convert(theirs: Mapping[str, Tensor], target: Mapping[str, Tensor], config: BlipConfig) -> Converted:
    """Our state dict, of the names and shapes of ``target``; errors name what does not fit."""
    return table(config, Parts.of(theirs)).convert(theirs, target)


def vqa_table(config: BlipConfig) -> Table:
    """Their name -> ours, of a ``BlipForQuestionAnswering``, which holds the BLIP as ``blip``."""
    vision = (replace(rule, target=f"blip.{rule.target}") if isinstance(rule, Rule) else rule for rule in _vision())
    return Table(*vision) + blip_tasks.vqa_table(config)


_POOLED = "reads a pooled state that BLIP of the paper has not"


def convert_backbone(theirs: Mapping[str, Tensor], target: Mapping[str, Tensor], config: BlipConfig) -> Converted:
    """Like :func:`convert`, of a ``BlipModel``: vision Transformer and text encoder; the heads are fresh."""
    names = {name: name.replace("text_model.", "text_encoder.", 1) for name in theirs}
    parts = Parts(encoder=True, decoder=False, temperature=False)
    heads = ("image_proj", "text_proj", "itm_head")
    own = [
        rule for rule in table(config, parts).rules if not (isinstance(rule, Rule) and rule.target.startswith(heads))
    ]
    left = Table(
        *(Drop(name, _POOLED) for name in ("text_encoder.pooler.dense.{leaf}", "{side}_projection.weight")),
        Drop("logit_scale", "of those projections"),
        *(Fresh(f"{head}.{{leaf}}", "the checkpoint has no such head") for head in heads),
    )
    return (left + Table(*own)).convert({names[name]: value for name, value in theirs.items()}, target)
