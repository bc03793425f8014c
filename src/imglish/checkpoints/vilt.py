"""Official ViLT checkpoints (Lightning files of dandelin/ViLT), their task models, and those of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from imglish.checkpoints import bert
from imglish.checkpoints.rules import Converted, Drop, Fresh, Rule, Table, Tie, Transform

_CLASS_TOKEN = Transform(lambda x: x[0, 0], lambda x: x[None, None])
_POSITIONS = Transform(lambda x: x[0], lambda x: x[None])
_BLOCK = (
    ("norm1", "norm1"),
    ("attn.qkv", "attn.qkv"),
    ("attn.proj", "attn.out"),
    ("norm2", "norm2"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)
_HF_BLOCK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("layernorm_before",), "norm1"),
    (tuple(f"attention.attention.{name}" for name in ("query", "key", "value")), "attn.qkv"),
    (("attention.output.dense",), "attn.out"),
    (("layernorm_after",), "norm2"),
    (("intermediate.dense",), "mlp.fc1"),
    (("output.dense",), "mlp.fc2"),
)


HEADS = ("rank_output", "vqa_classifier", "nlvr2_classifier")
"""Official names of the heads of :mod:`imglish.models.vilt_heads`."""


def table(head: str | None = None) -> Table:
    """Official name -> ours. head: one of :data:`HEADS` for a task model, which holds the ViLT as ``vilt``."""
    prefix = "" if head is None else "vilt."
    rules: list[Rule | Drop] = [*_body(prefix), Rule("itm_score.fc.{leaf}", f"{prefix}itm_head.{{leaf}}")]
    rules += _words("mlm_score", prefix)
    if head is not None:
        layer = "" if head == "rank_output" else ".{i}"
        rules.append(Rule(f"{head}{layer}.{{leaf}}", f"head{layer}.{{leaf}}"))
    return Table(*rules)


def _body(prefix: str) -> Iterator[Rule | Drop]:
    yield from bert.embeddings("text_embeddings", f"{prefix}embedding", types=True)
    yield Rule("token_type_embeddings.weight", f"{prefix}types.weight")
    yield Rule("transformer.cls_token", f"{prefix}pictures.class_token", _CLASS_TOKEN)
    yield Rule("transformer.pos_embed", f"{prefix}pictures.positions", _POSITIONS)
    yield Rule("transformer.patch_embed.proj.{leaf}", f"{prefix}pictures.patch_embed.{{leaf}}")
    for theirs, ours in _BLOCK:
        yield Rule(f"transformer.blocks.{{i}}.{theirs}.{{leaf}}", f"{prefix}blocks.{{i}}.{ours}.{{leaf}}")
    yield Rule("transformer.norm.{leaf}", f"{prefix}norm.{{leaf}}")
    yield Rule("pooler.dense.{leaf}", f"{prefix}pooler.{{leaf}}")


def _words(theirs: str, prefix: str) -> Iterator[Rule]:
    yield Rule(f"{theirs}.bias", f"{prefix}mlm_head.bias")
    yield Rule(f"{theirs}.transform.dense.{{leaf}}", f"{prefix}mlm_head.dense.{{leaf}}")
    yield Rule(f"{theirs}.transform.LayerNorm.{{leaf}}", f"{prefix}mlm_head.norm.{{leaf}}")
    yield Rule(f"{theirs}.decoder.weight", f"{prefix}mlm_words.weight")


def transformers_table(with_words: bool, with_bias: bool = False) -> Table:
    """Names of transformers' ``ViltForMaskedLM`` -> ours; it has no ITM head.

    with_words: the checkpoint has the head for words; with_bias: it holds the bias of that head beside the output
    matrix, as older files do.
    """
    rules: list[Rule | Drop | Tie | Fresh] = [*_transformers(), Fresh("itm_head.{leaf}", "transformers has none")]
    if with_words:
        words = [rule for rule in _words("mlm_score", "") if rule.source != "mlm_score.bias"]
        decoder = "mlm_score.decoder.bias"
        rules += [*words, Rule("mlm_score.bias" if with_bias else decoder, "mlm_head.bias")]
        rules += [Tie(decoder, "mlm_score.bias")] if with_bias else []
    else:
        names = ("mlm_head.{leaf}", "mlm_head.{part}.{leaf}", "mlm_words.{leaf}")
        rules += [Fresh(name, "the checkpoint has no head for words") for name in names]
    return Table(*rules)


def convert_transformers(official: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Converted:
    """Like :func:`convert`, from a state dict of transformers' ``ViltForMaskedLM`` or ``ViltModel``."""
    if "embeddings.cls_token" in official:
        official = {f"vilt.{name}": value for name, value in official.items()}
    with_words = any(name.startswith("mlm_score.") for name in official)
    words = "mlm_score.decoder.weight"
    if with_words and words not in official:  # newer files leave out what is tied
        official = {**official, words: official["vilt.embeddings.text_embeddings.word_embeddings.weight"]}
    return transformers_table(with_words, "mlm_score.bias" in official).convert(official, target)


def _transformers() -> Iterator[Rule | Drop]:
    inputs = "vilt.embeddings"
    yield from bert.embeddings(f"{inputs}.text_embeddings", "embedding", types=True)
    yield Rule(f"{inputs}.token_type_embeddings.weight", "types.weight")
    yield Rule(f"{inputs}.cls_token", "pictures.class_token", _CLASS_TOKEN)
    yield Rule(f"{inputs}.position_embeddings", "pictures.positions", _POSITIONS)
    yield Rule(f"{inputs}.patch_embeddings.projection.{{leaf}}", "pictures.patch_embed.{leaf}")
    for names, ours in _HF_BLOCK:
        yield Rule(
            tuple(f"vilt.encoder.layer.{{i}}.{name}.{{leaf}}" for name in names), f"blocks.{{i}}.{ours}.{{leaf}}"
        )
    yield Rule("vilt.layernorm.{leaf}", "norm.{leaf}")
    yield Rule("vilt.pooler.dense.{leaf}", "pooler.{leaf}")


def convert(official: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Converted:
    """The state dict of ours, of the names and shapes of ``target`` (a :class:`Vilt` or one of its task models)."""
    return table(head_of(official)).convert(official, target)


def head_of(official: Mapping[str, Tensor]) -> str | None:
    """The head of a task model among :data:`HEADS`, None for a checkpoint of pre-training."""
    names = {name.split(".")[0] for name in official}
    return next((head for head in HEADS if head in names), None)
