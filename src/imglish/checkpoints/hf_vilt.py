"""ViLT in the layouts of Hugging Face transformers: ``config.json`` and state dict to ours, and back.

``ViltModel``, ``ViltForMaskedLM``, ``ViltForImageAndTextRetrieval`` (one score a pair, which becomes the logit
"matched" of our ITM head), ``ViltForQuestionAnswering`` and ``ViltForImagesAndTextClassification`` (NLVR2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from imglish.checkpoints import bert
from imglish.checkpoints.hf_settings import filled, plain_gelu, stack
from imglish.checkpoints.rules import Converted, Drop, Fresh, Rule, Table, Tie, Transform
from imglish.checkpoints.vilt import ranking_row, words
from imglish.models.vilt import ViltConfig
from imglish.models.vilt_pictures import AspectInput

_BLOCK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("layernorm_before",), "norm1"),
    (tuple(f"attention.attention.{name}" for name in ("query", "key", "value")), "attn.qkv"),
    (("attention.output.dense",), "attn.out"),
    (("layernorm_after",), "norm2"),
    (("intermediate.dense",), "mlp.fc1"),
    (("output.dense",), "mlp.fc2"),
)
_WORDS = ("mlm_head.{leaf}", "mlm_head.{part}.{leaf}", "mlm_words.{leaf}")
_RANKING = Transform(ranking_row, lambda x: x[1:] - x[:1])


def config_from_json(given: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ViltConfig:
    """Our configuration from the ``config.json`` of a ViLT and its weights, which say what heads there are.

    ``max_image_length`` patches of a picture are seen in training; theirs draws them in evaluation too.
    """
    whole = filled(given, "vilt")
    plain_gelu(whole)
    size, patch = whole["image_size"], whole["patch_size"]
    task = "classifier.3.weight" in weights
    most = whole["max_image_length"]
    return ViltConfig(
        image=AspectInput(size, int(1333 / 800 * size), patch, most if most > 0 else None),
        vocab_size=whole["vocab_size"],
        max_length=whole["max_position_embeddings"],
        **stack(whole),
        mlp_ratio=whole["intermediate_size"] / whole["hidden_size"],
        text_norm_eps=whole["layer_norm_eps"],
        dropout=whole["hidden_dropout_prob"],
        types=_prefixed(weights)["vilt.embeddings.token_type_embeddings.weight"].shape[0],
        itm=not task,
        mlm=not task,
        wpa=not task,
    )


def pictures(weights: Mapping[str, Tensor]) -> int:
    """How many pictures the head of a task model reads."""
    return weights["classifier.0.weight"].shape[1] // weights["vilt.pooler.dense.weight"].shape[0]


def table(with_words: bool, with_ranking: bool = False, with_bias: bool = False) -> Table:
    """Their names -> ours. with_words: of ``ViltForMaskedLM``; with_ranking: of ``ViltForImageAndTextRetrieval``;
    with_bias: the bias of the words lies beside the output matrix, as in older files."""
    rules: list[Rule | Drop | Tie | Fresh] = [*_body()]
    if with_ranking:
        rules.append(Rule("rank_output.{leaf}", "itm_head.{leaf}", _RANKING))
    else:
        rules.append(Fresh("itm_head.{leaf}", "the checkpoint does not score pairs"))
    if with_words:
        rules += [rule for rule in words("mlm_score", "") if rule.source != "mlm_score.bias"]
        decoder = "mlm_score.decoder.bias"
        rules.append(Rule("mlm_score.bias" if with_bias else decoder, "mlm_head.bias"))
        rules += [Tie(decoder, "mlm_score.bias")] if with_bias else []
    else:
        rules += [Fresh(name, "the checkpoint has no head for words") for name in _WORDS]
    return Table(*rules)


def task_table() -> Table:
    """Of a task model: the ViLT as ``vilt``, and its ``head``."""
    body = [replace(rule, target=f"vilt.{rule.target}") if isinstance(rule, Rule) else rule for rule in _body()]
    return Table(*body, Rule("classifier.{i}.{leaf}", "head.{i}.{leaf}"))


def _body() -> Iterator[Rule | Drop]:
    inputs = "vilt.embeddings"
    yield from bert.embeddings(f"{inputs}.text_embeddings", "embedding", types=True)
    yield Rule(f"{inputs}.token_type_embeddings.weight", "types.weight")
    yield Rule(f"{inputs}.cls_token", "pictures.class_token", bert.CLASS_TOKEN)
    yield Rule(f"{inputs}.position_embeddings", "pictures.positions", bert.POSITIONS)
    yield Rule(f"{inputs}.patch_embeddings.projection.{{leaf}}", "pictures.patch_embed.{leaf}")
    for names, ours in _BLOCK:
        yield Rule(
            tuple(f"vilt.encoder.layer.{{i}}.{name}.{{leaf}}" for name in names), f"blocks.{{i}}.{ours}.{{leaf}}"
        )
    yield Rule("vilt.layernorm.{leaf}", "norm.{leaf}")
    yield Rule("vilt.pooler.dense.{leaf}", "pooler.{leaf}")


def _prefixed(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the models with heads: the bare ``ViltModel`` has no ``vilt.`` in front."""
    bare = "embeddings.cls_token" in official
    return {f"vilt.{name}" if bare else name: value for name, value in official.items()}


def convert(official: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Converted:
    """Our state dict, of the names and shapes of ``target`` (a :class:`Vilt`, or one of its task models)."""
    given = _prefixed(official)
    if "classifier.3.weight" in given:
        return task_table().convert(given, target)
    with_words = any(name.startswith("mlm_score.") for name in given)
    tied = ("mlm_score.decoder.weight", "vilt.embeddings.text_embeddings.word_embeddings.weight")
    for one, other in (tied, tied[::-1]):
        if with_words and one not in given and other in given:  # newer files leave out one that is tied
            given[one] = given[other]
    return table(with_words, "rank_output.weight" in given, "mlm_score.bias" in given).convert(given, target)
