"""Official checkpoints of ALBEF's task models: visual entailment and NLVR2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from imglish.checkpoints import bert
from imglish.checkpoints.albef import bert_rules
from imglish.checkpoints.rules import ConversionError, Converted, Drop, Fresh, Rule, Table, Tie
from imglish.models.albef import AlbefConfig

_UNUSED = "the task does not use it"


def table(config: AlbefConfig, pictures: int = 1) -> Table:
    """The student: official name -> ours. config: of the ALBEF before its fusion layers became ``pictures`` each."""
    whole = _layers(config, pictures)
    return Table(*_model(whole, ""), *bert.dropped(_model(whole, "_m"), "the momentum copy, which training makes anew"))


def teacher_table(config: AlbefConfig, pictures: int = 1) -> Table:
    """The momentum copy: official ``*_m`` name -> ours."""
    return Table(*_model(_layers(config, pictures), "_m"))


def pictures(official: Mapping[str, Tensor]) -> int:
    """How many pictures a text has, told by the classes: three of visual entailment, two of NLVR2."""
    classes = official["cls_head.2.weight"].shape[0]
    if classes not in (2, 3):
        raise ConversionError(f"a head with {classes} classes: 3 are known (visual entailment) and 2 (NLVR2)")
    return 2 if classes == 2 else 1


def _layers(config: AlbefConfig, pictures: int) -> AlbefConfig:
    return replace(config, depth=config.fusion_layer + pictures * (config.depth - config.fusion_layer))


def _model(config: AlbefConfig, suffix: str) -> Iterator[Rule | Drop | Fresh]:
    for rule in (*bert.vision(f"visual_encoder{suffix}"), *bert_rules(f"text_encoder{suffix}", config)):
        yield replace(rule, target=f"albef.{rule.target}") if isinstance(rule, Rule) else rule
    yield Rule(f"cls_head{suffix}.{{i}}.{{leaf}}", "head.{i}.{leaf}")
    for name in ("mlm_head.bias", "mlm_head.{part}.{leaf}", "image_proj.{leaf}", "text_proj.{leaf}", "itm_head.{leaf}"):
        yield Fresh(f"albef.{name}", _UNUSED)
    yield Fresh("albef.temperature", _UNUSED)


def vqa_table(config: AlbefConfig) -> Table:
    """The student with its decoder of answers: official name -> ours."""
    return Table(*_vqa(config, ""), *bert.dropped(_vqa(config, "_m"), "the momentum copy, which training makes anew"))


def vqa_teacher_table(config: AlbefConfig) -> Table:
    """The momentum copy of the model for VQA."""
    return Table(*_vqa(config, "_m"))


def _vqa(config: AlbefConfig, suffix: str) -> Iterator[Rule | Drop | Tie | Fresh]:
    for rule in _model(config, suffix):
        if not (isinstance(rule, Rule) and rule.target.startswith("head.")):
            yield rule
    yield from bert.answers(f"text_decoder{suffix}", types=True)


def convert(
    official: Mapping[str, Tensor], target: Mapping[str, Tensor], config: AlbefConfig, pictures: int = 1
) -> Converted:
    """The student's state dict, of the names and shapes of ``target``; ``pictures``: 1 for entailment, 2 for NLVR2.

    Raises :class:`ConversionError` on names and shapes that do not fit, and where the layers of one turn do not share
    their keys and values.
    """
    return _shared(table(config, pictures).convert(official, target), pictures)


def convert_teacher(
    official: Mapping[str, Tensor], target: Mapping[str, Tensor], config: AlbefConfig, pictures: int = 1
) -> Converted:
    """The momentum copy's state dict."""
    copies = {name: value for name, value in official.items() if name.split(".")[0].endswith("_m")}
    return _shared(teacher_table(config, pictures).convert(copies, target), pictures)


def _shared(converted: Converted, pictures: int) -> Converted:
    for name, value in converted.state.items():
        if ".cross.kv." in name:
            number = int(name.split(".")[2])
            first = name.replace(f".{number}.", f".{number - number % pictures}.", 1)
            if not torch.equal(value, converted.state[first]):
                raise ConversionError(f"{name} should hold the same values as {first}, and does not")
    return converted
