"""What a ``config.json`` of transformers leaves out: files on the hub hold only what differs from these values.

The values are those of the configuration classes (4.x and 5.x agree in them); a test compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

from imglish.nn.blocks import Activation

_BERT = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
}
_TOWER = {"num_hidden_layers": 12, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
_PATCHES = _TOWER | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224}
_SIGLIP = _TOWER | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "layer_norm_eps": 1e-6}
_SIGLIP |= {"hidden_act": "gelu_pytorch_tanh"}

DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        "projection_dim": 512,
        "logit_scale_init_value": 2.6592,
        "vision_config": _PATCHES | {"patch_size": 32},
        "text_config": _TOWER
        | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408}
        | {"max_position_embeddings": 77, "eos_token_id": 49407},
    },
    "chinese_clip": {
        "projection_dim": 512,
        "logit_scale_init_value": 2.6592,
        "vision_config": _PATCHES | {"patch_size": 32},
        "text_config": _BERT | {"vocab_size": 30522, "type_vocab_size": 2, "hidden_dropout_prob": 0.1},
    },
    "siglip": {
        "vision_config": _SIGLIP | {"image_size": 224, "patch_size": 16},
        "text_config": _SIGLIP | {"vocab_size": 32000, "max_position_embeddings": 64},
    },
    "blip": {
        "projection_dim": 512,
        "image_text_hidden_size": 256,
        "vision_config": _PATCHES | {"image_size": 384, "patch_size": 16, "hidden_act": "gelu"},
        "text_config": _BERT
        | {"vocab_size": 30524, "num_attention_heads": 8, "bos_token_id": 30522, "sep_token_id": 102}
        | {"label_smoothing": 0.0},
    },
    "vilt": _BERT
    | {"vocab_size": 30522, "max_position_embeddings": 40, "image_size": 384, "patch_size": 32}
    | {"hidden_dropout_prob": 0.0, "type_vocab_size": 2, "modality_type_vocab_size": 2, "num_images": -1}
    | {"max_image_length": -1},
    "beit": _PATCHES
    | {"patch_size": 16, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "vocab_size": 8192, "drop_path_rate": 0.1},
}
"""``model_type`` -> what its settings are where the file does not say."""


def filled(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """``given`` with the values that the file leaves out, in its towers too, and pictures and patches by their side.

    Raises ``ValueError`` for pictures or patches that are no squares.
    """
    made: dict[str, Any] = {}
    for key in {**DEFAULTS[kind], **given}:
        default, value = DEFAULTS[kind].get(key), given.get(key)
        if isinstance(default, dict):
            whole = given.get(f"{key}_dict") if kind in _WHOLE else None  # of older versions: wins, with its own gaps
            made[key] = _squares({**default, **((value if whole is None else whole) or {})})
        else:
            made[key] = default if value is None else value
    return _squares(made)


_WHOLE = ("clip", "chinese_clip")
"""Whose classes still read ``text_config_dict`` and ``vision_config_dict``, in which early versions kept the towers."""


def _squares(given: dict[str, Any]) -> dict[str, Any]:
    sides = {key: given[key] for key in ("image_size", "patch_size") if isinstance(given.get(key), list | tuple)}
    for key, value in sides.items():
        if len(set(value)) != 1:
            raise ValueError(f"{key} {list(value)} is not supported: pictures and patches are squares here")
    return given | {key: value[0] for key, value in sides.items()}


def token(given: Mapping[str, Any], key: str) -> int:
    """The number of a token. Raises ``ValueError`` where the settings name none."""
    if type(number := given[key]) is not int:
        raise ValueError(f"{key} is {number!r}: expected the number of a token")
    return number


def tower(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a Transformer with pre-norms, by our names of them."""
    sizes = stack(given)
    ratio = given["intermediate_size"] / given["hidden_size"]
    return sizes | {"mlp_ratio": ratio, "activation": activation(given["hidden_act"])}


def bert(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a BERT, by our names of them. Raises ``ValueError`` for another activation than its own."""
    plain_gelu(given)
    return stack(given) | {"hidden": given["intermediate_size"], "dropout": given["hidden_dropout_prob"]}


def stack(given: Mapping[str, Any]) -> dict[str, Any]:
    """What all of them have. Raises ``ValueError`` for sizes that are none."""
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if type(given[key]) is not int or given[key] < 1:
            raise ValueError(f"{key} is {given[key]!r}: expected a number above 0")
    if not isinstance(eps := given["layer_norm_eps"], int | float) or not 0 <= eps < 1:
        raise ValueError(f"layer_norm_eps is {eps!r}: expected a small number")
    return {
        "width": given["hidden_size"],
        "depth": given["num_hidden_layers"],
        "heads": given["num_attention_heads"],
        "norm_eps": given["layer_norm_eps"],
    }


def activation(name: str) -> Activation:
    """Ours of the name that transformers has for an activation."""
    ours = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}.get(name, name)
    if ours not in get_args(Activation):
        raise ValueError(f"hidden_act {name!r} is not supported; there are: {', '.join(get_args(Activation))}")
    return cast(Activation, ours)


def plain_gelu(given: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for another activation, where our model has this one alone."""
    if given["hidden_act"] != "gelu":
        raise ValueError(f"hidden_act {given['hidden_act']!r} is not supported, only 'gelu'")
