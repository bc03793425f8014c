"""One entry for every checkpoint: our own exports, released files and folders, and those on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imglish.checkpoints import native
from imglish.checkpoints.foreign import SETTINGS, TOKENIZERS, WEIGHT_NAMES, load_foreign
from imglish.checkpoints.native import CheckpointError, Loaded

HUB = "hf:"
_WANTED = (
    *(name for name, _ in SETTINGS),
    *WEIGHT_NAMES,
    *TOKENIZERS,
    "model-*-of-*.safetensors",
    native.DESCRIPTION,
)


def load_any(name: str | Path, tokenizer: str | Path | None = None, revision: str | None = None) -> Loaded:
    """The model called ``name``: a folder that this library wrote, a released file or folder (see
    :mod:`imglish.checkpoints.foreign`), or ``hf:OWNER/NAME`` on the hub.

    tokenizer: its file, for released weights without one beside them; revision: branch, tag or commit on the hub.
    Raises :class:`CheckpointError`.
    """
    path = from_hub(str(name)[len(HUB) :], revision) if str(name).startswith(HUB) else Path(name)
    if native.is_export(path):
        return native.load(path)
    if not path.exists():
        raise CheckpointError(f"there is no model at {path}; one on the hub is called {HUB}OWNER/NAME")
    return load_foreign(path, tokenizer)


def from_hub(repository: str, revision: str | None = None) -> Path:
    """The folder of a model of the hub in the hub's own cache, fetched if it is not there: only the files that are
    needed, and one form of the weights. Offline mode, token and progress are the hub library's own settings."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        ignored: list[str] = []
        try:
            files = HfApi().list_repo_files(repository, revision=revision)
            if any(name.endswith(".safetensors") for name in files):
                ignored = ["*.bin"]
        except OfflineModeIsEnabled:
            pass  # what is in the cache was chosen when it was fetched
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(_WANTED), ignore_patterns=ignored)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{HUB}{repository} cannot be fetched: {_first_line(error)}") from error


def _first_line(error: Any) -> str:
    return str(error).strip().split("\n")[0]
