"""How pictures are prepared, as files beside the weights say it: ``preprocessor_config.json`` of transformers and the
``preprocess_cfg`` of open_clip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from imglish.checkpoints.resizing import with_image

PREPROCESSOR = "preprocessor_config.json"
_OPEN_CLIP_MODES = {"squash": "squash", "shortest": "center"}


def with_picture(config: Any, settings: Mapping[str, Any] | None, folder: Path) -> Any:
    """``config`` with mean, deviation and resizing as the folder of a checkpoint states them; a file alone has none.

    Raises ``ValueError`` for what this library does not do.
    """
    if settings is None:
        return config
    changes: dict[str, Any] = {}
    if "preprocess_cfg" in settings:
        given = settings["preprocess_cfg"]
        changes = {name: given.get(name) for name in ("mean", "std")}
        mode = given.get("resize_mode", "shortest")
        if mode not in _OPEN_CLIP_MODES:
            raise ValueError(f"resize_mode {mode!r} is not supported; there are: {', '.join(_OPEN_CLIP_MODES)}")
        changes["resize"] = _OPEN_CLIP_MODES[mode]
    elif (folder / PREPROCESSOR).is_file():
        given = json.loads((folder / PREPROCESSOR).read_text(encoding="utf-8"))
        changes = {"mean": given.get("image_mean"), "std": given.get("image_std")}
        if "do_center_crop" in given:
            changes |= _cut(given)
    image = config.image
    wanted = {
        name: tuple(float(number) for number in value) if isinstance(value, list) else value
        for name, value in changes.items()
        if value is not None and hasattr(image, name)
    }
    return with_image(config, replace(image, **wanted)) if wanted else config


def _cut(given: Mapping[str, Any]) -> dict[str, Any]:
    """What ``do_center_crop``, ``size`` and ``crop_size`` of transformers come to: a picture whose shorter side, or
    both of whose sides, are brought to ``size``, of which the centre is cut out."""
    size, crop = given.get("size"), given.get("crop_size")
    whole = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
    part = crop.get("height") if isinstance(crop, dict) else crop
    if not given["do_center_crop"]:
        return {"resize": "squash"}
    both = isinstance(size, dict) and "shortest_edge" not in size
    return {"resize": "squash" if both else "center", "crop": part / whole if whole and part else 1.0}
