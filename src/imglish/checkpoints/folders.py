"""Weights that lie in a folder: one file, or parts and an index that says what is where (transformers)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from imglish.checkpoints.files import WeightFileError, read_weights

FORMS: tuple[tuple[str, ...], ...] = (
    ("model.safetensors",),
    ("open_clip_model.safetensors",),
    ("model-*-of-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin",),
    ("open_clip_pytorch_model.bin",),
    ("pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)
"""Forms of the weights, the best first: one file, or the parts and their index."""
WEIGHTS = tuple(form[0] for form in FORMS)
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz")


def form_of(names: Iterable[str]) -> tuple[str, ...] | None:
    """The first of :data:`FORMS` of which something is among ``names``."""
    there = tuple(names)
    return next((form for form in FORMS if any(fnmatchcase(name, form[0]) for name in there)), None)


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights in ``folder``. :class:`WeightFileError` where there are none, or not all parts."""
    there = sorted(file.name for file in folder.iterdir() if file.is_file())
    form = form_of(there)
    if form is None:
        others = [name for name in there if name.endswith(_SUFFIXES)]
        besides = f"; it holds {', '.join(others[:6])}" if others else ""
        raise WeightFileError(f"{folder} holds no weights: none of {', '.join(WEIGHTS)}{besides}")
    if len(form) == 1:
        return [folder / form[0]]
    given = [name for name in there if fnmatchcase(name, form[0])]
    index = folder / form[1]
    wanted = sorted(set(_map(index).values())) if index.is_file() else _numbered(folder, given)
    if missing := [name for name in wanted if name not in there]:
        raise WeightFileError(
            f"{folder} holds {len(wanted) - len(missing)} of the {len(wanted)} parts of its weights: "
            f"{', '.join(missing[:6])} {'is' if len(missing) == 1 else 'are'} missing"
        )
    return [folder / name for name in wanted]


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of all the weights in ``folder``.

    Raises :class:`WeightFileError` for parts that are missing, hold a name twice, or lack one that the index promises.
    """
    files = weight_files(folder)
    if len(files) == 1:
        return read_weights(files[0]).weights
    found: dict[str, Tensor] = {}
    for file in files:
        part = read_weights(file).weights
        if twice := sorted(set(part) & set(found)):
            raise WeightFileError(f"{file} holds what another part holds too: {', '.join(twice[:6])}")
        found |= part
    index = next((folder / form[1] for form in FORMS if fnmatchcase(files[0].name, form[0])), None)
    if index is not None and index.is_file() and (lacking := sorted(set(_map(index)) - set(found))):
        raise WeightFileError(f"{index} promises {', '.join(lacking[:6])}, which no part holds ({len(lacking)} in all)")
    return found


def _map(index: Path) -> Mapping[str, str]:
    """Name of a tensor -> name of its part, which lies in the folder itself."""
    try:
        given: Any = json.loads(index.read_text(encoding="utf-8"))
        found = given["weight_map"]
        parts = set(found.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightFileError(f"{index} is no index of weights: it has no readable weight_map") from error
    for part in parts:
        if not isinstance(part, str) or Path(part).name != part:
            raise WeightFileError(f"{index} names {part!r}: parts are files of its own folder")
    if not parts:
        raise WeightFileError(f"{index} names no parts")
    return found


def _numbered(folder: Path, given: list[str]) -> list[str]:
    """All the parts that ``given`` ones say there are, by the numbers in their names."""
    pieces = [re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.\w+)", name) for name in given]
    counts = {piece.group(4) for piece in pieces if piece is not None}
    first = pieces[0]
    if len(counts) != 1 or None in pieces or first is None or not 0 < (count := int(first.group(4))) <= 10_000:
        raise WeightFileError(f"{folder}: the parts {', '.join(given[:4])} do not belong together")
    before, digits, of, total, suffix = first.groups()
    return [f"{before}{number:0{len(digits)}}{of}{total}{suffix}" for number in range(1, count + 1)]
