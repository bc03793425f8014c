"""What kinds of released checkpoints there are: how each is recognised, and who converts it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from imglish.checkpoints import (
    albef,
    albef_tasks,
    beit,
    beit3,
    blip,
    blip_tasks,
    clip,
    coca,
    hf_beit,
    hf_blip,
    hf_clip,
    hf_siglip,
    hf_vilt,
    open_clip,
    sizes,
    vilt,
    vlmo,
)
from imglish.checkpoints.rules import Converted
from imglish.data.tasks import entailment, nlvr2
from imglish.models.heads import HeadConfig

Layout = Literal["file", "transformers", "open_clip"]


@dataclass(frozen=True)
class Source:
    """What lies on the disk. settings: the JSON beside the weights, None for a file alone; classes: names of a task's
    answers in the order of the head, where they are known; beside: what else the record of a training holds."""

    path: Path
    layout: Layout
    weights: Mapping[str, Tensor]
    settings: Mapping[str, Any] | None = None
    classes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint.

    marks: patterns, for each of which the weights have a name, and never: one that they have no name for; config: ours,
    from sizes or settings; convert: weights, names and shapes of our model (or of what a task model has within), its
    configuration -> ours; head: of a task model; closing: its texts end with [SEP]; special: tokens that the family
    adds to its tokenizer; score_rule: how its authors rank pairs; model_type: in the settings of transformers, where
    other models have the same names; end: number of the token that ends a text, by the settings; clean:
    what is done to a text before it is cut into tokens, by the settings.
    """

    title: str
    layout: Layout
    marks: tuple[str, ...]
    config: Callable[[Source], Any]
    convert: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Any], Converted]
    score_rule: str
    closing: bool = True
    special: tuple[str, ...] = ()
    never: str | None = None
    head: Callable[[Source], HeadConfig] | None = None
    model_type: str | None = None
    end: Callable[[Source], int | None] | None = None
    clean: Callable[[Source], str | None] | None = None

    def lacks(self, source: Source) -> list[str]:
        """What keeps the source from being of this kind, in words."""
        lacking = [f"no name like {_shown(mark)}" for mark in self.marks if not _some(source, mark)]
        said = (source.settings or {}).get("model_type", self.model_type)
        if self.model_type is not None and said != self.model_type:
            lacking.append(f"model_type {said!r}, not {self.model_type!r}")
        return lacking + ([f"a name like {_shown(self.never)}"] if self.never and _some(source, self.never) else [])


def _some(source: Source, pattern: str) -> bool:
    return any(re.match(pattern, name) for name in source.weights)


def _shown(pattern: str) -> str:
    return pattern.replace("\\", "").removesuffix("$")


def _json(source: Source) -> Mapping[str, Any]:
    assert source.settings is not None
    return source.settings


def _open_clip_model(source: Source) -> Mapping[str, Any]:
    given = _json(source)
    model: Mapping[str, Any] = given.get("model_cfg", given)
    return model


def _answers(last: str) -> Callable[[Source], HeadConfig]:
    """Questions with one of many answers, of which several may be right; last: weight of the head's last layer."""

    def head(source: Source) -> HeadConfig:
        return HeadConfig("vqa", classes=_named(source, len(source.weights[last])), soft=True)

    return head


def _shows(last: str) -> Callable[[Source], HeadConfig]:
    """Classes of pictures alone; last: weight of the head's last layer."""

    def head(source: Source) -> HeadConfig:
        names = _named(source, len(source.weights[last]))
        often = {name for name, times in Counter(names).items() if times > 1}  # ImageNet has two cranes
        classes = (f"{name} ({number})" if name in often else name for number, name in enumerate(names))
        return HeadConfig("classification", classes=tuple(classes), texts=False)

    return head


def _pairs(_: Source) -> HeadConfig:
    return HeadConfig("nlvr2", classes=nlvr2.CLASSES, pictures=2)


def _entails(_: Source) -> HeadConfig:
    return HeadConfig("entailment", classes=entailment.CLASSES)


def _writes(source: Source) -> HeadConfig:
    """Answers that are written; the candidates to choose among are no part of the weights."""
    return HeadConfig("vqa", "answers", _names(source) or ("yes", "no"))


def _names(source: Source) -> tuple[str, ...]:
    """Names of the answers: given, or of the settings beside the weights, or none."""
    labels = (source.settings or {}).get("id2label") or {}
    return source.classes or tuple(labels[str(number)] for number in range(len(labels)))


def _named(source: Source, count: int) -> tuple[str, ...]:
    """Names of ``count`` answers, their numbers where they have none."""
    names = _names(source)
    if not names:
        return tuple(str(number) for number in range(count))
    if len(names) != count:
        raise ValueError(f"the head has {count} answers, {len(names)} names are given for them")
    return names


_GROUNDED = r"text_(en|de)coder\.(bert\.)?encoder\.layer\.0\.crossattention\."  # BLIP looks from the first layer on
_EXPERTS = (
    r"transformer\.blocks\.0\.mlp_imag\.",
    r"transformer\.blocks\.0\.mlp_text\.",
    r"text_embeddings\.",
    r"token_type_embeddings\.",
    r"transformer\.norm\.",
)
_VILT = (r"transformer\.blocks\.", r"text_embeddings\.", r"token_type_embeddings\.", r"pooler\.dense\.")
_BEIT3 = (r"beit3\.text_embed\.", r"beit3\.vision_embed\.")
_HF_BLIP = r"vision_model\.encoder\.layers\.0\.self_attn\.qkv\."
_HF_VILT = (r"(vilt\.)?embeddings\.text_embeddings\.", r"(vilt\.)?encoder\.layer\.0\.layernorm_before\.")

FORMATS: dict[str, Format] = {
    "albef": Format(
        "ALBEF as released",
        "file",
        (r"visual_encoder\.", r"text_encoder\.", r"vision_proj\.", r"itm_head\."),
        lambda s: sizes.albef_config(s.weights),
        albef.convert,
        "itm",
        closing=False,
        never=_GROUNDED,
    ),
    "albef-task": Format(
        "ALBEF as released, for visual entailment or NLVR2",
        "file",
        (r"visual_encoder\.", r"text_encoder\.encoder\.", r"cls_head\.2\."),
        lambda s: sizes.albef_config(s.weights, albef_tasks.pictures(s.weights)),
        lambda theirs, target, config: albef_tasks.convert(theirs, target, config, albef_tasks.pictures(theirs)),
        "itm",
        closing=False,
        never=_GROUNDED,
        head=lambda s: _pairs(s) if albef_tasks.pictures(s.weights) == 2 else _entails(s),
    ),
    "albef-vqa": Format(
        "ALBEF as released, for VQA",
        "file",
        (r"visual_encoder\.", r"text_encoder\.encoder\.", r"text_decoder\.bert\."),
        lambda s: sizes.albef_config(s.weights),
        lambda theirs, target, config: albef_tasks.vqa_table(config).convert(theirs, target),
        "itm",
        closing=False,
        never=r"vision_proj\.|text_encoder\.encoder\.layer\.0\.crossattention\.",
        head=_writes,
    ),
    "blip": Format(
        "BLIP as released",
        "file",
        (r"visual_encoder\.", _GROUNDED),
        lambda s: sizes.blip_config(s.weights),
        blip.convert,
        "itm+itc",
        special=("[DEC]", "[ENC]"),
        never=r"cls_head\.",
    ),
    "blip-vqa": Format(
        "BLIP as released, for VQA",
        "file",
        (r"visual_encoder\.", r"text_encoder\.encoder\.layer\.0\.crossattention\.", r"text_decoder\.bert\."),
        lambda s: sizes.blip_config(s.weights),
        lambda theirs, target, config: blip_tasks.vqa_table(config).convert(theirs, target),
        "itm+itc",
        special=("[DEC]", "[ENC]"),
        never=r"vision_proj\.",
        head=_writes,
    ),
    "blip-nlvr2": Format(
        "BLIP as released, for NLVR2",
        "file",
        (r"visual_encoder\.", r"text_encoder\.encoder\.layer\.0\.crossattention\.self1\.", r"cls_head\."),
        lambda s: sizes.blip_config(s.weights),
        lambda theirs, target, config: blip_tasks.convert_reasoning(theirs, target, config, config.depth // 2),
        "itm+itc",
        special=("[DEC]", "[ENC]"),
        head=_pairs,
    ),
    "vilt": Format(
        "ViLT as released (Lightning), of pre-training or retrieval",
        "file",
        _VILT,
        lambda s: sizes.vilt_config(s.weights),
        lambda theirs, target, _: vilt.convert_ranking(theirs, target),
        "itm",
        never=r"(vqa|nlvr2)_classifier\.",
    ),
    "vilt-vqa": Format(
        "ViLT as released, for VQA",
        "file",
        (*_VILT, r"vqa_classifier\.3\."),
        lambda s: sizes.vilt_config(s.weights),
        lambda theirs, target, _: vilt.convert(theirs, target),
        "itm",
        head=_answers("vqa_classifier.3.weight"),
    ),
    "vilt-nlvr2": Format(
        "ViLT as released, for NLVR2",
        "file",
        (*_VILT, r"nlvr2_classifier\.3\."),
        lambda s: sizes.vilt_config(s.weights),
        lambda theirs, target, _: vilt.convert(theirs, target),
        "itm",
        head=_pairs,
    ),
    "vlmo": Format(
        "VLMo as released, of pre-training",
        "file",
        (*_EXPERTS, r"itm_score\."),
        lambda s: sizes.vlmo_config(s.weights),
        vlmo.convert,
        "itm",
    ),
    "vlmo-towers": Format(
        "VLMo as released, of retrieval or of the text stage",
        "file",
        _EXPERTS,
        lambda s: sizes.vlmo_config(s.weights),
        vlmo.convert,
        "itc",
        never=r"itm_score\.|(vqa|nlvr2)_classifier\.",
    ),
    "vlmo-vqa": Format(
        "VLMo as released, for VQA",
        "file",
        (*_EXPERTS, r"vqa_classifier\.3\."),
        lambda s: sizes.vlmo_config(s.weights),
        lambda theirs, target, config: vlmo.convert_task(theirs, target, config, "vqa_classifier"),
        "itc",
        head=_answers("vqa_classifier.3.weight"),
    ),
    "vlmo-nlvr2": Format(
        "VLMo as released, for NLVR2",
        "file",
        (*_EXPERTS, r"nlvr2_classifier\.3\."),
        lambda s: sizes.vlmo_config(s.weights),
        lambda theirs, target, config: vlmo.convert_task(theirs, target, config, "nlvr2_classifier"),
        "itc",
        head=_pairs,
    ),
    "beit": Format(
        "BEiT or BEiT-2 as released, of masked image modelling",
        "file",
        (r"cls_token$", r"rel_pos_bias\.relative_position_bias_table$", r"blocks\.0\.attn\.q_bias$", r"lm_head\."),
        lambda s: sizes.beit_config(s.weights),
        lambda theirs, target, _: beit.convert(theirs, target),
        "itc",
    ),
    "beit-classes": Format(
        "BEiT or BEiT-2 as released, fine-tuned for ImageNet",
        "file",
        (r"cls_token$", r"blocks\.0\.attn\.relative_position_bias_table$", r"fc_norm\.", r"head\.weight$"),
        lambda s: sizes.beit_classifier_config(s.weights),
        lambda theirs, target, _: beit.classifier_table().convert(theirs, target),
        "itc",
        head=_shows("head.weight"),
    ),
    "beit3": Format(
        "BEiT-3 as released, of pre-training, retrieval or captioning",
        "file",
        (*_BEIT3, r"beit3\.encoder\.layer_norm\."),
        lambda s: sizes.beit3_config(s.weights),
        lambda theirs, target, _: beit3.convert(theirs, target),
        "itc",
        never=r"head\.",
    ),
    "beit3-vqa": Format(
        "BEiT-3 as released, for VQA",
        "file",
        (*_BEIT3, r"pooler\.norm\.", r"head\.3\."),
        lambda s: sizes.beit3_config(s.weights),
        lambda theirs, target, _: beit3.vqa_table().convert(theirs, target),
        "itc",
        head=_answers("head.3.weight"),
    ),
    "beit3-nlvr2": Format(
        "BEiT-3 as released, for NLVR2",
        "file",
        (*_BEIT3, r"head\.dense1\.", r"head\.dense2\."),
        lambda s: sizes.beit3_config(s.weights),
        lambda theirs, target, _: beit3.nlvr2_table().convert(theirs, target),
        "itc",
        head=_pairs,
    ),
    "beit3-classes": Format(
        "BEiT-3 as released, fine-tuned for ImageNet",
        "file",
        (*_BEIT3, r"fc_norm\.", r"head\.weight$"),
        lambda s: sizes.beit3_classifier_config(s.weights),
        lambda theirs, target, _: beit3.imagenet_table().convert(theirs, target),
        "itc",
        head=_shows("head.weight"),
    ),
    "clip": Format(
        "CLIP as released (openai)",
        "file",
        (r"visual\.(conv1|layer1)", r"positional_embedding$", r"token_embedding\.", r"transformer\.resblocks\."),
        lambda s: clip.config_from_weights(s.weights),
        lambda theirs, _, config: clip.convert_released(theirs, config),
        "itc",
    ),
    "hf-clip": Format(
        "CLIP of transformers",
        "transformers",
        (r"visual_projection\.", r"text_projection\.", r"text_model\.encoder\.layers\."),
        lambda s: hf_clip.config_from_json(_json(s)),
        lambda theirs, _, config: hf_clip.convert(theirs, config),
        "itc",
        model_type="clip",
        end=lambda s: hf_clip.closing(_json(s)),
    ),
    "hf-chinese-clip": Format(
        "Chinese-CLIP of transformers",
        "transformers",
        (r"vision_model\.pre_layrnorm\.", r"text_projection\.", r"text_model\.encoder\.layer\.0\."),
        lambda s: hf_clip.chinese_from_json(_json(s)),
        lambda theirs, _, config: hf_clip.convert(theirs, config),
        "itc",
        model_type="chinese_clip",
    ),
    "hf-siglip": Format(
        "SigLIP of transformers",
        "transformers",
        (r"vision_model\.head\.probe$", r"text_model\.head\.", r"logit_bias$"),
        lambda s: hf_siglip.config_from_json(_json(s)),
        lambda theirs, _, config: hf_siglip.convert(theirs, config),
        "itc",
        model_type="siglip",
    ),
    "hf-blip": Format(
        "BLIP of transformers",
        "transformers",
        (_HF_BLIP, r"text_(en|de)coder\."),
        lambda s: hf_blip.config_from_json(_json(s)),
        hf_blip.convert,
        "itm",
        special=("[DEC]", "[ENC]"),
        model_type="blip",
        end=lambda s: hf_blip.closing(_json(s)) if _some(s, r"text_decoder\.") else None,
    ),
    "hf-blip-vqa": Format(
        "BLIP of transformers, for VQA",
        "transformers",
        (_HF_BLIP, r"text_encoder\.", r"text_decoder\."),
        lambda s: hf_blip.config_from_json(_json(s)),
        lambda theirs, target, config: hf_blip.vqa_table(config).convert(theirs, target),
        "itm",
        special=("[DEC]", "[ENC]"),
        head=_writes,
        model_type="blip",
        end=lambda s: hf_blip.closing(_json(s)),
    ),
    "hf-blip-backbone": Format(
        "BLIP of transformers without heads",
        "transformers",
        (_HF_BLIP, r"text_model\.encoder\.layer\.0\.crossattention\."),
        lambda s: hf_blip.config_from_json(_json(s)),
        hf_blip.convert_backbone,
        "itm",
        special=("[DEC]", "[ENC]"),
        model_type="blip",
    ),
    "hf-vilt": Format(
        "ViLT of transformers",
        "transformers",
        _HF_VILT,
        lambda s: hf_vilt.config_from_json(_json(s), s.weights),
        lambda theirs, target, _: hf_vilt.convert(theirs, target),
        "itm",
        never=r"classifier\.",
        model_type="vilt",
    ),
    "hf-vilt-task": Format(
        "ViLT of transformers, for VQA or NLVR2",
        "transformers",
        (*_HF_VILT, r"classifier\.3\."),
        lambda s: hf_vilt.config_from_json(_json(s), s.weights),
        lambda theirs, target, _: hf_vilt.convert(theirs, target),
        "itm",
        head=lambda s: _pairs(s) if hf_vilt.pictures(s.weights) == 2 else _answers("classifier.3.weight")(s),
        model_type="vilt",
    ),
    "hf-beit": Format(
        "BEiT or BEiT-2 of transformers, of masked image modelling",
        "transformers",
        (r"beit\.embeddings\.cls_token$", r"lm_head\."),
        lambda s: hf_beit.config_from_json(_json(s)),
        lambda theirs, target, _: hf_beit.table().convert(theirs, target),
        "itc",
        model_type="beit",
    ),
    "hf-beit-classes": Format(
        "BEiT or BEiT-2 of transformers, fine-tuned for ImageNet",
        "transformers",
        (r"beit\.embeddings\.cls_token$", r"beit\.pooler\.layernorm\.", r"classifier\.weight$"),
        lambda s: hf_beit.config_from_json(_json(s)),
        lambda theirs, target, _: hf_beit.classifier_table().convert(theirs, target),
        "itc",
        head=_shows("classifier.weight"),
        model_type="beit",
    ),
    "open_clip-coca": Format(
        "CoCa of open_clip",
        "open_clip",
        (r"text_decoder\.", r"visual\.attn_pool\.", r"logit_scale$"),
        lambda s: coca.config_from_json(_open_clip_model(s)),
        lambda theirs, _, config: coca.convert(theirs, config),
        "itc",
        clean=lambda s: open_clip.cleaning(_open_clip_model(s)),
    ),
    "open_clip": Format(
        "CLIP or SigLIP of open_clip",
        "open_clip",
        (r"visual\.", r"logit_scale$"),
        lambda s: open_clip.config_from_json(_open_clip_model(s)),
        lambda theirs, _, config: open_clip.convert(theirs, config),
        "itc",
        clean=lambda s: open_clip.cleaning(_open_clip_model(s)),
        end=lambda s: open_clip.closing(_open_clip_model(s)),
    ),
}
