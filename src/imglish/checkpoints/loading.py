"""One entry for every checkpoint: our own exports, released files and folders, and those on the Hugging Face hub."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from imglish.checkpoints import native
from imglish.checkpoints.drawing import drawn
from imglish.checkpoints.folders import WEIGHTS, form_of
from imglish.checkpoints.foreign import SETTINGS, load_foreign
from imglish.checkpoints.native import CheckpointError, Loaded, built
from imglish.checkpoints.preparing import PREPROCESSORS
from imglish.checkpoints.resizing import with_sizes
from imglish.checkpoints.transfer import resized
from imglish.checkpoints.wording import TOKENIZER_SETTINGS, TOKENIZERS
from imglish.models.heads import TaskModel

HUB = "hf:"
_WANTED = (*(name for name, _ in SETTINGS), *TOKENIZERS, TOKENIZER_SETTINGS, *PREPROCESSORS, native.DESCRIPTION)


def load_any(
    name: str | Path,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    classes: str | Path | None = None,
) -> Loaded:
    """The model called ``name``: a folder that this library wrote, a released file or folder (see
    :mod:`imglish.checkpoints.foreign`), or ``hf:OWNER/NAME`` on the hub.

    tokenizer: its file, for released weights without one beside them; revision: branch, tag or commit on the hub;
    image_size, max_length: see :func:`at_sizes`; classes: names of a released task model's answers. Raises
    :class:`CheckpointError`.
    """
    return at_sizes(_load(name, tokenizer, revision, classes), image_size, max_length)


def _load(name: str | Path, tokenizer: str | Path | None, revision: str | None, classes: str | Path | None) -> Loaded:
    if str(name).startswith(HUB):
        path = from_hub(str(name)[len(HUB) :], revision)
    elif revision is not None:
        raise CheckpointError(
            f"{name} has no revisions ({revision}): only models of the hub have, called {HUB}OWNER/NAME"
        )
    else:
        path = Path(name)
    if native.is_export(path):
        if given := [what for what, file in (("tokenizer", tokenizer), ("classes", classes)) if file is not None]:
            raise CheckpointError(f"{path} holds its own {' and '.join(given)}: leave {' and '.join(given)} out")
        return native.load(path)
    if not path.exists():
        called = name if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) else "OWNER/NAME"
        raise CheckpointError(f"there is no model at {path}; one on the hub is called {HUB}{called}")
    return load_foreign(path, tokenizer, classes)


def at_sizes(loaded: Loaded, image_size: int | None = None, max_length: int | None = None) -> Loaded:
    """The same model for pictures of ``image_size`` pixels and texts of at most ``max_length`` tokens (None: as they
    are), its positions fitted by the rule of its family (:mod:`imglish.checkpoints.resizing`).

    What was fitted stands in ``meta["resized"]``. Raises :class:`CheckpointError` where that cannot be.
    """
    try:
        config = with_sizes(loaded.config, image_size, max_length)
        if config == loaded.config:
            return loaded
        head = loaded.model.head if isinstance(loaded.model, TaskModel) else None
        held = loaded.model.state_dict()
        model = drawn(lambda: built(config, head), lambda name, new: new.shape != held[name].shape)
        converted = resized(loaded.model, model)
    except ValueError as error:
        raise CheckpointError(f"this {loaded.config.family} cannot be had in other sizes: {error}") from error
    model.load_state_dict(converted.state, assign=True)
    words = loaded.words
    if words is not None and max_length is not None:
        words = words.with_max_length(max_length)
    meta = loaded.meta | {"resized": converted.report}
    return replace(loaded, model=model.eval(), words=words, config=config, meta=meta)


def from_hub(repository: str, revision: str | None = None) -> Path:
    """The folder of a model of the hub in the hub's own cache, fetched if it is not there: only the files that are
    needed, and one form of the weights. Offline mode, token and progress are the hub library's own settings."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        weights = WEIGHTS
        with suppress(Exception):  # without a network what is in the cache will do, and else the next line says why not
            there = HfApi().model_info(repository, revision=revision).siblings or []
            weights = form_of(file.rfilename for file in there) or ()
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*_WANTED, *weights]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{HUB}{repository} cannot be fetched: {_first_line(error)}") from error


def _first_line(error: Any) -> str:
    return str(error).strip().split("\n")[0]
