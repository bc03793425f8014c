"""Official ALBEF checkpoints: the pre-training model (text encoder with MLM head) and the retrieval model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from imglish.checkpoints import bert
from imglish.checkpoints.rules import Converted, Drop, Fresh, Rule, Table, Tie
from imglish.models.albef import AlbefConfig


def bert_rules(prefix: str, config: AlbefConfig) -> Iterator[Rule | Drop]:
    """The text encoder: its embeddings, text layers and fusion layers."""
    yield from bert.embeddings(f"{prefix}.embeddings", "embedding", types=True)
    alone = [part for part in bert.PARTS if part not in bert.CROSS]
    for i in range(config.depth):
        fused = i >= config.fusion_layer
        block = f"fusion_layers.{i - config.fusion_layer}" if fused else f"text_layers.{i}"
        yield from bert.layer(f"{prefix}.encoder.layer.{i}", block, bert.PARTS if fused else alone)


def _towers(config: AlbefConfig, with_mlm: bool, suffix: str) -> Iterator[Rule | Drop | Tie | Fresh]:
    text = f"text_encoder{suffix}"
    yield from bert.vision(f"visual_encoder{suffix}")
    yield from bert_rules(f"{text}.bert" if with_mlm else text, config)
    if with_mlm:
        yield from bert.head(f"{text}.cls.predictions", f"{text}.bert.embeddings.word_embeddings.weight", "mlm_head")
    else:
        yield Fresh("mlm_head.bias", "the checkpoint was fine-tuned without MLM")
        yield Fresh("mlm_head.{part}.{leaf}", "the checkpoint was fine-tuned without MLM")
    yield Rule(f"vision_proj{suffix}.{{leaf}}", "image_proj.{leaf}")
    yield Rule(f"text_proj{suffix}.{{leaf}}", "text_proj.{leaf}")


def table(config: AlbefConfig, with_mlm: bool) -> Table:
    """The student: official name -> ours. ``with_mlm``: a pre-training checkpoint, whose text encoder has the head."""
    return Table(
        *_towers(config, with_mlm, ""),
        Rule("temp", "temperature"),
        Rule("itm_head.{leaf}", "itm_head.{leaf}"),
        *bert.dropped(_towers(config, with_mlm, "_m"), "the momentum copy, which training makes anew"),
        *bert.QUEUE,
    )


def teacher_table(config: AlbefConfig, with_mlm: bool) -> Table:
    """The momentum copy: official ``*_m`` name -> ours. Officially it has no ITM head and no temperature of its own."""
    return Table(
        *_towers(config, with_mlm, "_m"),
        Fresh("temperature", "the teacher uses the student's"),
        Fresh("itm_head.{leaf}", "ITM is never distilled"),
    )


def has_mlm(official: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint is of the pre-training model."""
    return any(name.startswith("text_encoder.cls.") for name in official)


def convert(official: Mapping[str, Tensor], target: Mapping[str, Tensor], config: AlbefConfig) -> Converted:
    """The student's state dict, of the names and shapes of ``target``; errors name what does not fit."""
    return table(config, has_mlm(official)).convert(official, target)


def convert_teacher(official: Mapping[str, Tensor], target: Mapping[str, Tensor], config: AlbefConfig) -> Converted:
    """The momentum copy's state dict; ``target`` gives what it shares with the student."""
    copies = {name: value for name, value in official.items() if name.split(".")[0].endswith("_m")}
    return teacher_table(config, has_mlm(official)).convert(copies, target)
