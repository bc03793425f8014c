"""Drawn scenes as a folder of pictures and captions.

It holds ``images/SPLIT/*.png``; ``captions.jsonl`` with a line for every picture of the splits ``train``,
``seen`` and ``heldout``; ``quadruples.jsonl``, the questions who wears what; ``queries.jsonl``, searches and what they
should find; ``boxes.jsonl``, where in the pictures of ``seen`` and ``heldout`` garments are; and ``scenes.json``, the
settings. Equal settings give equal bytes.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from imglish import atomic
from imglish.data.records import Record
from imglish.data.scene_boxes import garment_boxes
from imglish.data.scene_drawing import SceneImage
from imglish.data.scene_world import Scene
from imglish.data.scenes import SceneBenchmark, SceneCaption, SceneConfig, SceneSource, Split

SETTINGS = "scenes.json"
SPLITS: tuple[Split, ...] = ("seen", "heldout")


def write_scenes(
    config: SceneConfig, out: Path, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> dict[str, int]:
    """Write the folder ``out``, at once or not at all; returns how many of what it holds.

    progress: wraps the numbers of the training pictures, to show them. Raises ``FileExistsError`` when something lies
    at ``out`` that is not an empty folder, ``ValueError`` for settings that cannot be met.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something; name a folder that is new or empty")
    source = SceneSource(config)
    splits = SPLITS if config.held_out else SPLITS[:1]
    benchmarks = {split: source.evaluation(split) for split in splits}
    with atomic.folder(out) as folder:
        for split in ("train", *splits):
            (folder / "images" / split).mkdir(parents=True)
        rows = _rows(source, benchmarks, folder, progress)
        counts = {"pictures": _write_lines(folder / "captions.jsonl", rows)}
        quadruples = (row for split, made in benchmarks.items() for row in _quadruples(split, made))
        counts["quadruples"] = _write_lines(folder / "quadruples.jsonl", quadruples)
        queries = (row for split, made in benchmarks.items() for row in _queries(split, made))
        counts["queries"] = _write_lines(folder / "queries.jsonl", queries)
        boxes = (row for split, made in benchmarks.items() for row in _boxes(split, made, config.size))
        counts["pictures with boxes"] = _write_lines(folder / "boxes.jsonl", boxes)
        settings = json.dumps(dataclasses.asdict(config), ensure_ascii=False, indent=1)
        (folder / SETTINGS).write_text(settings + "\n", encoding="utf-8")
    return counts


def _rows(
    source: SceneSource,
    benchmarks: dict[Split, SceneBenchmark],
    folder: Path,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> Iterator[dict[str, Any]]:
    """The lines of captions.jsonl; each picture is written on the way."""
    languages = source.config.languages
    for number in progress(range(source.config.scenes)):
        name, scene = f"train/scene-{number:05d}.png", source.training_scene(number)
        captions = source.training_captions(number)
        _draw(scene, source.config.size, folder / "images" / name)
        yield _row(name, "train", captions, scene) | {"noise": [caption.noise for caption in captions]}
    for split, made in benchmarks.items():
        for record, scene in zip(made.records, made.scenes, strict=True):
            _draw(scene, source.config.size, folder / "images" / _name(split, record))
            captions = [SceneCaption(text, "", lang) for text, lang in zip(record.captions, languages, strict=True)]
            yield _row(_name(split, record), split, captions, scene)


def _row(name: str, split: str, captions: list[SceneCaption], scene: Scene) -> dict[str, Any]:
    row: dict[str, Any] = {"image": name, "split": split, "captions": [caption.text for caption in captions]}
    if all(caption.swapped for caption in captions):
        row["swapped"] = [caption.swapped for caption in captions]
    row["languages"] = [caption.language for caption in captions]
    row["people"] = [{"kind": person.kind, **dict(person.worn())} for person in scene.people]
    row["things"] = [dict(thing.worn()) for thing in scene.things]
    return row


def _quadruples(split: Split, made: SceneBenchmark) -> Iterator[dict[str, Any]]:
    for quadruple in made.quadruples:
        pictures = [_name(split, record) for record in quadruple.pictures]
        about = {"kind": quadruple.kind, "language": quadruple.language, "split": split}
        yield {"images": pictures, "captions": list(quadruple.captions), **about}


def _queries(split: Split, made: SceneBenchmark) -> Iterator[dict[str, Any]]:
    for query in made.queries:
        relevant = [_name(split, made.records[number]) for number in query.relevant]
        yield {"texts": query.texts, "worn": [list(item) for item in query.worn], "relevant": relevant, "split": split}


def _boxes(split: Split, made: SceneBenchmark, size: int) -> Iterator[dict[str, Any]]:
    for record, scene in zip(made.records, made.scenes, strict=True):
        things = [{"label": label, "bbox_xywh": list(box)} for label, box in garment_boxes(scene, size)]
        yield {"image": _name(split, record), "split": split, "orig_size": [size, size], "objects": things}


def _name(split: Split, record: Record) -> str:
    return f"{split}/{record.key}.png"


def _draw(scene: Scene, size: int, path: Path) -> None:
    buffer = io.BytesIO()
    SceneImage(scene, size)().save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
