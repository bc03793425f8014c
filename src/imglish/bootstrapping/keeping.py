"""What a filter kept, as data: a list with a line for each picture, and on request shards with the pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from imglish import atomic
from imglish.bootstrapping.filtering import MEASURES, Decisions, FilterConfig, Scores, groups
from imglish.bootstrapping.stage import Stage
from imglish.data.errors import DataError
from imglish.data.records import Record
from imglish.data.shards import ShardConfig, ShardReport, shard
from imglish.data.sources.arrow import pyarrow
from imglish.data.sources.files import is_remote

SETTINGS = "filter.json"
SOURCE = "keep.yaml"


def write(
    out: Path,
    stage: Stage,
    scores: Scores,
    decisions: Decisions,
    config: FilterConfig,
    parquet: bool = False,
    beside: Sequence[Mapping[str, Any]] = (),
    shards: str | None = None,
) -> Path:
    """Write the keep-list and its settings to ``out``; gives the path to use as data.

    ``keep.jsonl`` (or ``.parquet``) has the picture, its kept ``captions``, and their origins and scores;
    ``keep.yaml`` says where the pictures are and is a source of data, with those of ``beside`` (settings of a source).
    Where pictures are no files of their own (tars, tables), the list is without them: :func:`write_shards` makes data
    of it, which ``shards`` names, seen from ``out``. ``filter.json`` is written last. Raises :class:`DataError` when no
    row is kept, before anything is written.
    """
    if not decisions.kept.any():
        dropped = {reason: count for reason, count in decisions.counts().items() if count}
        said = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise DataError(f"no row is kept, so nothing is written ({said or 'there are no rows'})")
    roots = _roots(scores)
    named = pictures_are_files(scores)
    out.mkdir(parents=True, exist_ok=True)
    keep = out / ("keep.parquet" if parquet else "keep.jsonl")
    rows = _rows(scores, decisions.kept, named, len(roots) > 1)
    if parquet:
        arrow = pyarrow()
        table = arrow.Table.from_pylist(list(rows))
        atomic.write_file(keep, lambda file: arrow.parquet.write_table(table, file))
    else:
        lines = (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        atomic.write_file(keep, lambda file: file.writelines(lines))
    (out / SOURCE).unlink(missing_ok=True)
    sources = [dict(entry) for entry in beside]
    if named:
        sources.insert(0, {"path": keep.name, "images": roots[0] if len(roots) == 1 else os.path.commonpath(roots)})
    elif shards is not None:
        sources.insert(0, {"path": shards})
    if sources:
        text = yaml.safe_dump({"sources": sources}, sort_keys=False)
        atomic.write_file(out / SOURCE, lambda file: file.write(text.encode()))
    data = about(stage, config, beside) | {"counts": decisions.counts()}
    atomic.write_file(out / SETTINGS, lambda file: file.write(json.dumps(data, indent=1).encode()))
    return out / SOURCE if sources else keep


def about(stage: Stage, config: FilterConfig, beside: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What a choice depends on: the folder of scores, how these were made, and the rules."""
    made = {"made": stage.settings, "settings": asdict(config), "beside": [dict(entry) for entry in beside]}
    plain: dict[str, Any] = json.loads(json.dumps({"scores": str(stage.out.resolve()), **made}))
    return plain


def is_written(out: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether ``out`` holds the choice that ``wanted`` (:func:`about`) describes. Raises :class:`DataError` where it
    holds another one."""
    if not (out / SETTINGS).is_file():
        return False
    found = _settings(out)
    if differ := sorted(name for name in wanted if found.get(name) != wanted[name]):
        raise DataError(
            f"{out} holds a choice made from other {', '.join(differ)}; remove the folder, with all that was trained "
            "on it, or choose another"
        )
    return True


def _roots(scores: Scores) -> list[str]:
    return sorted(set(scores.table["root"].unique().to_pylist()), key=str)


def pictures_are_files(scores: Scores) -> bool:
    """Whether a list can name all pictures: files of their own, below one folder."""
    roots = _roots(scores)
    return None not in roots and (len(roots) == 1 or not any(is_remote(root) for root in roots))


def _rows(scores: Scores, kept: np.ndarray, named: bool, absolute: bool) -> Iterator[dict[str, Any]]:
    rows = np.flatnonzero(kept)
    measures = [name for name in MEASURES if scores.has(name)]
    chosen = scores.table.take(rows)
    columns = {name: chosen[name].to_pylist() for name in ("key", "root", "image", "origin", "text")}
    values = {name: np.round(scores.measures[name][rows].astype(np.float64), 5) for name in measures}
    for own in groups(scores.picture[rows], np.arange(len(rows))):
        first = int(own[0])
        row: dict[str, Any] = {"key": columns["key"][first]}
        if named:
            name = columns["image"][first]
            row["image"] = os.path.join(columns["root"][first], name) if absolute else name
        row["captions"] = [columns["text"][i] for i in own]
        row["origins"] = [columns["origin"][i] for i in own]
        for name in measures:
            row[name] = [None if np.isnan(value) else float(value) for value in values[name][own]]
        yield row


def settings_of(out: Path) -> tuple[Path, FilterConfig]:
    """Scores and settings of an earlier filter, to ask it why."""
    data = _settings(out)
    try:
        plain = dict(data["settings"])
        plain["languages"] = tuple(plain["languages"])
        plain["best"] = tuple((int(count), measure) for count, measure in plain["best"])
        return Path(data["scores"]), FilterConfig(**plain)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out / SETTINGS} cannot be read: {error}") from error


def _settings(out: Path) -> dict[str, Any]:
    try:
        found = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{out / SETTINGS} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{out / SETTINGS} cannot be read: it holds no settings")
    return found


def write_shards(out: Path, stage: Stage, scores: Scores, kept: np.ndarray, config: ShardConfig) -> ShardReport:
    """Tar shards of the kept pictures with their kept texts. The source is only read."""
    rows = np.flatnonzero(kept)
    chosen = scores.table.select(["shard", "record", "text"]).take(rows)
    texts, numbers, records = (chosen[name].to_pylist() for name in ("text", "shard", "record"))
    found: list[Record] = []
    for own in groups(scores.picture[rows], np.arange(len(rows))):
        first = int(own[0])
        record = stage.records(stage.shards[numbers[first]])[records[first]]
        captions = tuple(texts[i] for i in own)
        found.append(replace(record, captions=captions, swapped=(), image_id=len(found)))
    return shard(found, out, config)
