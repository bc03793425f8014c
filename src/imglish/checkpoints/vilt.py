"""Official ViLT checkpoints (Lightning files of dandelin/ViLT) and their task models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from imglish.checkpoints import bert
from imglish.checkpoints.rules import Converted, Drop, Rule, Table

_BLOCK = (
    ("norm1", "norm1"),
    ("attn.qkv", "attn.qkv"),
    ("attn.proj", "attn.out"),
    ("norm2", "norm2"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)


HEADS = ("rank_output", "vqa_classifier", "nlvr2_classifier")
"""Official names of the heads of :mod:`imglish.models.vilt_heads`."""


def table(head: str | None = None) -> Table:
    """Official name -> ours. head: one of :data:`HEADS` for a task model, which holds the ViLT as ``vilt``."""
    prefix = "" if head is None else "vilt."
    rules: list[Rule | Drop] = [*_body(prefix), Rule("itm_score.fc.{leaf}", f"{prefix}itm_head.{{leaf}}")]
    rules += words("mlm_score", prefix)
    if head is not None:
        layer = "" if head == "rank_output" else ".{i}"
        rules.append(Rule(f"{head}{layer}.{{leaf}}", f"head{layer}.{{leaf}}"))
    return Table(*rules)


def _body(prefix: str) -> Iterator[Rule | Drop]:
    yield from bert.embeddings("text_embeddings", f"{prefix}embedding", types=True)
    yield Rule("token_type_embeddings.weight", f"{prefix}types.weight")
    yield Rule("transformer.cls_token", f"{prefix}pictures.class_token", bert.CLASS_TOKEN)
    yield Rule("transformer.pos_embed", f"{prefix}pictures.positions", bert.POSITIONS)
    yield Rule("transformer.patch_embed.proj.{leaf}", f"{prefix}pictures.patch_embed.{{leaf}}")
    for theirs, ours in _BLOCK:
        yield Rule(f"transformer.blocks.{{i}}.{theirs}.{{leaf}}", f"{prefix}blocks.{{i}}.{ours}.{{leaf}}")
    yield Rule("transformer.norm.{leaf}", f"{prefix}norm.{{leaf}}")
    yield Rule("pooler.dense.{leaf}", f"{prefix}pooler.{{leaf}}")


def words(theirs: str, prefix: str) -> Iterator[Rule]:
    """The head for words called ``theirs``."""
    yield Rule(f"{theirs}.bias", f"{prefix}mlm_head.bias")
    yield Rule(f"{theirs}.transform.dense.{{leaf}}", f"{prefix}mlm_head.dense.{{leaf}}")
    yield Rule(f"{theirs}.transform.LayerNorm.{{leaf}}", f"{prefix}mlm_head.norm.{{leaf}}")
    yield Rule(f"{theirs}.decoder.weight", f"{prefix}mlm_words.weight")


def convert(official: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Converted:
    """The state dict of ours, of the names and shapes of ``target`` (a :class:`Vilt` or one of its task models)."""
    return table(head_of(official)).convert(official, target)


def convert_ranking(official: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Converted:
    """The state dict of a :class:`Vilt` from a checkpoint of pre-training or of retrieval, whose score of a pair then
    is the logit "matched" of the ITM head."""
    scored = Drop("rank_output.{leaf}", "made the ITM head, whose other row is zero")
    return (Table(scored) + table()).convert(_with_ranking(official), target)


def _with_ranking(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = dict(official)
    if "rank_output.weight" in official:
        made |= {f"itm_score.fc.{leaf}": ranking_row(official[f"rank_output.{leaf}"]) for leaf in ("weight", "bias")}
    return made


def ranking_row(score: Tensor) -> Tensor:
    """Weight or bias ``(1, ...)`` of one score as those of two logits, of which the first is zero."""
    return torch.cat([torch.zeros_like(score), score])


def head_of(official: Mapping[str, Tensor]) -> str | None:
    """The head of a task model among :data:`HEADS`, None for a checkpoint of pre-training."""
    names = {name.split(".")[0] for name in official}
    return next((head for head in HEADS if head in names), None)
