"""What kinds of released checkpoints there are: how each is recognised, and who converts it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from imglish.checkpoints import albef, beit, beit3, blip, clip, coca, hf_blip, hf_clip, open_clip, vilt, vlmo
from imglish.checkpoints.rules import Converted
from imglish.checkpoints.sizes import albef_config, beit3_config, beit_config, blip_config, vilt_config, vlmo_config
from imglish.models.vilt import ViltConfig
from imglish.models.vilt_pictures import AspectInput

Layout = Literal["file", "transformers", "open_clip"]


@dataclass(frozen=True)
class Source:
    """What lies on the disk. settings: the JSON beside the weights, None for a file alone."""

    path: Path
    layout: Layout
    weights: Mapping[str, Tensor]
    settings: Mapping[str, Any] | None = None

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint. marks: patterns, for each of which the weights have a name, and never: one that they have
    no name for; config: ours, from sizes or
    settings; convert: weights, names and shapes of our model, its configuration -> ours; closing: its texts end with
    [SEP]; special: tokens that the family adds to its tokenizer; score_rule: how its authors rank pairs."""

    title: str
    layout: Layout
    marks: tuple[str, ...]
    config: Callable[[Source], Any]
    convert: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Any], Converted]
    score_rule: str
    closing: bool = True
    special: tuple[str, ...] = ()
    never: str | None = None

    def lacks(self, source: Source) -> list[str]:
        """What keeps the source from being of this kind, in words."""
        lacking = [f"no name like {mark}" for mark in self.marks if not _some(source, mark)]
        return lacking + ([f"a name like {self.never}"] if self.never and _some(source, self.never) else [])


def _some(source: Source, pattern: str) -> bool:
    return any(re.match(pattern, name) for name in source.weights)


def _json(source: Source) -> Mapping[str, Any]:
    assert source.settings is not None
    return source.settings


def _open_clip_model(source: Source) -> Mapping[str, Any]:
    given = _json(source)
    model: Mapping[str, Any] = given.get("model_cfg", given)
    return model


def _vilt_of_transformers(source: Source) -> ViltConfig:
    given = _json(source)
    size, patch = given["image_size"], given["patch_size"]
    return ViltConfig(
        image=AspectInput(size, int(1333 / 800 * size), patch),
        vocab_size=given["vocab_size"],
        max_length=given["max_position_embeddings"],
        width=given["hidden_size"],
        depth=given["num_hidden_layers"],
        heads=given["num_attention_heads"],
        mlp_ratio=given["intermediate_size"] / given["hidden_size"],
        norm_eps=given["layer_norm_eps"],
        text_norm_eps=given["layer_norm_eps"],
        dropout=given["hidden_dropout_prob"],
        types=source.weights[_first(source.weights, r"(vilt\.)?embeddings\.token_type_embeddings")].shape[0],
    )


def _first(names: Mapping[str, Any], pattern: str) -> str:
    return next(name for name in names if re.match(pattern, name))


_GROUNDED = r"text_(en|de)coder\.(bert\.)?encoder\.layer\.0\.crossattention\."  # BLIP looks from the first layer on
_EXPERTS = (
    r"transformer\.blocks\.0\.mlp_imag\.",
    r"transformer\.blocks\.0\.mlp_text\.",
    r"text_embeddings\.",
    r"token_type_embeddings\.",
    r"transformer\.norm\.",
)

FORMATS: dict[str, Format] = {
    "albef": Format(
        "ALBEF as released",
        "file",
        (r"visual_encoder\.", r"text_encoder\.", r"vision_proj\.", r"itm_head\."),
        lambda s: albef_config(s.weights),
        albef.convert,
        "itm",
        closing=False,
        never=_GROUNDED,
    ),
    "blip": Format(
        "BLIP as released",
        "file",
        (r"visual_encoder\.", _GROUNDED),
        lambda s: blip_config(s.weights),
        blip.convert,
        "itm+itc",
        special=("[DEC]", "[ENC]"),
    ),
    "vilt": Format(
        "ViLT as released (Lightning)",
        "file",
        (r"transformer\.blocks\.", r"text_embeddings\.", r"token_type_embeddings\.", r"pooler\.dense\."),
        lambda s: vilt_config(s.weights),
        lambda theirs, target, _: vilt.convert(theirs, target),
        "itm",
    ),
    "vlmo": Format(
        "VLMo as released, of pre-training",
        "file",
        (*_EXPERTS, r"itm_score\."),
        lambda s: vlmo_config(s.weights),
        vlmo.convert,
        "itm",
    ),
    "vlmo-towers": Format(
        "VLMo as released, of retrieval or of the text stage",
        "file",
        _EXPERTS,
        lambda s: vlmo_config(s.weights),
        vlmo.convert,
        "itc",
        never=r"itm_score\.",
    ),
    "beit": Format(
        "BEiT or BEiT-2 as released, of masked image modelling",
        "file",
        (r"cls_token$", r"rel_pos_bias\.relative_position_bias_table$", r"blocks\.0\.attn\.q_bias$", r"lm_head\."),
        lambda s: beit_config(s.weights),
        lambda theirs, target, _: beit.convert(theirs, target),
        "itc",
    ),
    "beit3": Format(
        "BEiT-3 as released, of pre-training, retrieval or captioning",
        "file",
        (r"beit3\.text_embed\.", r"beit3\.vision_embed\.", r"beit3\.encoder\.layer_norm\."),
        lambda s: beit3_config(s.weights),
        lambda theirs, target, _: beit3.convert(theirs, target),
        "itc",
        never=r"head\.",
    ),
    "clip": Format(
        "CLIP as released (openai)",
        "file",
        (r"visual\.(conv1|layer1)", r"positional_embedding$", r"token_embedding\.", r"transformer\.resblocks\."),
        lambda s: clip.config_from_weights(s.weights),
        lambda theirs, _, config: clip.convert(theirs, config),
        "itc",
    ),
    "hf-clip": Format(
        "CLIP of transformers",
        "transformers",
        (r"visual_projection\.", r"text_projection\.", r"text_model\.encoder\."),
        lambda s: hf_clip.config_from_json(_json(s)),
        lambda theirs, _, config: hf_clip.convert(theirs, config),
        "itc",
    ),
    "hf-blip": Format(
        "BLIP of transformers",
        "transformers",
        (r"vision_model\.encoder\.layers\.0\.self_attn\.qkv\.", r"text_(en|de)coder\."),
        lambda s: hf_blip.config_from_json(_json(s)),
        hf_blip.convert,
        "itm",
        special=("[DEC]", "[ENC]"),
    ),
    "hf-vilt": Format(
        "ViLT of transformers",
        "transformers",
        (r"(vilt\.)?embeddings\.text_embeddings\.", r"(vilt\.)?encoder\.layer\.0\.layernorm_before\."),
        _vilt_of_transformers,
        lambda theirs, target, _: vilt.convert_transformers(theirs, target),
        "itm",
    ),
    "open_clip-coca": Format(
        "CoCa of open_clip",
        "open_clip",
        (r"text_decoder\.", r"visual\.attn_pool\.", r"logit_scale$"),
        lambda s: coca.config_from_json(_open_clip_model(s)),
        lambda theirs, _, config: coca.convert(theirs, config),
        "itc",
    ),
    "open_clip": Format(
        "CLIP or SigLIP of open_clip",
        "open_clip",
        (r"visual\.", r"logit_scale$"),
        lambda s: open_clip.config_from_json(_open_clip_model(s)),
        lambda theirs, _, config: open_clip.convert(theirs, config),
        "itc",
    ),
}
