"""Official checkpoints of BLIP's model for NLVR2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from imglish.checkpoints import bert
from imglish.checkpoints.rules import Converted, Drop, Fresh, Rule, Table
from imglish.models.blip import OWN_PARTS, BlipConfig

_LAYER = "text_encoder.encoder.layer.{i}"
_UNUSED = "the task does not use it"


def reasoning_table(config: BlipConfig, merged: int = 6) -> Table:
    """Official name -> ours."""
    alone = [part for part in bert.PARTS if part not in bert.CROSS]
    body = [
        *bert.vision("visual_encoder"),
        *bert.embeddings("text_encoder.embeddings", "embedding", types=False),
        *bert.layer(_LAYER, "layers.{i}", alone),
        Rule(f"{_LAYER}.crossattention.output.LayerNorm.{{leaf}}", "layers.{i}.norm_cross.{leaf}"),
        *_looking(0, "layers.{i}.cross"),
    ]
    rules: list[Rule | Drop | Fresh] = [_within(rule) for rule in body]
    rules += _looking(1, "second.{i}")
    for number in range(merged, config.depth):
        theirs = f"text_encoder.encoder.layer.{number}.crossattention.output.merge_layer.{{leaf}}"
        rules.append(Rule(theirs, f"merge.{number - merged}.{{leaf}}"))
    rules.append(Rule("cls_head.{i}.{leaf}", "head.{i}.{leaf}"))
    return Table(*rules, *_unused(config))


def vqa_table(config: BlipConfig) -> Table:
    """The model for VQA with its decoder of answers: official name -> ours."""
    layers = "text_encoder.encoder.layer.{i}"
    body = [
        *bert.vision("visual_encoder"),
        *bert.embeddings("text_encoder.embeddings", "embedding", types=False),
        *bert.layer(layers, "layers.{i}", bert.PARTS),
    ]
    return Table(*map(_within, body), *bert.answers("text_decoder", types=False), *_unused(config))


def _unused(config: BlipConfig) -> Iterator[Fresh]:
    """Parts of the pre-training model."""
    names = [
        f"decoder.{{i}}.{part}{place}.{{leaf}}" for part in OWN_PARTS[config.share] for _, place in bert.PARTS[part]
    ]
    names += ["lm_head.bias", "lm_head.{part}.{leaf}", "image_proj.{leaf}", "text_proj.{leaf}", "itm_head.{leaf}"]
    names += ["temperature", *(["decoder_embedding.{part}.{leaf}"] if config.share == "none" else [])]
    yield from (Fresh(f"blip.{name}", _UNUSED) for name in names)


def _looking(number: int, ours: str) -> Iterator[Rule]:
    """One of the two cross-attentions of every layer."""
    theirs = f"{_LAYER}.crossattention"
    yield Rule(f"{theirs}.self{number}.query.{{leaf}}", f"{ours}.q.{{leaf}}")
    yield Rule(tuple(f"{theirs}.self{number}.{part}.{{leaf}}" for part in ("key", "value")), f"{ours}.kv.{{leaf}}")
    yield Rule(f"{theirs}.output.dense{number}.{{leaf}}", f"{ours}.out.{{leaf}}")


def _within(rule: Rule | Drop) -> Rule | Drop:
    return replace(rule, target=f"blip.{rule.target}") if isinstance(rule, Rule) else rule


def convert_reasoning(
    official: Mapping[str, Tensor], target: Mapping[str, Tensor], config: BlipConfig, merged: int = 6
) -> Converted:
    """The state dict of ours, of the names and shapes of ``target``."""
    return reasoning_table(config, merged).convert(official, target)
