"""The form in which imglish exchanges models: a folder of safetensors, JSON and the tokenizer, complete in itself.

model.safetensors   every parameter and persistent buffer by its name
imglish.json        format version, family, configuration, picture input, score rule, head of a task, origin
tokenizer.json      the tokenizer with all its settings
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from imglish import __version__, atomic
from imglish.checkpoints.drawing import undrawn
from imglish.checkpoints.rules import same_kind
from imglish.data.tokenizers import Tokenizer, TokenizerError
from imglish.models import registry
from imglish.models.capabilities import Matches
from imglish.models.heads import HeadConfig, TaskModel, with_head

FORMAT = 1
WEIGHTS, DESCRIPTION, TOKENIZER = "model.safetensors", "imglish.json", "tokenizer.json"
UNUSABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What settings that say anything at all do to the code that takes them for sizes."""
_LAYERS = 1000
SCORE_RULES = ("itc", "itm", "itm_probability", "itm+itc")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Loaded:
    """model: in eval mode, on the CPU; words: its tokenizer, None where the model takes pictures only; score_rule: how
    retrieval scores pairs, one of SCORE_RULES."""

    model: nn.Module
    words: Tokenizer | None
    config: Any
    score_rule: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a model that reads texts; :class:`CheckpointError` where it does not."""
        if self.words is None:
            able = sorted(name for name, (config, _) in registry.FAMILIES.items() if registry.reads_texts(config))
            raise CheckpointError(
                f"this model ({self.config.family}) takes pictures only, no texts. Families that do: {', '.join(able)}"
            )
        return self.words


def default_score_rule(model: nn.Module) -> str:
    """Matching logits where the model has a fusion tower, else dot products."""
    return "itm" if isinstance(model, Matches) else "itc"


def export(
    path: str | Path,
    model: nn.Module,
    tokenizer: Tokenizer | None,
    meta: Mapping[str, Any] | None = None,
    score_rule: str | None = None,
) -> Path:
    """Write ``model`` with all that is needed to use it to the folder ``path``; an older export there is replaced.

    tokenizer: None for models of pictures only. meta: where the model comes from (recipe, step, validation), plain
    data. The replacement is atomic: ``path`` is the old export or the new one. Raises :class:`CheckpointError` when the
    disk refuses, and keeps the old one.
    """
    path = Path(path)
    rule = score_rule or default_score_rule(model)
    if rule not in SCORE_RULES:
        raise CheckpointError(f"score rule {rule!r} is none of {', '.join(SCORE_RULES)}")
    if path.exists() and not (path / DESCRIPTION).is_file():
        raise CheckpointError(f"{path} exists and is no exported model: choose another folder")
    config: Any = model.config
    head = model.head if isinstance(model, TaskModel) else None
    if (tokenizer is not None) != registry.reads_texts(config, head):
        needed = "without a tokenizer: it takes pictures only" if tokenizer is not None else "with its tokenizer"
        raise CheckpointError(f"a model of family {config.family} is exported {needed}")
    description = {
        "format": FORMAT,
        "imglish": __version__,
        "family": model.family,
        "config": registry.to_dict(config),
        "image": asdict(config.image),
        "score_rule": rule,
        **({"head": asdict(head)} if head is not None else {}),
        "meta": dict(meta or {}),
    }
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        held = value.detach().cpu().contiguous()
        shared = any(held.data_ptr() == other.data_ptr() for other in state.values())
        state[name] = held.clone() if shared else held  # the format keeps every name apart
    try:
        with atomic.folder(path) as folder:
            save_file(state, folder / WEIGHTS)
            text = json.dumps(description, indent=2, ensure_ascii=False)
            (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save(folder / TOKENIZER)
            shutil.copymode(folder / DESCRIPTION, folder / WEIGHTS)  # safetensors makes files that only the owner reads
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the model to {path}: {error}") from error
    return path


def is_export(path: str | Path) -> bool:
    """Whether ``path`` is a folder that :func:`load` reads."""
    return (Path(path) / DESCRIPTION).is_file()


def load(path: str | Path) -> Loaded:
    """Read a folder that :func:`export` wrote. No code of the checkpoint is run.

    Raises :class:`CheckpointError` for missing files, another format version, unknown settings, and for any name or
    shape among the weights that differs from the model's.
    """
    path = Path(path)
    atomic.recover(path)
    description = _description(path)
    config = _config(path, description)
    head = _head(path, description["head"]) if "head" in description else None
    try:
        with undrawn():  # nothing is drawn, nothing allocated: the weights become those of the mapped file
            model = built(config, head)
        reads = registry.reads_texts(config, head)
    except UNUSABLE as error:
        raise CheckpointError(f"{path / DESCRIPTION}: the configuration cannot be used: {error}") from error
    try:
        state = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / WEIGHTS} cannot be read: {error}") from error
    load_weights(model, state, str(path / WEIGHTS))
    tokenizer = _tokenizer(path, config) if reads else None
    return Loaded(model.eval(), tokenizer, config, description["score_rule"], description.get("meta", {}))


def built(config: Any, head: HeadConfig | None = None) -> nn.Module:
    """A new model of ``config``, with ``head`` that of a task.

    :class:`CheckpointError` for so many layers that building them would not end: files of others say how many."""
    if (deep := _deepest(registry.to_dict(config))) > _LAYERS:
        raise CheckpointError(f"{deep} layers: more than {_LAYERS} are not built")
    model = registry.build(config)
    return model if head is None else with_head(model, head)


def _deepest(settings: Mapping[str, Any]) -> int:
    """The greatest number of layers that is named in ``settings``."""
    inner = [_deepest(value) for value in settings.values() if isinstance(value, Mapping)]
    named = [value for key, value in settings.items() if key.endswith("depth") and isinstance(value, int)]
    blocks = [sum(value) for key, value in settings.items() if key == "layers" and isinstance(value, list | tuple)]
    return max([*inner, *named, *blocks], default=0)


def _tokenizer(path: Path, config: Any) -> Tokenizer:
    try:
        tokenizer = Tokenizer.load(path / TOKENIZER)
    except (OSError, TokenizerError) as error:
        raise CheckpointError(f"{path / TOKENIZER} cannot be read: {error}") from error
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: "
            f"{TOKENIZER} is not the one that the model was trained with"
        )
    return tokenizer


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy ``state`` into ``model``, or make its tensors the weights of a model on the meta device.

    A name or shape that one side lacks, or another kind of numbers (:func:`imglish.checkpoints.rules.same_kind`), is a
    :class:`CheckpointError`.
    """
    mine = model.state_dict()
    problems = []
    if missing := sorted(set(mine) - set(state)):
        problems.append(f"{len(missing)} weights are missing: {_some(missing)}")
    if surplus := sorted(set(state) - set(mine)):
        problems.append(f"{len(surplus)} weights do not belong to the model: {_some(surplus)}")
    differing = [
        f"{name} is {tuple(state[name].shape)}, the model's is {tuple(mine[name].shape)}"
        for name in mine
        if name in state and state[name].shape != mine[name].shape
    ]
    if differing:
        problems.append(f"shapes differ: {_some(differing)}")
    kinds = [
        f"{name} is {state[name].dtype}, the model's is {mine[name].dtype}"
        for name in mine
        if name in state and not same_kind(state[name], mine[name])
    ]
    if kinds:
        problems.append(f"kinds of numbers differ: {_some(kinds)}")
    if problems:
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__} of this configuration; " + "; ".join(problems)
        )
    with torch.no_grad():
        if any(value.is_meta for value in mine.values()):
            model.load_state_dict({name: state[name].to(value.dtype) for name, value in mine.items()}, assign=True)
            return
        for name, value in mine.items():
            value.copy_(state[name])


def read_settings(file: Path) -> dict[str, Any]:
    """What a JSON file says, a dictionary. Raises :class:`CheckpointError` with its name."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no settings")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _description(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"there is no model at {path}")
    try:
        data = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} is no exported model: it has no readable {DESCRIPTION}") from error
    except ValueError as error:
        raise CheckpointError(f"{path / DESCRIPTION} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        raise CheckpointError(
            f"{path / DESCRIPTION} has format {found!r}; imglish {__version__} reads format {FORMAT}: "
            "use the version of imglish that wrote it, or a newer one"
        )
    if missing := [key for key in ("family", "config", "score_rule") if key not in data]:
        raise CheckpointError(f"{path / DESCRIPTION} lacks {', '.join(missing)}")
    if not isinstance(data.get("meta", {}), dict):
        raise CheckpointError(f"{path / DESCRIPTION}: meta is no dictionary")
    if data["score_rule"] not in SCORE_RULES:
        raise CheckpointError(f"{path / DESCRIPTION}: score rule {data['score_rule']!r} is none of {SCORE_RULES}")
    return data


def _head(path: Path, data: Any) -> HeadConfig:
    try:
        return HeadConfig(**{**data, "classes": tuple(data["classes"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / DESCRIPTION}: the head cannot be used: {error}") from error


def _config(path: Path, description: Mapping[str, Any]) -> Any:
    try:
        return registry.from_dict(description["family"], description["config"])
    except UNUSABLE as error:
        raise CheckpointError(f"{path / DESCRIPTION}: the configuration cannot be used: {error}") from error
