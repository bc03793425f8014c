"""COCO's caption annotations and Karpathy's split files: one JSON object with a list of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from imglish.data.errors import DataError, Errors, Problem
from imglish.data.sources.config import SourceConfig
from imglish.data.sources.files import join, parent
from imglish.data.sources.rows import Row, read_json
from imglish.data.sources.table import ColumnSource, collect


def is_coco(data: Mapping[str, Any]) -> bool:
    """Whether a JSON object has the keys of COCO's caption files."""
    return isinstance(data.get("images"), list) and isinstance(data.get("annotations"), list)


def is_karpathy(data: Mapping[str, Any]) -> bool:
    """Whether a JSON object has the keys of Karpathy's splits."""
    return isinstance(data.get("images"), list) and "annotations" not in data


def open_coco(config: SourceConfig, errors: Errors) -> ColumnSource:
    """``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``.

    The pictures lie beside the file, in ``images``, or as in COCO's own layout: ``annotations/captions_val2017.json``
    beside ``val2017/``.
    """
    data = _read(config, is_coco, '"images" and "annotations"')
    folder = parent(config.path)
    above = parent(folder)
    part = PurePosixPath(config.path).stem.rsplit("_", 1)[-1]
    near = (join(above, part), join(join(above, "images"), part), join(above, "images"), join(folder, "images"), folder)
    return collect(config, _coco_rows(data, config.path), errors, near)


def _coco_rows(data: Mapping[str, Any], path: str) -> Iterator[Row | Problem]:
    images: dict[int | str, Mapping[str, Any]] = {}
    for number, image in enumerate(data["images"]):
        where = f"{path}:images[{number}]"
        if not isinstance(image, dict) or not isinstance(image.get("id"), (int, str)):
            yield Problem(where, "wrong type", f"{where}: no image with an id")
        elif image["id"] in images:
            yield Problem(where, "duplicate key", f"{where}: the id {image['id']!r} was there before")
        else:
            images[image["id"]] = image
    unseen = dict.fromkeys(images)
    for number, entry in enumerate(data["annotations"]):
        where = f"{path}:annotations[{number}]"
        known = entry.get("image_id") if isinstance(entry, dict) else None
        if not isinstance(known, (int, str)) or known not in images:
            yield Problem(where, "missing member", f"{where}: there is no image with the id {known!r}")
            continue
        unseen.pop(known, None)
        yield Row(where, {**images[known], "caption": entry.get("caption")})
    for known in unseen:
        where = f"{path}:image {known}"
        yield Row(where, images[known])  # without a caption, which is for the job to judge


def open_karpathy(config: SourceConfig, errors: Errors) -> ColumnSource:
    """``{"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}``; ``restval`` belongs to the training
    set: ``split: train+restval``."""
    data = _read(config, is_karpathy, '"images" with "sentences"')
    folder = parent(config.path)
    above = parent(folder)
    return collect(
        config,
        _karpathy_rows(data, config.path),
        errors,
        (join(folder, "images"), folder, join(above, "images"), above),
    )


def _karpathy_rows(data: Mapping[str, Any], path: str) -> Iterator[Row | Problem]:
    for number, image in enumerate(data["images"]):
        where = f"{path}:images[{number}]"
        if not isinstance(image, dict):
            yield Problem(where, "wrong type", f"{where}: expected a JSON object, found {type(image).__name__}")
            continue
        folder, name = image.get("filepath"), image.get("filename")
        if isinstance(folder, str) and isinstance(name, str) and folder:
            image = {**image, "image": f"{folder.rstrip('/')}/{name}"}
        yield Row(where, image)


def _read(config: SourceConfig, fits: Any, wanted: str) -> Mapping[str, Any]:
    data = read_json(config.path)
    if not isinstance(data, dict) or not fits(data):
        raise DataError(f"{config.path}: not a JSON object with {wanted}")
    return data
