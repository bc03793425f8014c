"""Checkpoints of others, recognised by what lies there, read safely and turned into ours with an account of every name.

A file of weights (``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.safetensors``, TorchScript) as the papers' authors release
them, a folder of Hugging Face transformers (``config.json``), or a folder of open_clip (``open_clip_config.json``).
:data:`FORMATS` is the table of what is known; each line says how it is recognised and who converts it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imglish.checkpoints import albef, blip, clip, coca, hf_blip, hf_clip, open_clip, vilt, vlmo
from imglish.checkpoints.files import WeightFileError, read_weights
from imglish.checkpoints.native import CheckpointError, Loaded
from imglish.checkpoints.rules import ConversionError, Converted
from imglish.checkpoints.sizes import albef_config, blip_config, vilt_config, vlmo_config
from imglish.data.tokenizers import Tokenizer, TokenizerError
from imglish.models import registry
from imglish.models.vilt import ViltConfig
from imglish.models.vilt_pictures import AspectInput

Layout = Literal["file", "transformers", "open_clip"]
WEIGHT_NAMES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
SETTINGS: tuple[tuple[str, Layout], ...] = (("open_clip_config.json", "open_clip"), ("config.json", "transformers"))
TOKENIZERS = ("tokenizer.json", "vocab.txt", "bpe_simple_vocab_16e6.txt.gz")


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


def load_foreign(path: str | Path, tokenizer: str | Path | None = None) -> Loaded:
    """The model at ``path``, converted; ``meta`` says from what, and name by name what was left out or is new.

    tokenizer: its file (``vocab.txt``, ``tokenizer.json``, CLIP's merges), where none lies beside the weights. Raises
    :class:`CheckpointError`, which names the file, what it resembles and the first names that do not fit.
    """
    source = read_source(Path(path))
    name, form = recognise(source)
    try:
        config = form.config(source)
        config = registry.from_dict(config.family, registry.to_dict(config))  # numbers of the declared types
        with torch.device("meta"):
            model: nn.Module = config.build()
        converted = form.convert(source.weights, model.state_dict(), config)
    except (ConversionError, ValueError, TypeError, KeyError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{source.path} looks like {form.title}, but does not fit: {what}") from error
    model.load_state_dict(_with_fresh(converted.state, config), assign=True)
    words = _tokenizer(source, form, config, tokenizer)
    meta = {"from": {"format": name, "name": source.path.name, "sha256": digest(source.path)}}
    return Loaded(model.eval(), words, config, form.score_rule, meta | {"conversion": converted.report})


def _with_fresh(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """``state`` in float32, with initial values for what the checkpoint lacks (the report names it)."""
    made: Mapping[str, Tensor] = {}
    if any(value.is_meta for value in state.values()):
        torch.manual_seed(0)
        made = config.build().state_dict()
    return {
        key: made[key] if value.is_meta else value.float() if value.is_floating_point() else value
        for key, value in state.items()
    }


def read_source(path: Path) -> Source:
    """Weights and settings at ``path``: a file, or a folder of transformers or open_clip."""
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        if path.is_file():
            return Source(path, "file", read_weights(path))
        for name, layout in SETTINGS:
            if (path / name).is_file():
                settings = json.loads((path / name).read_text(encoding="utf-8"))
                if not isinstance(settings, dict):
                    raise CheckpointError(f"{path / name} holds no settings")
                return Source(path, layout, _weights_of(path), settings)
    except (WeightFileError, OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    raise CheckpointError(f"{path} is no folder of a model: it has none of {', '.join(name for name, _ in SETTINGS)}")


def _weights_of(folder: Path) -> dict[str, Tensor]:
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return read_weights(folder / name)
    if parts := sorted(folder.glob("model-*-of-*.safetensors")):
        return {key: value for part in parts for key, value in read_weights(part).items()}
    raise CheckpointError(f"{folder} holds no weights: none of {', '.join(WEIGHT_NAMES)}")


def recognise(source: Source) -> tuple[str, Format]:
    """The format that the source is of; an error names the nearest one and why it is not of that."""
    lacking = {name: form.lacks(source) for name, form in FORMATS.items() if form.layout == source.layout}
    if complete := [name for name, reasons in lacking.items() if not reasons]:
        best = max(complete, key=lambda name: len(FORMATS[name].marks))
        return best, FORMATS[best]
    nearest = min(lacking, key=lambda name: len(lacking[name]) / len(FORMATS[name].marks))
    known = ", ".join(FORMATS[name].title for name in lacking)
    raise CheckpointError(
        f"{source.path} is of no known kind ({known}). Nearest is {FORMATS[nearest].title}, but it has "
        f"{'; '.join(lacking[nearest])}. Its first names: {', '.join(list(source.weights)[:6])}"
    )


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the weights in a folder, in their order."""
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".bin"))
    made = sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                made.update(chunk)
    return made.hexdigest()


def _tokenizer(source: Source, form: Format, config: Any, given: str | Path | None) -> Tokenizer:
    beside = [source.folder / name for name in TOKENIZERS if (source.folder / name).is_file()]
    file = Path(given) if given is not None else beside[0] if beside else None
    if file is None:
        raise CheckpointError(
            f"{source.path}: no tokenizer lies beside it ({', '.join(TOKENIZERS)}); name its file (tokenizer=...): "
            "BERT's vocab.txt for ALBEF, BLIP and ViLT, bpe_simple_vocab_16e6.txt.gz for CLIP and CoCa"
        )
    try:
        words = Tokenizer.load(file, max_length=config.max_length, append_sep=form.closing)
        words = words.with_special(form.special)
    except (OSError, TokenizerError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    if words.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{file} has {words.vocab_size} tokens, the model {config.vocab_size}: it is not the tokenizer of "
            f"{source.path}"
        )
    return words
