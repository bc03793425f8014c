"""Official ALBEF checkpoints: the pre-training model (text encoder with MLM head) and the retrieval model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from imglish.checkpoints.rules import Converted, Drop, Fresh, Rule, Table, Tie, Transform
from imglish.models.albef import AlbefConfig

_CLASS_TOKEN = Transform(lambda x: x[0, 0], lambda x: x[None, None])
_POSITIONS = Transform(lambda x: x[0], lambda x: x[None])


def _vision(prefix: str) -> Iterator[Rule]:
    yield Rule(f"{prefix}.cls_token", "vision.class_token", _CLASS_TOKEN)
    yield Rule(f"{prefix}.pos_embed", "vision.positions", _POSITIONS)
    yield Rule(f"{prefix}.patch_embed.proj.{{leaf}}", "vision.patch_embed.{leaf}")
    for theirs, ours in (
        ("norm1", "norm1"),
        ("attn.qkv", "attn.qkv"),
        ("attn.proj", "attn.out"),
        ("norm2", "norm2"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    ):
        yield Rule(f"{prefix}.blocks.{{i}}.{theirs}.{{leaf}}", f"vision.blocks.{{i}}.{ours}.{{leaf}}")
    yield Rule(f"{prefix}.norm.{{leaf}}", "vision.norm.{leaf}")


def _bert(prefix: str, config: AlbefConfig) -> Iterator[Rule | Drop]:
    yield Drop(f"{prefix}.embeddings.position_ids", "counts up from zero")
    yield Rule(f"{prefix}.embeddings.word_embeddings.weight", "embedding.words.weight")
    yield Rule(f"{prefix}.embeddings.position_embeddings.weight", "embedding.positions.weight")
    yield Rule(f"{prefix}.embeddings.token_type_embeddings.weight", "embedding.types.weight")
    yield Rule(f"{prefix}.embeddings.LayerNorm.{{leaf}}", "embedding.norm.{leaf}")
    for i in range(config.depth):
        layer = f"{prefix}.encoder.layer.{i}"
        fused = i >= config.fusion_layer
        block = f"fusion_layers.{i - config.fusion_layer}" if fused else f"text_layers.{i}"
        yield from _attention(f"{layer}.attention", ("query", "key", "value"), f"{block}.attn.qkv")
        yield Rule(f"{layer}.attention.output.dense.{{leaf}}", f"{block}.attn.out.{{leaf}}")
        yield Rule(f"{layer}.attention.output.LayerNorm.{{leaf}}", f"{block}.norm1.{{leaf}}")
        if fused:
            yield from _attention(f"{layer}.crossattention", ("query",), f"{block}.cross.q")
            yield from _attention(f"{layer}.crossattention", ("key", "value"), f"{block}.cross.kv")
            yield Rule(f"{layer}.crossattention.output.dense.{{leaf}}", f"{block}.cross.out.{{leaf}}")
            yield Rule(f"{layer}.crossattention.output.LayerNorm.{{leaf}}", f"{block}.norm_cross.{{leaf}}")
        yield Rule(f"{layer}.intermediate.dense.{{leaf}}", f"{block}.mlp.fc1.{{leaf}}")
        yield Rule(f"{layer}.output.dense.{{leaf}}", f"{block}.mlp.fc2.{{leaf}}")
        yield Rule(f"{layer}.output.LayerNorm.{{leaf}}", f"{block}.norm2.{{leaf}}")


def _attention(prefix: str, parts: tuple[str, ...], target: str) -> Iterator[Rule]:
    yield Rule(tuple(f"{prefix}.self.{part}.{{leaf}}" for part in parts), f"{target}.{{leaf}}")


def _mlm(prefix: str) -> Iterator[Rule | Tie]:
    head = f"{prefix}.cls.predictions"
    yield Rule(f"{head}.bias", "mlm_head.bias")
    yield Rule(f"{head}.transform.dense.{{leaf}}", "mlm_head.dense.{leaf}")
    yield Rule(f"{head}.transform.LayerNorm.{{leaf}}", "mlm_head.norm.{leaf}")
    yield Tie(f"{head}.decoder.weight", f"{prefix}.bert.embeddings.word_embeddings.weight")
    yield Tie(f"{head}.decoder.bias", f"{head}.bias")


def _towers(config: AlbefConfig, with_mlm: bool, suffix: str) -> Iterator[Rule | Drop | Tie | Fresh]:
    text = f"text_encoder{suffix}"
    yield from _vision(f"visual_encoder{suffix}")
    yield from _bert(f"{text}.bert" if with_mlm else text, config)
    if with_mlm:
        yield from _mlm(text)
    else:
        yield Fresh("mlm_head.bias", "the checkpoint was fine-tuned without MLM")
        yield Fresh("mlm_head.{part}.{leaf}", "the checkpoint was fine-tuned without MLM")
    yield Rule(f"vision_proj{suffix}.{{leaf}}", "image_proj.{leaf}")
    yield Rule(f"text_proj{suffix}.{{leaf}}", "text_proj.{leaf}")


def table(config: AlbefConfig, with_mlm: bool) -> Table:
    """The student: official name -> ours. ``with_mlm``: a pre-training checkpoint, whose text encoder has the head."""
    teacher = [
        Drop(source, "momentum copy: see teacher_table")
        for rule in _towers(config, with_mlm, "_m")
        for source in _sources(rule)
    ]
    state = [
        Drop(name, "queue of the momentum teacher") for name in ("image_queue", "text_queue", "idx_queue", "queue_ptr")
    ]
    return Table(
        *_towers(config, with_mlm, ""),
        Rule("temp", "temperature"),
        Rule("itm_head.{leaf}", "itm_head.{leaf}"),
        *teacher,
        *state,
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


def _sources(rule: Rule | Drop | Tie | Fresh) -> tuple[str, ...]:
    if isinstance(rule, Rule):
        return rule.sources
    return () if isinstance(rule, Fresh) else (rule.source,)
