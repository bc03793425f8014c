"""Models of this library as folders that Hugging Face transformers reads: settings, weights, tokenizer, picture input.

The tables of the way in are read backwards. A model whose settings transformers cannot express is refused: what was
written would be another model. What their class has no place for is left out, and said.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import tokenizers
from safetensors.torch import save_file
from tokenizers import normalizers

from imglish import atomic
from imglish.checkpoints import hf_blip, hf_clip, hf_siglip, hf_vilt
from imglish.checkpoints.blip import Parts
from imglish.checkpoints.native import CheckpointError, Loaded
from imglish.checkpoints.preparing import PREPROCESSOR
from imglish.checkpoints.resizing import with_image
from imglish.checkpoints.rules import ConversionError, Table
from imglish.data.tokenizers import Tokenizer
from imglish.models.heads import TaskModel
from imglish.models.text_towers import BertConfig, TextConfig
from imglish.models.vit import VitConfig

SETTINGS, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Layout:
    """A class of transformers. settings: ``config.json`` of our configuration; again: ours of that; table: of the
    weights; inner: prefix of the weights in a task model of ours."""

    architecture: str
    settings: Callable[[Any, Tokenizer | None], dict[str, Any]]
    again: Callable[[dict[str, Any]], Any]
    table: Callable[[Any], Table]
    inner: str = ""


def export_transformers(path: str | Path, loaded: Loaded, kind: str | None = None) -> tuple[Path, dict[str, str]]:
    """Write ``loaded`` to the folder ``path`` for transformers; returns it, and name by name what was left out.

    kind: which of the classes, where there are several (:func:`kinds`). An export there is replaced as a whole. Raises
    :class:`CheckpointError` for a model that no class of transformers is.
    """
    path = Path(path)
    if path.exists() and not (path / SETTINGS).is_file():
        raise CheckpointError(f"{path} exists and is no model of transformers: choose another folder")
    layout = _layout(loaded, kind)
    config = loaded.config
    settings = layout.settings(config, loaded.words)
    _check(config, layout.again(json.loads(json.dumps(settings))), layout.architecture)
    state = {name.removeprefix(layout.inner): value for name, value in loaded.model.state_dict().items()}
    try:
        table = layout.table(config)
        weights = table.revert(state)
    except ConversionError as error:
        raise CheckpointError(f"this model is no {layout.architecture}: {error}") from error
    head = getattr(loaded.model, "head", None)
    if isinstance(loaded.model, TaskModel) and head is not None:
        settings["id2label"] = {str(number): name for number, name in enumerate(head.classes)}
        settings["label2id"] = {name: number for number, name in enumerate(head.classes)}
    with atomic.folder(path) as folder:
        save_file({name: value.detach().cpu().clone() for name, value in weights.items()}, folder / WEIGHTS, _METADATA)
        _write(folder / SETTINGS, {"architectures": [layout.architecture], "dtype": "float32"} | settings)
        _write(folder / PREPROCESSOR, _preprocessor(config.image))
        if loaded.words is not None:
            _write_tokenizer(folder, loaded.words, config)
        (folder / WEIGHTS).chmod((folder / SETTINGS).stat().st_mode)
    return path, {name: f"{layout.architecture} has no place for it" for name, _ in table.fresh(state)}


_METADATA = {"format": "pt"}


def _layout(loaded: Loaded, kind: str | None) -> Layout:
    found = _layouts(loaded)
    if not found:
        raise CheckpointError(f"transformers has no class for this {loaded.config.family}")
    if kind is None:
        return next(iter(found.values()))
    if kind not in found:
        raise CheckpointError(f"kind {kind!r} is none of {', '.join(found)}, which this {loaded.config.family} can be")
    return found[kind]


def kinds(loaded: Loaded) -> list[str]:
    """Names of the classes of transformers that ``loaded`` can be written as; the first is the default."""
    return list(_layouts(loaded))


def _layouts(loaded: Loaded) -> dict[str, Layout]:
    config, model = loaded.config, loaded.model
    if config.family == "clip" and isinstance(config.vision, VitConfig):
        if config.pool == "map":
            return {"siglip": _SIGLIP}
        return {"chinese-clip": _CHINESE} if isinstance(config.text, BertConfig) else {"clip": _CLIP}
    if config.family == "blip":
        if isinstance(model, TaskModel):
            return {"answers": _BLIP_ANSWERS} if model.head.form == "answers" else {}
        return {"matching": _MATCHING, "captioning": _CAPTIONING}
    if config.family == "vilt":
        if isinstance(model, TaskModel):
            return {"pictures": _VILT_PAIRS} if model.head.pictures == 2 else {"answers": _VILT_ANSWERS}
        return ({"words": _VILT_WORDS} if config.mlm else {}) | ({"matching": _VILT_RANKING} if config.itm else {})
    return {}


def _check(config: Any, again: Any, architecture: str) -> None:
    """Whether what transformers builds of the settings is the model, as far as its function goes."""
    sizes = [(getattr(c.image, "size", None), getattr(c.image, "longest", None)) for c in (config, again)]
    again = with_image(again, config.image)
    compared = [(name, getattr(config, name, None), getattr(again, name, None)) for name in _COMPARED]
    for name, ours, theirs in (("picture size", *sizes), *compared):
        if ours != theirs:
            raise CheckpointError(f"{architecture} cannot express this model's {name}: {ours} would become {theirs}")


_COMPARED = (
    *("vision", "text", "width", "depth", "heads", "hidden", "mlp_ratio", "norm_eps", "text_norm_eps"),
    *("vocab_size", "max_length", "embed_dim", "pool"),
)


def _tower(width: int, depth: int, heads: int, hidden: int, eps: float, activation: str) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "layer_norm_eps": eps,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation),
    }


def _vision(vision: VitConfig) -> dict[str, Any]:
    hidden = round(vision.width * vision.mlp_ratio)
    made = _tower(vision.width, vision.depth, vision.heads, hidden, vision.norm_eps, vision.activation)
    return made | {"image_size": vision.image.size, "patch_size": vision.patch}


def _words(config: Any) -> dict[str, Any]:
    return {"vocab_size": config.vocab_size, "max_position_embeddings": config.max_length}


def _clip(config: Any, words: Tokenizer | None) -> dict[str, Any]:
    text = config.text
    tower = _tower(
        text.width, text.depth, text.heads, round(text.width * text.mlp_ratio), text.norm_eps, text.activation
    )
    if words is None or not words.append_sep:
        raise CheckpointError("CLIPModel reads a text at its closing token, the texts of this model have none")
    ends = {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id}
    return _contrast(config, "clip", tower | ends)


def _chinese(config: Any, words: Tokenizer | None) -> dict[str, Any]:
    text = config.text
    tower = _tower(text.width, text.depth, text.heads, text.hidden, text.norm_eps, "gelu")
    types = {"type_vocab_size": text.token_types, "hidden_dropout_prob": text.dropout}
    return _contrast(config, "chinese_clip", tower | types)


def _contrast(config: Any, kind: str, text: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": kind,
        "projection_dim": config.embed_dim,
        "vision_config": _vision(config.vision),
        "text_config": text | _words(config),
    }


def _siglip(config: Any, words: Tokenizer | None) -> dict[str, Any]:
    text = config.text
    tower = _tower(
        text.width, text.depth, text.heads, round(text.width * text.mlp_ratio), text.norm_eps, text.activation
    )
    made = _contrast(config, "siglip", tower | {"projection_size": config.embed_dim, "pad_token_id": text.pad_id})
    del made["projection_dim"]
    return made


def _siglip_again(given: dict[str, Any]) -> Any:
    made = hf_siglip.config_from_json(given)  # what fills texts up is the tokenizer's, which is written beside it
    return replace(made, text=replace(cast(TextConfig, made.text), pad_id=given["text_config"]["pad_token_id"]))


def _blip(config: Any, words: Tokenizer | None) -> dict[str, Any]:
    tower = _tower(config.width, config.depth, config.heads, config.hidden, config.norm_eps, "gelu")
    ids = {"bos_token_id": config.decode_id, "label_smoothing": config.smoothing}
    if words is not None:
        ids |= {"pad_token_id": words.pad_id, "sep_token_id": words.sep_id, "eos_token_id": words.sep_id}
    more = {"encoder_hidden_size": config.vision.width, "hidden_dropout_prob": config.dropout}
    return {
        "model_type": "blip",
        "image_text_hidden_size": config.embed_dim,
        "projection_dim": config.embed_dim,
        "vision_config": _vision(config.vision),
        "text_config": tower | ids | more | _words(config) | {"projection_dim": config.embed_dim},
    }


def _vilt(config: Any, words: Tokenizer | None) -> dict[str, Any]:
    hidden = round(config.width * config.mlp_ratio)
    made = _tower(config.width, config.depth, config.heads, hidden, config.norm_eps, "gelu")
    return {
        "model_type": "vilt",
        **made,
        **_words(config),
        "hidden_dropout_prob": config.dropout,
        "image_size": config.image.size,
        "patch_size": config.image.patch,
        "modality_type_vocab_size": config.types,
        "num_images": config.types - 1,
        "max_image_length": -1,
        "tie_word_embeddings": False,
    }


def _vilt_again(task: bool) -> Callable[[dict[str, Any]], Any]:
    def again(given: dict[str, Any]) -> Any:
        types = {"vilt.embeddings.token_type_embeddings.weight": _Rows(given["modality_type_vocab_size"])}
        head = {"classifier.3.weight": None} if task else {}
        return hf_vilt.config_from_json(given, cast(Any, types | head))

    return again


@dataclass(frozen=True)
class _Rows:
    """Stands for a table of which only the number of rows is asked."""

    rows: int

    @property
    def shape(self) -> tuple[int]:
        return (self.rows,)


_CLIP = Layout("CLIPModel", _clip, hf_clip.config_from_json, lambda _: hf_clip.TABLE)
_CHINESE = Layout("ChineseCLIPModel", _chinese, hf_clip.chinese_from_json, lambda _: hf_clip.CHINESE)
_SIGLIP = Layout("SiglipModel", _siglip, _siglip_again, lambda _: hf_siglip.TABLE)
_MATCHING = Layout(
    "BlipForImageTextRetrieval",
    _blip,
    hf_blip.config_from_json,
    lambda config: hf_blip.table(config, Parts(decoder=False, temperature=False)),
)
_CAPTIONING = Layout(
    "BlipForConditionalGeneration",
    _blip,
    hf_blip.config_from_json,
    lambda config: hf_blip.table(config, Parts(encoder=False, temperature=False)),
)
_BLIP_ANSWERS = Layout("BlipForQuestionAnswering", _blip, hf_blip.config_from_json, hf_blip.vqa_table, inner="inner.")
_VILT_WORDS = Layout("ViltForMaskedLM", _vilt, _vilt_again(False), lambda _: hf_vilt.table(with_words=True))
_VILT_RANKING = Layout(
    "ViltForImageAndTextRetrieval", _vilt, _vilt_again(False), lambda _: hf_vilt.table(False, with_ranking=True)
)
_VILT_ANSWERS = Layout(
    "ViltForQuestionAnswering", _vilt, _vilt_again(True), lambda _: hf_vilt.task_table(), inner="inner."
)
_VILT_PAIRS = replace(_VILT_ANSWERS, architecture="ViltForImagesAndTextClassification")


def _preprocessor(image: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"image_mean": list(image.mean), "image_std": list(image.std), "do_normalize": True}
    made |= {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 3}
    if hasattr(image, "longest"):
        size = {"shortest_edge": image.size}
        return made | {"image_processor_type": "ViltImageProcessor", "size": size, "size_divisor": image.patch}
    made["resample"] = 2 if image.interpolation == "bilinear" else 3
    sides = {"height": image.size, "width": image.size}
    if image.resize == "center" or image.crop < 1:
        whole = round(image.size / image.crop)
        size = {"shortest_edge": whole} if image.resize == "center" else {"height": whole, "width": whole}
        crop = {"do_center_crop": True, "crop_size": sides, "size": size}
        return made | crop | {"image_processor_type": "CLIPImageProcessor"}
    return made | {"image_processor_type": "BlipImageProcessor", "size": sides}


def _write_tokenizer(folder: Path, words: Tokenizer, config: Any) -> None:
    inner = tokenizers.Tokenizer.from_str(words.inner.to_str())
    if words.is_clip:  # what this library does to a text before, as far as a file of the tokenizers library can say it
        spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
        inner.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    inner.save(str(folder / "tokenizer.json"))
    tokens = {role: words.token(role) for role in ("pad", "unk", "cls", "sep", "mask", "bos", "eos")}
    if getattr(getattr(config, "text", None), "padded", False):
        tokens["pad"] = words.tokens([config.text.pad_id])[0]  # which the model reads
    named = {f"{role}_token": token for role, token in tokens.items() if token is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": words.max_length}
    _write(folder / "tokenizer_config.json", settings | named)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
