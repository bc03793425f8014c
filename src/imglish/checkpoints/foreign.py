"""Checkpoints of others, recognised by what lies there, read safely and turned into ours with an account of every name.

A file of weights (``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.safetensors``, TorchScript) as the papers' authors release
them, a folder of Hugging Face transformers (``config.json``), or a folder of open_clip (``open_clip_config.json``).
:data:`imglish.checkpoints.formats.FORMATS` is the table of what is known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from imglish.checkpoints.drawing import drawn, undrawn
from imglish.checkpoints.files import WeightFileError, read_weights
from imglish.checkpoints.folders import read_folder, weight_files
from imglish.checkpoints.formats import FORMATS
from imglish.checkpoints.native import UNUSABLE, CheckpointError, Loaded, built, read_settings
from imglish.checkpoints.preparing import with_picture
from imglish.checkpoints.source import Format, Layout, Source
from imglish.checkpoints.wording import tokenizer_of
from imglish.models import registry
from imglish.models.heads import HeadConfig

SETTINGS: tuple[tuple[str, Layout], ...] = (("open_clip_config.json", "open_clip"), ("config.json", "transformers"))
_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
_OPEN_CLIP = (
    "Sizes and activation of such a model stand in open_clip's model_configs/NAME.json: put that file beside it, as "
    "open_clip_config.json"
)


def load_foreign(path: str | Path, tokenizer: str | Path | None = None, classes: str | Path | None = None) -> Loaded:
    """The model at ``path``, converted; ``meta`` says from what, and name by name what was left out or is new.

    tokenizer: its file (``vocab.txt``, ``tokenizer.json``, CLIP's merges), where none lies beside the weights; classes:
    a JSON file with the names of a task's answers, a list or name -> number, which files of weights do not hold. Raises
    :class:`CheckpointError`, which names the file, what it resembles and the first names that do not fit.
    """
    source = read_source(Path(path))
    if classes is not None:
        source = replace(source, classes=read_classes(Path(classes)))
    name, form = recognise(source)
    try:
        config = form.config(source)
        config = registry.from_dict(config.family, registry.to_dict(config))  # numbers of the declared types
        config = with_picture(config, source.settings, source.folder)
        head = None if form.head is None else form.head(source)
        with undrawn():
            model = built(config, head)
        inner = "inner." if head is not None else ""
        target = {key.removeprefix(inner): value for key, value in model.state_dict().items()}
        converted = form.convert(source.weights, target, config)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    except UNUSABLE as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{source.path} looks like {form.title}, but does not fit: {what}") from error
    words, sized = None, (config, head)
    if registry.reads_texts(config, head):
        words, fill = tokenizer_of(source, form, config, tokenizer)
        if fill is not None:
            config = replace(config, text=replace(config.text, pad_id=fill))
        if head is not None and head.form == "answers":
            head = replace(head, start=words.bos_id)
    if (config, head) != sized:  # the tokenizer has told something of the model
        with undrawn():
            model = built(config, head)
    state = {f"{inner}{key}": value for key, value in converted.state.items()}
    model.load_state_dict(_with_fresh(state, config, head), assign=True)
    meta = {"from": {"format": name, "name": source.path.name, "sha256": digest(source.path)}}
    return Loaded(model.eval(), words, config, form.score_rule, meta | {"conversion": converted.report})


def read_classes(path: Path) -> tuple[str, ...]:
    """Names of answers in their order, from a JSON list or from a mapping of names to numbers."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no JSON file with the names of answers: {error}") from error
    if isinstance(given, dict) and sorted(given.values()) == list(range(len(given))):
        given = sorted(given, key=given.__getitem__)
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise CheckpointError(f"{path}: expected a list of names, or names with numbers 0, 1, 2, ...")
    return tuple(given)


def _with_fresh(state: Mapping[str, Tensor], config: Any, head: HeadConfig | None) -> dict[str, Tensor]:
    """``state`` in float32, with first values drawn for what the checkpoint lacks; the report names it."""
    made: Mapping[str, Tensor] = {}
    if any(value.is_meta for value in state.values()):
        made = drawn(lambda: built(config, head), lambda name, _: state[name].is_meta).state_dict()
    return {
        key: made[key] if value.is_meta else value.float() if value.is_floating_point() else value
        for key, value in state.items()
    }


def read_source(path: Path) -> Source:
    """Weights and settings at ``path``: a folder of transformers or open_clip, or a file, which has the settings that
    lie beside it if it is of their kind."""
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        if path.is_file():
            return _file(path)
        for name, layout in SETTINGS:
            if (path / name).is_file():
                return Source(path, layout, read_folder(path), read_settings(path / name))
        files = [file.name for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES]
    except (WeightFileError, OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    named = f"; name one of its files: {', '.join(files[:6])}" if files else ""
    raise CheckpointError(
        f"{path} is no folder of a model: it has none of {', '.join(name for name, _ in SETTINGS)}{named}"
    )


def _file(path: Path) -> Source:
    found = read_weights(path)
    for name, layout in SETTINGS:
        if (path.parent / name).is_file():
            source = Source(path, layout, found.weights, read_settings(path.parent / name))
            if _complete(source):
                return source
    return Source(path, "file", found.weights, beside=found.beside)


def recognise(source: Source) -> tuple[str, Format]:
    """The format that the source is of; an error names the nearest one and why it is not of that."""
    if complete := _complete(source):
        best = max(complete, key=lambda name: len(FORMATS[name].marks))
        if best == "clip" and (source.path.name.startswith("open_clip") or {"name", "epoch"} <= set(source.beside)):
            raise CheckpointError(f"{source.path} is a model of open_clip. {_OPEN_CLIP}")
        return best, FORMATS[best]
    if source.layout == "file" and _complete(replace(source, layout="open_clip")):
        raise CheckpointError(f"{source.path} is a model of open_clip. {_OPEN_CLIP}")
    lacking = {name: form.lacks(source) for name, form in FORMATS.items() if form.layout == source.layout}
    nearest = min(lacking, key=lambda name: len(lacking[name]) / len(FORMATS[name].marks))
    raise CheckpointError(
        f"{source.path} is of no known kind.{_called(source)} Nearest is {FORMATS[nearest].title}, but it has "
        f"{'; '.join(lacking[nearest])}. Its first names: {', '.join(list(source.weights)[:6])}"
    )


def _complete(source: Source) -> list[str]:
    """Names of the formats that the source is of."""
    return [name for name, form in FORMATS.items() if form.layout == source.layout and not form.lacks(source)]


def _called(source: Source) -> str:
    """What transformers calls the model; of one tower alone, what to take instead."""
    if source.layout != "transformers" or source.settings is None:
        return ""
    classes, kind = source.settings.get("architectures") or [], str(source.settings.get("model_type"))
    called = f" Its config.json calls it {', '.join(map(str, classes)) or 'a model'} (model_type {kind})."
    one = kind.endswith(("_text_model", "_vision_model"))
    return called + (" That is one tower alone; take the whole model, with pictures and texts." if one else "")


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the weights in a folder, part by part."""
    files = [path] if path.is_file() else weight_files(path)
    made = sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                made.update(chunk)
    return made.hexdigest()
