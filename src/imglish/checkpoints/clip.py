"""The models of openai/CLIP: their state dict and their constructor's arguments, to ours and back.

Official names: ``visual.*`` the image tower, everything else the text tower. Matrices that they multiply from the
right (``visual.proj``, ``text_projection``) are transposed. Texts are padded with 0 there and read at the largest
id; here a text ends at its end token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from imglish.checkpoints.drawing import undrawn
from imglish.checkpoints.rules import TRANSPOSE, Converted, Drop, Rule, Table
from imglish.checkpoints.sizes import count, heads
from imglish.models.clip import ClipConfig, ResNetConfig, clip_vit
from imglish.models.coca import CocaConfig
from imglish.models.text_towers import TextConfig
from imglish.models.vit import ImageInput, VitConfig
from imglish.nn.resnet import STRIDE


def transformer_rules(official: str, ours: str) -> Table:
    """Residual blocks of ``official``, which are ``ours`` (with ``{i}``) here; LayerScale where open_clip has it."""
    theirs, mine = f"{official}resblocks.{{i}}.", ours
    return Table(
        Rule(theirs + "attn.in_proj_{leaf}", mine + "attn.qkv.{leaf}"),
        Rule(theirs + "attn.out_proj.{leaf}", mine + "attn.out.{leaf}"),
        Rule(theirs + "ln_{n}.{leaf}", mine + "norm{n}.{leaf}"),
        Rule(theirs + "ls_{n}.gamma", mine + "scale{n}.gamma"),
        Rule(theirs + "mlp.c_fc.{leaf}", mine + "mlp.fc1.{leaf}"),
        Rule(theirs + "mlp.c_proj.{leaf}", mine + "mlp.fc2.{leaf}"),
    )


def vit_rules(norm: str = "vision.norm") -> Table:
    """The image tower with a Transformer; ``norm``: where its last LayerNorm lies in our model."""
    return transformer_rules("visual.transformer.", "vision.blocks.{i}.") + Table(
        Rule("visual.class_embedding", "vision.class_token"),
        Rule("visual.positional_embedding", "vision.positions"),
        Rule("visual.conv1.weight", "vision.patch_embed.weight"),
        Rule("visual.ln_pre.{leaf}", "vision.norm_before.{leaf}"),
        Rule("visual.ln_post.{leaf}", norm + ".{leaf}"),
        Rule("visual.proj", "image_proj.weight", TRANSPOSE),
    )


def resnet_rules(stages: int = 4) -> Table:
    """The image tower with a ResNet: stem (convolution, norm, ReLU three times), stages, attention pooling."""
    rules = [Rule(f"visual.conv{i + 1}.weight", f"vision.stem.{3 * i}.weight") for i in range(3)]
    rules += [Rule(f"visual.bn{i + 1}.{{leaf}}", f"vision.stem.{3 * i + 1}.{{leaf}}") for i in range(3)]
    for stage in range(stages):
        theirs, ours = f"visual.layer{stage + 1}.{{i}}.", f"vision.stages.{stage}.{{i}}."
        rules += [
            Rule(theirs + "downsample.0.weight", ours + "shortcut.1.weight"),
            Rule(theirs + "downsample.1.{leaf}", ours + "shortcut.2.{leaf}"),
            Rule(theirs + "{convolution}.{leaf}", ours + "{convolution}.{leaf}"),
        ]
    pool, key_value = "visual.attnpool.", ("visual.attnpool.k_proj.{leaf}", "visual.attnpool.v_proj.{leaf}")
    return Table(
        *rules,
        Rule(pool + "positional_embedding", "vision.pool.positions"),
        Rule(pool + "q_proj.{leaf}", "vision.pool.q.{leaf}"),
        Rule(key_value, "vision.pool.kv.{leaf}"),
        Rule(pool + "c_proj.{leaf}", "vision.pool.out.{leaf}"),
    )


def text_rules(prefix: str = "") -> Table:
    """The text tower; open_clip's models with a tower of their own put ``text.`` in front."""
    return transformer_rules(f"{prefix}transformer.", "text.blocks.{i}.") + Table(
        Rule(f"{prefix}token_embedding.weight", "text.words.weight"),
        Rule(f"{prefix}positional_embedding", "text.positions"),
        Rule(f"{prefix}ln_final.{{leaf}}", "text.norm.{leaf}"),
        Rule(f"{prefix}text_projection", "text_proj.weight", TRANSPOSE),
    )


_ARCHIVED = ("input_resolution", "context_length", "vocab_size")


def table(config: ClipConfig) -> Table:
    """The correspondence for a model of ``config``."""
    sizes = "a size that the configuration holds; archived beside the weights"
    archived = [Drop(name, sizes) for name in _ARCHIVED]
    image = resnet_rules() if isinstance(config.vision, ResNetConfig) else vit_rules()
    return Table(Rule("logit_scale", "logit_scale"), *archived) + image + text_rules()


def convert(official: Mapping[str, Tensor], config: ClipConfig) -> Converted:
    """Our state dict from the official one (any floating dtype), which must hold exactly the model of ``config``."""
    return table(config).convert(official, skeleton(config))


def convert_released(official: Mapping[str, Tensor], config: ClipConfig) -> Converted:
    """Like :func:`convert`. Models of open_clip have the same names and most have another activation: where nothing
    shows that the weights are openai's, the report says what they are taken for."""
    converted = convert(official, config)
    if all(name in official for name in _ARCHIVED):
        return converted
    taken = "taken for openai's, with its QuickGELU; a model of open_clip needs open_clip_config.json beside it"
    return Converted(converted.state, converted.report | {"transformer": taken})


def skeleton(config: ClipConfig | CocaConfig) -> dict[str, Tensor]:
    """Names, shapes and dtypes of our state dict, without memory."""
    with undrawn():
        return config.build().state_dict()


def config_from_arguments(arguments: Mapping[str, Any]) -> ClipConfig:
    """Our configuration from the arguments of the official constructor (``clip/model.py``, class ``CLIP``)."""
    given = dict(arguments)
    size, width, layers = (given.pop(name) for name in ("image_resolution", "vision_width", "vision_layers"))
    patch = given.pop("vision_patch_size", None)
    vision: VitConfig | ResNetConfig
    if isinstance(layers, Sequence):
        vision = ResNetConfig(ImageInput(size, resize="center"), _four(layers), width, heads=width * 32 // 64)
    else:
        vision = clip_vit(size, patch, width, layers, heads=heads(width, "visual"))
    text = TextConfig(*(given.pop(f"transformer_{name}") for name in ("width", "layers", "heads")))
    sizes = {ours: given.pop(theirs) for ours, theirs in _SIZES.items()}
    if given:
        raise ValueError(f"unknown arguments of an official CLIP: {sorted(given)}")
    return ClipConfig(vision, text, **sizes)


_SIZES = {"vocab_size": "vocab_size", "max_length": "context_length", "embed_dim": "embed_dim"}


def config_from_weights(official: Mapping[str, Tensor]) -> ClipConfig:
    """Our configuration from the shapes of an official state dict; heads are 64 wide in all published models."""
    if "visual.proj" in official:
        width, _, patch, _ = official["visual.conv1.weight"].shape
        grid = math.isqrt(official["visual.positional_embedding"].shape[0] - 1)
        vision: dict[str, Any] = {"vision_width": width, "vision_patch_size": patch, "image_resolution": grid * patch}
        vision["vision_layers"] = count(official, r"visual\.transformer\.resblocks\.(\d+)\.")
    elif "visual.attnpool.positional_embedding" in official:
        cells = official["visual.attnpool.positional_embedding"].shape[0] - 1
        layers = [count(official, rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5)]
        width = official["visual.layer1.0.conv1.weight"].shape[0]
        vision = {"vision_width": width, "vision_layers": layers, "image_resolution": math.isqrt(cells) * STRIDE}
    else:
        raise ValueError("not a state dict of openai/CLIP: neither visual.proj nor visual.attnpool is in it")
    text_width, embed_dim = official["text_projection"].shape
    return config_from_arguments(
        {
            **vision,
            "embed_dim": embed_dim,
            "context_length": official["positional_embedding"].shape[0],
            "vocab_size": official["token_embedding.weight"].shape[0],
            "transformer_width": text_width,
            "transformer_heads": heads(text_width, "transformer"),
            "transformer_layers": count(official, r"transformer\.resblocks\.(\d+)\."),
        }
    )


def _four(layers: Sequence[int]) -> tuple[int, int, int, int]:
    if len(layers) != 4:
        raise ValueError(f"a modified ResNet has four stages, not {len(layers)}")
    return layers[0], layers[1], layers[2], layers[3]
