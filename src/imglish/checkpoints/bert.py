"""Rules that official ALBEF and BLIP checkpoints have in common: timm's ViT and the layers of their BERT."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from imglish.checkpoints.rules import Drop, Fresh, Rule, Tie, Transform

CLASS_TOKEN = Transform(lambda x: x[0, 0], lambda x: x[None, None])
POSITIONS = Transform(lambda x: x[0], lambda x: x[None])

PARTS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {  # module of our block -> (their names, ours within it)
    "attn": (
        (("attention.self.query", "attention.self.key", "attention.self.value"), ".qkv"),
        (("attention.output.dense",), ".out"),
    ),
    "norm1": ((("attention.output.LayerNorm",), ""),),
    "cross": (
        (("crossattention.self.query",), ".q"),
        (("crossattention.self.key", "crossattention.self.value"), ".kv"),
        (("crossattention.output.dense",), ".out"),
    ),
    "norm_cross": ((("crossattention.output.LayerNorm",), ""),),
    "mlp": ((("intermediate.dense",), ".fc1"), (("output.dense",), ".fc2")),
    "norm2": ((("output.LayerNorm",), ""),),
}
CROSS = ("cross", "norm_cross")


def vision(prefix: str) -> Iterator[Rule]:
    """timm's vision Transformer."""
    yield Rule(f"{prefix}.cls_token", "vision.class_token", CLASS_TOKEN)
    yield Rule(f"{prefix}.pos_embed", "vision.positions", POSITIONS)
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


def embeddings(prefix: str, ours: str, types: bool) -> Iterator[Rule | Drop]:
    """Words, positions, perhaps token types, and their norm."""
    yield Drop(f"{prefix}.position_ids", "counts up from zero")
    yield Rule(f"{prefix}.word_embeddings.weight", f"{ours}.words.weight")
    yield Rule(f"{prefix}.position_embeddings.weight", f"{ours}.positions.weight")
    if types:
        yield Rule(f"{prefix}.token_type_embeddings.weight", f"{ours}.types.weight")
    yield Rule(f"{prefix}.LayerNorm.{{leaf}}", f"{ours}.norm.{{leaf}}")


def layer(prefix: str, ours: str, parts: Iterable[str]) -> Iterator[Rule]:
    """``parts`` of one layer (names of PARTS), or with ``{i}`` in both names of all layers."""
    for part in parts:
        for names, place in PARTS[part]:
            yield Rule(tuple(f"{prefix}.{name}.{{leaf}}" for name in names), f"{ours}.{part}{place}.{{leaf}}")


def head(prefix: str, words: str, ours: str) -> Iterator[Rule | Tie]:
    """The word-prediction head, its output matrix tied to the embeddings called ``words``."""
    yield Rule(f"{prefix}.bias", f"{ours}.bias")
    yield Rule(f"{prefix}.transform.dense.{{leaf}}", f"{ours}.dense.{{leaf}}")
    yield Rule(f"{prefix}.transform.LayerNorm.{{leaf}}", f"{ours}.norm.{{leaf}}")
    yield Tie(f"{prefix}.decoder.weight", words)
    yield Tie(f"{prefix}.decoder.bias", f"{prefix}.bias")


def dropped(rules: Iterable[Rule | Drop | Tie | Fresh], reason: str) -> Iterator[Drop]:
    """The sources of ``rules``, left out."""
    for rule in rules:
        if isinstance(rule, Fresh):
            continue
        for source in rule.sources if isinstance(rule, Rule) else (rule.source,):
            yield Drop(source, reason)


QUEUE = [
    Drop(name, "queue of the momentum teacher")
    for name in ("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue")
]


def answers(prefix: str, types: bool) -> Iterator[Rule | Drop | Tie]:
    """The decoder of answers, ``decoder`` of ours: all layers look at the question."""
    yield from embeddings(f"{prefix}.bert.embeddings", "decoder.embedding", types)
    yield from layer(f"{prefix}.bert.encoder.layer.{{i}}", "decoder.layers.{i}", PARTS)
    yield from head(f"{prefix}.cls.predictions", f"{prefix}.bert.embeddings.word_embeddings.weight", "decoder.head")
