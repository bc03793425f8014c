"""How pictures are prepared, as files beside the weights say it: ``preprocessor_config.json`` of transformers (since
version 5 a part of ``processor_config.json``) and the ``preprocess_cfg`` of open_clip.

What is said there and not done here is an error: a model that sees pictures otherwise gives other numbers in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from imglish.checkpoints.native import read_settings
from imglish.checkpoints.resizing import with_image

PREPROCESSOR = "preprocessor_config.json"
PREPROCESSORS = ("processor_config.json", PREPROCESSOR)
_OPEN_CLIP_MODES = {"squash": "squash", "shortest": "center"}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def with_picture(config: Any, settings: Mapping[str, Any] | None, folder: Path) -> Any:
    """``config`` with mean, deviation and resizing as the folder of a checkpoint states them; a file alone has none.

    Raises ``ValueError`` for what this library does not do.
    """
    if settings is None:
        return config
    if "preprocess_cfg" in settings:
        changes = _open_clip(settings["preprocess_cfg"], config.image)
    else:
        changes = _transformers(_processor(folder), config.image)
    can = {field.name: getattr(config.image, field.name) for field in fields(config.image)}
    wanted = {
        name: tuple(float(number) for number in value) if isinstance(value, list) else value
        for name, value in changes.items()
        if value is not None
    }
    if strange := [
        f"{name} {value}" for name, value in wanted.items() if name not in can and value != _PLAIN.get(name)
    ]:
        raise ValueError(f"pictures of this family are not prepared with {', '.join(strange)}")
    wanted = {name: value for name, value in wanted.items() if name in can}
    return with_image(config, replace(config.image, **wanted)) if wanted else config


_PLAIN = {"interpolation": "bicubic", "crop": 1.0}
"""What inputs that cannot choose do always."""


def _open_clip(given: Mapping[str, Any], image: Any) -> dict[str, Any]:
    known = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
    if strange := sorted(set(given) - known):
        raise ValueError(f"preprocess_cfg has {', '.join(strange)}, which is not known")
    mode, interpolation = given.get("resize_mode") or "shortest", given.get("interpolation") or "bicubic"
    if mode not in _OPEN_CLIP_MODES:
        raise ValueError(f"resize_mode {mode!r} is not supported; there are: {', '.join(_OPEN_CLIP_MODES)}")
    if interpolation not in _RESAMPLE.values():
        raise ValueError(f"interpolation {interpolation!r} is not supported, only {', '.join(_RESAMPLE.values())}")
    if (given.get("mode") or "RGB") != "RGB":
        raise ValueError(f"pictures in {given['mode']} are not supported, only RGB")
    _same_side(given.get("size"), image)
    changes: dict[str, Any] = {name: given.get(name) for name in ("mean", "std")}
    return changes | {"resize": _OPEN_CLIP_MODES[mode], "interpolation": interpolation}


def _processor(folder: Path) -> Mapping[str, Any]:
    """Settings of the image processor, of whichever file has them."""
    for name in PREPROCESSORS:
        if (folder / name).is_file():
            given = read_settings(folder / name)
            if isinstance(found := given if name == PREPROCESSOR else given.get("image_processor"), dict):
                return {key: value for key, value in found.items() if value is not None}
    return {}


def _transformers(given: Mapping[str, Any], image: Any) -> dict[str, Any]:
    for name, wanted in (("do_resize", True), ("do_rescale", True)):
        if given.get(name, wanted) is not wanted:
            raise ValueError(f"{name} {given[name]} is not supported: pictures are resized, and numbers lie in 0..1")
    if not math.isclose(factor := given.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise ValueError(f"rescale_factor {factor} is not supported, only 1/255")
    if (resample := given.get("resample", 3)) not in _RESAMPLE:
        raise ValueError(f"resample {resample} is not supported, only {_RESAMPLE}")
    changes: dict[str, Any] = {"mean": given.get("image_mean"), "std": given.get("image_std")}
    if not given.get("do_normalize", True):
        changes = {"mean": [0.0] * 3, "std": [1.0] * 3}
    if "resample" in given:
        changes["interpolation"] = _RESAMPLE[resample]
    return changes | (_aspect(given, image) if hasattr(image, "longest") else _cut(given, image))


def _aspect(given: Mapping[str, Any], image: Any) -> dict[str, Any]:
    """Of pictures that keep their shape. (Files of squares may have a ``size_divisor`` too, which nobody reads.)"""
    if given.get("size_divisor", image.patch) != image.patch:
        raise ValueError(f"size_divisor {given['size_divisor']} is not supported, only the side of a patch")
    size = given.get("size")
    _same_side(size.get("shortest_edge") if isinstance(size, dict) else size, image)
    if given.get("do_center_crop"):
        raise ValueError("do_center_crop is not supported where pictures keep their shape")
    return {}


def _cut(given: Mapping[str, Any], image: Any) -> dict[str, Any]:
    """What ``do_center_crop``, ``size`` and ``crop_size`` of transformers come to: a picture whose shorter side, or
    both of whose sides, are brought to ``size``, of which the centre is cut out."""
    size, crop = given.get("size"), given.get("crop_size")
    shorter = size.get("shortest_edge") if isinstance(size, dict) else None
    whole = shorter or (_side([size.get("height"), size.get("width")]) if isinstance(size, dict) else size)
    part = _side([crop.get("height"), crop.get("width")]) if isinstance(crop, dict) else crop
    cut = given.get("do_center_crop")
    if cut is None:
        _same_side(whole if image.resize == "squash" else part or whole, image)
        return {}
    if not cut:
        if shorter is not None:
            raise ValueError(
                "a size of the shortest edge without do_center_crop is not supported: pictures are squares"
            )
        _same_side(whole, image)
        return {"resize": "squash"}
    _same_side(part or whole, image)
    both = isinstance(size, dict) and shorter is None
    return {"resize": "squash" if both else "center", "crop": part / whole if whole and part else 1.0}


def _side(sides: Any) -> Any:
    """The one side of a square, which may be said twice."""
    if isinstance(sides, list | tuple):
        if len(set(sides)) != 1:
            raise ValueError(f"pictures of {sides} pixels are not supported: they are squares here")
        return sides[0]
    return sides


def _same_side(given: Any, image: Any) -> None:
    if (side := _side(given)) is not None and side != image.size:
        raise ValueError(
            f"pictures are prepared with {side} pixels a side for a model whose positions are for {image.size}"
        )
