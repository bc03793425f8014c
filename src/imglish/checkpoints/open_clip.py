"""The models of open_clip with towers of its own: their model JSON and state dict to ours, and back.

Two layouts: class ``CLIP`` (text tower at the top level, as openai/CLIP) and ``CustomTextCLIP`` (``text.*``). SigLIP
models have their image tower from timm (``visual.trunk.*``). Options that we do not have are errors that name them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from imglish.checkpoints.clip import resnet_rules, skeleton, text_rules, vit_rules
from imglish.checkpoints.rules import Converted, Rule, Table, Transform
from imglish.data.tokenizers import CLEANING
from imglish.models.clip import ClipConfig, ResNetConfig, clip_vit
from imglish.models.text_towers import TextConfig
from imglish.models.vit import ImageInput, VitConfig
from imglish.nn.blocks import Activation
from imglish.nn.embed import resize_grid, resize_line

# What each dictionary may hold without changing the function: how a model is trained, tokenized or what it returns.
_IDLE = {
    "top": {"custom_text", "output_dict"},
    "vision_cfg": {"patch_dropout", "output_tokens", "timm_model_pretrained", "timm_drop", "timm_drop_path"},
    "multimodal_cfg": {"context_length", "attn_pooler_heads"},  # of the mask only; not read
    "text_cfg": {"hf_tokenizer_name", "tokenizer_kwargs", "output_tokens", "eos_id"}  # see cleaning and closing
    | {"final_ln_after_pool"},  # the text tower normalises row by row, so the order does not matter
}
_ATTENTION = {"qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"}
# What may stand there switched off; anything else that is not taken is not known.
_OFF = {
    "top": {"multimodal_cfg", "nonscalar_logit_scale"},
    "vision_cfg": _ATTENTION
    | {"attentional_pool", "timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias", "act_kwargs"},
    "multimodal_cfg": _ATTENTION,
    "text_cfg": _ATTENTION
    | {"embed_cls", "hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "tokenizer_mode"},
}


class UnknownOptionError(ValueError):
    """An open_clip option, or a value of one, that changes the model in a way we do not build."""


class Options:
    """One dictionary of a model JSON: every key must be taken or be idle."""

    def __init__(self, where: str, given: Any) -> None:
        if not isinstance(given, Mapping):
            raise UnknownOptionError(f"open_clip's {where} is {given!r}, no dictionary of options")
        self.where = where
        self.left = {key: value for key, value in given.items() if key not in _IDLE[where]}

    def take(self, key: str, default: Any = None) -> Any:
        value = self.left.pop(key, None)
        return default if value is None else value

    def refuse(self, key: str, value: Any) -> UnknownOptionError:
        return UnknownOptionError(f"open_clip option {self.where}.{key}={value!r} is not supported")

    def choose(self, key: str, default: str, choices: Mapping[str, Any]) -> Any:
        value = self.take(key, default)
        if value not in choices:
            raise self.refuse(key, value)
        return choices[value]

    def expect(self, key: str, wanted: Any, default: Any = None) -> None:
        """Take an option that can only have one value."""
        if (value := self.take(key, default)) != wanted:
            raise self.refuse(key, value)

    def done(self) -> None:
        """Whatever is left must be known and switched off; ``block_type`` "default" is the plain block."""
        for key, value in self.left.items():
            if (value or key not in _OFF[self.where]) and (key, value) != ("block_type", "default"):
                raise self.refuse(key, value)


def config_from_json(model: Mapping[str, Any]) -> ClipConfig:
    """Our configuration from an open_clip model JSON (``open_clip/model_configs/*.json``).

    Raises :class:`UnknownOptionError` for what we do not have: other timm towers, Hugging Face text towers, attentional
    pooling (CoCa), normalised or scaled attention.
    """
    top = Options("top", model)
    vision, text = Options("vision_cfg", top.take("vision_cfg")), Options("text_cfg", top.take("text_cfg"))
    quick: Activation = "quick_gelu" if top.take("quick_gelu", False) else "gelu"
    embed_dim, bias = top.take("embed_dim"), top.take("init_logit_bias")
    bias = None if bias is None else float(bias)
    pool: dict[str, Any] = {}
    tower: VitConfig | ResNetConfig
    if vision.left.get("timm_model_name"):
        tower, pool = _timm_siglip(vision), {"pool": "map", "image_projection": False}
    elif isinstance(vision.left.get("layers"), list | tuple):
        tower = _resnet(vision)
    else:
        pool = {"pool": vision.choose("pool_type", "tok", {"tok": "class", "avg": "mean"})}
        tower = vit(vision, quick)
    config = ClipConfig(
        vision=tower,
        text=_text(text, quick),
        vocab_size=text.take("vocab_size", 49408),
        max_length=text.take("context_length", 77),
        embed_dim=embed_dim,
        loss="itc" if bias is None else "siglip",
        temperature=math.exp(-top.take("init_logit_scale", math.log(1 / 0.07))),
        logit_bias=bias,
        **pool,
    )
    for options in (top, vision, text):
        options.done()
    return config


def cleaning(model: Mapping[str, Any]) -> str | None:
    """How a model JSON wants texts to be cleaned, one of ``tokenizers.CLEANING``; None: as its tokenizer does it."""
    kwargs = dict((model.get("text_cfg") or {}).get("tokenizer_kwargs") or {})
    clean: str | None = kwargs.pop("clean", None)
    if any(kwargs.values()) or clean not in (None, "whitespace", *CLEANING):
        raise UnknownOptionError(
            f"open_clip option text_cfg.tokenizer_kwargs={kwargs | {'clean': clean}!r} is not supported"
        )
    return clean if clean in CLEANING else None


def closing(model: Mapping[str, Any]) -> int | None:
    """Number of the token at which a text is read, where a model JSON says it."""
    text = model.get("text_cfg") or {}
    end: int | None = text.get("eos_id") if text.get("pool_type") == "eos" else None
    return end


def vit(options: Options, quick: Activation) -> VitConfig:
    """The config of a picture tower that is a ViT. Raises :class:`UnknownOptionError` for what ours does not have."""
    width, eps = options.take("width", 768), norm_eps(options)
    options.choose("pos_embed_type", "learnable", {"learnable": None})
    tower = clip_vit(
        _square(options, "image_size", 224),
        _square(options, "patch_size", 16),
        width,
        options.take("layers", 12),
        heads=width // options.take("head_width", 64),
        activation=activation(options, quick),
    )
    return replace(
        tower,
        mlp_ratio=options.take("mlp_ratio", 4.0),
        norm_eps=eps,
        norm_before=not options.take("no_ln_pre", False),
        norm_after=not options.take("final_ln_after_pool", False),
        layer_scale=options.take("ls_init_value"),
    )


def _resnet(options: Options) -> ResNetConfig:
    """The ResNet takes its sizes only; the official code ignores every other entry."""
    width, layers = options.take("width", 64), options.take("layers")
    if len(layers) != 4:
        raise options.refuse("layers", layers)
    heads = width * 32 // options.take("head_width", 64)
    image = ImageInput(_square(options, "image_size", 224), resize="center")
    options.left.clear()
    return ResNetConfig(image, (layers[0], layers[1], layers[2], layers[3]), width, heads)


def _timm_siglip(options: Options) -> VitConfig:
    """SigLIP's ViT-B/16 of timm: no class token, biases everywhere, attention pooling, no projection."""
    name = options.take("timm_model_name")
    if not re.fullmatch(r"vit_base_patch16_siglip_\d+", name):
        raise options.refuse("timm_model_name", name)
    options.choose("timm_pool", "avg", {"map": None})
    options.choose("timm_proj", "linear", {"none": None})
    half = (0.5, 0.5, 0.5)
    return VitConfig(image=ImageInput(_square(options, "image_size", 224), half, half), class_token=False)


def _text(options: Options, quick: Activation) -> TextConfig:
    causal = not options.take("no_causal_mask", False)
    pool = options.choose("pool_type", "argmax", {p: p for p in ("argmax", "eos", "first", "last")})
    linear = "bias" if options.take("proj_bias", False) else "linear"
    return TextConfig(
        width=options.take("width", 512),
        depth=options.take("layers", 12),
        heads=options.take("heads", 8),
        mlp_ratio=options.take("mlp_ratio", 4.0),
        norm_eps=norm_eps(options),
        activation=activation(options, quick),
        layer_scale=options.take("ls_init_value"),
        causal=causal,
        pool="end" if pool in ("argmax", "eos") else pool,
        padded=pool == "last" or not causal,
        pad_id=options.take("pad_id", 0),
        projection=options.choose("proj_type", "linear", {"linear": linear, "none": "none"}),
    )


def _square(options: Options, key: str, default: int) -> int:
    value = options.take(key, default)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise options.refuse(key, value)
    return int(sides.pop())


def norm_eps(options: Options) -> float:
    """Epsilon of all layer norms."""
    given = dict(options.take("norm_kwargs", {}))
    eps = float(given.pop("eps", 1e-5))
    if given:
        raise options.refuse("norm_kwargs", given)
    return eps


def activation(options: Options, quick: Activation) -> Activation:
    """The activation of the feed-forwards: ``quick`` (of the whole model), unless the tower has GELU's tanh form."""
    given = options.take("act_kwargs", {})
    if not given:
        return quick
    if given not in ({"approximate": "tanh"}, {"approximate": "none"}) or quick != "gelu":
        raise options.refuse("act_kwargs", given)
    return "gelu_tanh" if given["approximate"] == "tanh" else "gelu"


def table(config: ClipConfig, custom_text: bool) -> Table:
    """The correspondence for a model of ``config``; ``custom_text``: the text tower's names begin with ``text.``"""
    scalars = Table(Rule("logit_scale", "logit_scale"), Rule("logit_bias", "logit_bias"))
    prefix = "text." if custom_text else ""
    linear = Table(Rule("text.text_projection.{leaf}", "text_proj.{leaf}"))  # with a bias it is an nn.Linear there
    text = linear + text_rules(prefix) if config.text.projection == "bias" else text_rules(prefix)
    if isinstance(config.vision, ResNetConfig):
        return scalars + text + resnet_rules()
    if config.pool == "map":
        return scalars + text + _TRUNK
    assert isinstance(config.vision, VitConfig)
    return scalars + text + vit_rules("vision.norm" if config.vision.norm_after else "image_norm")


_ROW = Transform(lambda x: x[0, 0], lambda x: x[None, None])
_TABLE = Transform(lambda x: x[0], lambda x: x[None])
_TRUNK = Table(
    Rule("visual.trunk.patch_embed.proj.{leaf}", "vision.patch_embed.{leaf}"),
    Rule("visual.trunk.pos_embed", "vision.positions", _TABLE),
    Rule("visual.trunk.blocks.{i}.attn.proj.{leaf}", "vision.blocks.{i}.attn.out.{leaf}"),
    Rule("visual.trunk.blocks.{i}.{part}.{leaf}", "vision.blocks.{i}.{part}.{leaf}"),
    Rule("visual.trunk.blocks.{i}.{part}.{layer}.{leaf}", "vision.blocks.{i}.{part}.{layer}.{leaf}"),
    Rule("visual.trunk.norm.{leaf}", "vision.norm.{leaf}"),
    Rule("visual.trunk.attn_pool.latent", "image_pool.latent", _ROW),
    Rule("visual.trunk.attn_pool.proj.{leaf}", "image_pool.out.{leaf}"),
    Rule("visual.trunk.attn_pool.{part}.{leaf}", "image_pool.{part}.{leaf}"),
    Rule("visual.trunk.attn_pool.mlp.{layer}.{leaf}", "image_pool.mlp.{layer}.{leaf}"),
)


def convert(official: Mapping[str, Tensor], config: ClipConfig) -> Converted:
    """Our state dict from the official one, which must hold exactly the model of ``config``.

    Positions of another picture size or text length are resampled as open_clip does: the grid bicubic with
    antialias (class token kept), the text linearly. The report names them.
    """
    weights, target, resampled = dict(official), skeleton(config), {}
    custom_text = "text.positional_embedding" in official
    text_positions = "text.positional_embedding" if custom_text else "positional_embedding"
    if text_positions in weights:
        weights[text_positions] = resize_line(weights[text_positions], config.max_length)
    if isinstance(config.vision, VitConfig):
        side = config.vision.image.size // config.vision.patch
        for name, batched in (("visual.positional_embedding", False), ("visual.trunk.pos_embed", True)):
            if name in weights:
                grid = weights[name][0] if batched else weights[name]
                grid = resize_grid(grid, (side, side), prefix=int(config.vision.class_token), antialias=True)
                weights[name] = grid[None] if batched else grid
    for name, value in weights.items():
        if value.shape != official[name].shape:
            resampled[name] = f"resampled from {tuple(official[name].shape)} to {tuple(value.shape)}"
    converted = table(config, custom_text).convert(weights, target)
    return Converted(converted.state, converted.report | resampled)
