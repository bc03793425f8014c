"""CoCa of open_clip: its model JSON and state dict to ours, and back.

Attentional pooling and cross-attention are ``nn.MultiheadAttention`` there, which keeps the biases of query, key and
value in one vector (and, where widths agree, their matrices in one); here the query stands apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from imglish.checkpoints.clip import skeleton, transformer_rules
from imglish.checkpoints.open_clip import Options, activation, norm_eps, vit
from imglish.checkpoints.rules import TRANSPOSE, Converted, Cut, Rule, Table
from imglish.models.coca import CocaConfig
from imglish.nn.blocks import Activation
from imglish.nn.embed import resize_grid, resize_line


def is_coca(model: Mapping[str, Any]) -> bool:
    """Whether an open_clip model JSON describes a CoCa."""
    return "multimodal_cfg" in model


def config_from_json(model: Mapping[str, Any], released: bool = True) -> CocaConfig:
    """Our configuration from an open_clip model JSON (``open_clip/model_configs/coca_*.json``).

    released: with the mask of the released weights, which is shifted by one; False for weights trained with
    ``correct_cls_mask``. Raises :class:`imglish.checkpoints.open_clip.UnknownOptionError` for what we do not have.
    """
    top = Options("top", model)
    parts = {name: Options(name, top.take(name)) for name in ("vision_cfg", "text_cfg", "multimodal_cfg")}
    vision, text, upper = parts.values()
    quick: Activation = "quick_gelu" if top.take("quick_gelu", False) else "gelu"
    width, heads, ratio = (text.take(*x) for x in (("width", 512), ("heads", 8), ("mlp_ratio", 4.0)))
    same = {"width": width, "heads": heads, "mlp_ratio": ratio}
    for name, value in same.items():
        upper.expect(name, value, {"width": 512, "heads": 8, "mlp_ratio": 4.0}[name])
    vocab_size, length = text.take("vocab_size", 49408), text.take("context_length", 77)
    upper.expect("vocab_size", vocab_size, 49408)
    text.expect("embed_cls", True, False)
    vision.expect("attentional_pool", True, False)
    eps, upper_eps = norm_eps(text), norm_eps(upper)
    if upper_eps != eps:
        raise upper.refuse("norm_kwargs", {"eps": upper_eps})
    embed_dim = top.take("embed_dim")
    if embed_dim != width:
        raise top.refuse("embed_dim", embed_dim)
    queries, pool_heads = vision.take("attn_pooler_queries", 256), vision.take("attn_pooler_heads", 8)
    text.choose("pool_type", "argmax", {"argmax": None, "tok": None, "last": None})
    config = CocaConfig(
        vision=replace(vit(vision, quick), norm_after=False),
        vocab_size=vocab_size,
        max_length=length,
        width=width,
        heads=heads,
        unimodal_depth=text.take("layers", 12),
        multimodal_depth=upper.take("layers", 12),
        mlp_ratio=ratio,
        norm_eps=eps,
        activation=activation(text, quick),
        embed_dim=embed_dim,
        pool="shared",
        queries=queries,
        pool_heads=pool_heads,
        cross="separate",
        projection=True,
        cls_sees="released" if released else "text",
        temperature=math.exp(-top.take("init_logit_scale", math.log(1 / 0.07))),
    )
    for options in (top, *parts.values()):
        options.done()
    return config


def table(config: CocaConfig) -> Table:
    """The correspondence for a model of ``config``."""
    pool, cross = "visual.attn_pool.", "text_decoder.cross_attn.{i}."
    if config.vision.width == config.width:
        reading = Table(Cut(pool + "attn.in_proj_weight", ("caption_pool.q.weight", "caption_pool.kv.weight"), (1, 2)))
    else:
        key_value = (pool + "attn.k_proj_weight", pool + "attn.v_proj_weight")
        reading = Table(
            Rule(pool + "attn.q_proj_weight", "caption_pool.q.weight"), Rule(key_value, "caption_pool.kv.weight")
        )
    return (
        Table(
            Rule("logit_scale", "logit_scale"),
            Rule("visual.class_embedding", "vision.class_token"),
            Rule("visual.positional_embedding", "vision.positions"),
            Rule("visual.conv1.weight", "vision.patch_embed.weight"),
            Rule("visual.ln_pre.{leaf}", "vision.norm_before.{leaf}"),
            Rule("visual.ln_post.{leaf}", "caption_pool.norm.{leaf}"),
            Rule("visual.proj", "image_proj.weight", TRANSPOSE),
            Rule(pool + "query", "caption_pool.queries"),
            Cut(pool + "attn.in_proj_bias", ("caption_pool.q.bias", "caption_pool.kv.bias"), (1, 2)),
            Rule(pool + "attn.out_proj.{leaf}", "caption_pool.out.{leaf}"),
            Rule(pool + "ln_q.{leaf}", "caption_pool.norm_queries.{leaf}"),
            Rule(pool + "ln_k.{leaf}", "caption_pool.norm_tokens.{leaf}"),
            Rule("text.cls_emb", "text.cls"),
            Rule("text.positional_embedding", "text.positions"),
            Rule("text.token_embedding.weight", "text.words.weight"),
            Rule("text.ln_final.{leaf}", "text.norm.{leaf}"),
            Rule("text.text_projection", "text_proj.weight", TRANSPOSE),
            Cut(
                cross + "attn.in_proj_{leaf}",
                ("layers.{i}.cross.cross.q.{leaf}", "layers.{i}.cross.cross.kv.{leaf}"),
                (1, 2),
            ),
            Rule(cross + "attn.out_proj.{leaf}", "layers.{i}.cross.cross.out.{leaf}"),
            Rule(cross + "ln_1_kv.{leaf}", "layers.{i}.cross.norm_memory.{leaf}"),
            Rule(cross + "ln_{n}.{leaf}", "layers.{i}.cross.norm{n}.{leaf}"),
            Rule(cross + "mlp.c_fc.{leaf}", "layers.{i}.cross.mlp.fc1.{leaf}"),
            Rule(cross + "mlp.c_proj.{leaf}", "layers.{i}.cross.mlp.fc2.{leaf}"),
            Rule("text_decoder.ln_final.{leaf}", "norm.{leaf}"),
            Rule("text_decoder.text_projection", "head.weight", TRANSPOSE),
        )
        + reading
        + transformer_rules("visual.transformer.", "vision.blocks.{i}.")
        + transformer_rules("text.transformer.", "text.blocks.{i}.")
        + transformer_rules("text_decoder.", "layers.{i}.block.")
    )


def convert(official: Mapping[str, Tensor], config: CocaConfig) -> Converted:
    """Our state dict from the official one, which must hold exactly the model of ``config``.

    Positions of another picture size or text length are resampled as open_clip does; the report names them.
    """
    weights, resampled = dict(official), {}
    side = config.vision.image.size // config.vision.patch
    if (name := "visual.positional_embedding") in official:
        grid, prefix = official[name], int(config.vision.class_token)
        weights[name] = resize_grid(grid, (side, side), prefix=prefix, antialias=True)
    if (name := "text.positional_embedding") in official:
        weights[name] = resize_line(official[name], config.max_length + 1)
    for name, value in weights.items():
        if value.shape != official[name].shape:
            resampled[name] = f"resampled from {tuple(official[name].shape)} to {tuple(value.shape)}"
    converted = table(config).convert(weights, skeleton(config))
    return Converted(converted.state, converted.report | resampled)
