"""Putting a written model on the Hugging Face hub; token, endpoint and retries are the hub library's own settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from imglish.checkpoints.native import CheckpointError

CARD = "README.md"


def push(
    folder: str | Path, name: str, card: str, private: bool = False, dry_run: bool = False
) -> list[tuple[str, int]]:
    """Upload all files of ``folder`` and the page ``card`` to the repository ``name`` (OWNER/NAME), which is made where
    it does not exist. Returns names and sizes in bytes of what was uploaded, or with ``dry_run`` of what would be:
    then nothing is sent. Raises :class:`CheckpointError`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    folder = Path(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"{name} cannot be pushed: {name!r} has no owner: write OWNER/NAME")
    try:
        (folder / CARD).write_text(card, encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listed = [(str(path.relative_to(folder)), path.stat().st_size) for path in files]
        if not dry_run:
            hub: Any = HfApi()
            hub.create_repo(name, private=private, exist_ok=True)
            hub.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Model and card")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise CheckpointError(f"{name} cannot be pushed: {str(error).strip().splitlines()[0]}") from error
    return listed
