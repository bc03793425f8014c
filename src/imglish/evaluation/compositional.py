"""Suites of compositional understanding: captions that differ in who has what, which relation, which attribute.

Two kinds of items. A pair: one picture, a true and a false caption (SugarCrepe, Hsieh et al. 2023; ARO, Yuksekgonul et
al. 2023). A quadruple: two pictures, two captions (Winoground, Thrush et al. 2022; COLA, Ray et al. 2023; ColorSwap,
Burapacheep et al. 2024).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from imglish.data.errors import DataError, Errors
from imglish.data.images import decode
from imglish.data.pictures import Picture
from imglish.data.records import Record
from imglish.data.tasks.examples import items_of, picture
from imglish.evaluation.encoding import DEFAULT_MACHINE, Encodes, Machine
from imglish.evaluation.metrics import binding_correct, pairwise_correct
from imglish.evaluation.pairs import score_pairs
from imglish.evaluation.rerank import ScoreRule

Crop = tuple[int, int, int, int]


@dataclass(frozen=True)
class Item:
    """captions: true of the first picture, then false of it (a pair) or true of the second picture (a quadruple).

    pictures: (file, box in pixels ``left, top, right, bottom`` or None) of one or two pictures; group: its name within
    the suite; place: ``file:number``.
    """

    place: str
    group: str
    pictures: tuple[tuple[Path, Crop | None], ...]
    captions: tuple[str, str]


def read_items(path: Path, images: Path | None, errors: Errors) -> list[Item]:
    """Items of a file (JSON or JSON lines) or of all such files in a folder, whose layout is recognised by its fields.

    images: folder of the pictures (default: where the file lies). An item with a missing field or picture is counted
    in ``errors``; too many of them, or none that is well, are a :class:`DataError`.
    """
    files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl")) if path.is_dir() else [path]

    def parse(file: Path, place: str, entry: Any) -> list[Item]:
        """The one item of an entry."""
        return [_item(entry, place, file.stem, images or file.parent)]

    items = items_of(files, parse, lambda item: (shown for shown, _ in item.pictures), errors)
    if not items:
        raise DataError(f"{path}: no item to evaluate on ({errors.summary() or 'no entries'})")
    return items


def _item(entry: Any, place: str, stem: str, images: Path) -> Item:
    """One entry of any of the layouts. Raises ``KeyError``, ``TypeError`` or ``ValueError`` where it is of none."""
    if isinstance(entry, list):  # COLA: picture, caption, picture, caption
        if len(entry) != 4:
            raise ValueError(f"{len(entry)} parts in place of picture, caption, picture, caption")
        first, one, second, other = (_text(part) for part in entry)
        names = [name.rpartition("/")[2] for name in (first, second)]
        return Item(place, "cola", _whole(names, images), (one, other))
    if not isinstance(entry, Mapping):
        raise TypeError(f"{type(entry).__name__} in place of an object or a list")
    if "images" in entry:  # drawn scenes
        first, second = entry["images"]
        one, other = entry["captions"]
        group = ", ".join(str(entry[name]) for name in ("split", "kind", "language") if name in entry) or stem
        return Item(place, group, _whole((first, second), images), (_text(one), _text(other)))
    if "caption_0" in entry or "caption_2" in entry:  # Winoground counts from 0, ColorSwap from 1
        suite, both = ("winoground", (0, 1)) if "caption_0" in entry else ("colorswap", (1, 2))
        names = [_winoground_name(_text(entry[f"image_{i}"])) for i in both]
        captions = (_text(entry[f"caption_{both[0]}"]), _text(entry[f"caption_{both[1]}"]))
        return Item(place, str(entry.get("collapsed_tag", suite)), _whole(names, images), captions)
    if "true_caption" in entry:  # ARO: a box of the picture is shown
        crop = None
        if "bbox_x" in entry:
            x, y, w, h = (int(entry[f"bbox_{side}"]) for side in "xywh")
            crop = (x, y, x + w, y + h)
        attributes = entry.get("attributes")
        group = "_".join(map(str, attributes)) if attributes else str(entry.get("relation_name", stem))
        captions = (_text(entry["true_caption"]), _text(entry["false_caption"]))
        return Item(place, group, ((picture(images, entry["image_path"]), crop),), captions)
    name = picture(images, entry["filename"] if "filename" in entry else entry["image"])  # SugarCrepe
    captions = (_text(entry["caption"]), _text(entry["negative_caption"]))
    return Item(place, str(entry.get("type", stem)), ((name, None),), captions)


def _whole(names: Sequence[Any], images: Path) -> tuple[tuple[Path, Crop | None], ...]:
    return tuple((picture(images, name), None) for name in names)


def _winoground_name(name: str) -> str:
    """Winoground names its pictures without the suffix of their files."""
    return name if Path(name).suffix else f"{name}.png"


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{value!r} in place of a text")
    return value


@dataclass(frozen=True)
class GroupScores:
    """One group of items. towers, fusion: percent by name of the score (``accuracy`` of pairs; ``text``, ``image``,
    ``group`` of quadruples), None for a model without them."""

    name: str
    count: int
    chance: dict[str, float]
    towers: dict[str, float] | None
    fusion: dict[str, float] | None


@dataclass(frozen=True)
class CompositionalResult:
    """groups: the scores of each group, then their mean (macro average) under ``mean``, for each kind of item.

    right: for each item, whether its best score (fusion, else towers) is right; margin: by how much.
    """

    groups: list[GroupScores]
    means: list[GroupScores]
    right: list[bool]
    margin: list[float]
    ties: float
    score_rule: str
    notes: list[str] = field(default_factory=list)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows of the table."""
        rows = []
        for one in [*self.groups, *self.means]:
            for name, chance in one.chance.items():
                cells = [f"{scores[name]:.1f}" if scores else "–" for scores in (one.towers, one.fusion)]
                rows.append([one.name, name, str(one.count), *cells, f"{chance:.1f}"])
        return ["items", "score", "count", "towers", "fusion", "chance"], rows

    def text(self) -> str:
        """The table for a terminal."""
        headers, rows = self.rows()
        widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [headers, *rows]
        ]
        return "\n".join([*(line.rstrip() for line in lines), *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> str:
        table = {one.name: {"count": one.count, "towers": one.towers, "fusion": one.fusion} for one in self.groups}
        means = {one.name: {"count": one.count, "towers": one.towers, "fusion": one.fusion} for one in self.means}
        held = {"groups": table, "means": means, "ties": self.ties, "score_rule": self.score_rule, "notes": self.notes}
        return json.dumps(held, indent=1, ensure_ascii=False)


def evaluate_compositional(
    model: nn.Module,
    tokenizer: Encodes,
    items: Sequence[Item],
    load: Callable[[Record], Picture],
    machine: Machine = DEFAULT_MACHINE,
    rule: ScoreRule = "itm",
    least: int = 1,
) -> CompositionalResult:
    """Score all items in one pass. least: items that a group needs to count in the mean (25 for ARO's attributes)."""
    if not items:
        raise ValueError("there are no items to evaluate on")
    places: dict[tuple[Path, Crop | None], int] = {}
    words: dict[str, int] = {}
    image, caption = [], []  # of the four scores (picture, caption) of each item; a pair has its picture twice
    for item in items:
        shown = [places.setdefault(picture, len(places)) for picture in item.pictures]
        said = [words.setdefault(text, len(words)) for text in item.captions]
        image.append([[shown[0]] * 2, [shown[-1]] * 2])
        caption.append([said, said])
    pictures = [record_of(*picture) for picture in places]
    scored = score_pairs(
        model, tokenizer, pictures, list(words), torch.tensor(image), torch.tensor(caption), load, machine, rule
    )
    best = scored.fusion if scored.fusion is not None else scored.towers
    assert best is not None
    named: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        named.setdefault(f"{item.group}", []).append(number)
    groups = [_group(name, members, items, scored.towers, scored.fusion) for name, members in sorted(named.items())]
    pairs = torch.tensor([len(item.pictures) == 1 for item in items])
    margin = best[:, 0, 0] - best[:, 0, 1]
    both = torch.minimum(margin, best[:, 1, 1] - best[:, 1, 0])
    across = torch.minimum(best[:, 0, 0] - best[:, 1, 0], best[:, 1, 1] - best[:, 0, 1])
    margin = torch.where(pairs, margin, torch.minimum(both, across))
    return CompositionalResult(
        groups=groups,
        means=_means(groups, least),
        right=(margin > 0).tolist(),
        margin=margin.tolist(),
        ties=100.0 * float((margin == 0).double().mean()),
        score_rule=rule,
        notes=["the mean is over groups, whatever their sizes"] if len(groups) > 1 else [],
    )


def record_of(path: Path, crop: Crop | None) -> Record:
    """The picture as a record that loaders take."""
    return Record(str(path), path if crop is None else partial(_cropped, path, crop), (), 0)


def _cropped(path: Path, crop: Crop) -> Image.Image:
    return decode(path, name=str(path)).crop(crop)


def _group(
    name: str, members: list[int], items: Sequence[Item], towers: Tensor | None, fusion: Tensor | None
) -> GroupScores:
    kinds = {len(items[i].pictures) for i in members}
    if len(kinds) > 1:
        raise ValueError(f"group {name}: pairs and quadruples are mixed")
    quadruples = kinds == {2}
    chance = {"text": 25.0, "image": 25.0, "group": 100 / 6} if quadruples else {"accuracy": 50.0}

    def percent(scores: Tensor | None) -> dict[str, float] | None:
        if scores is None:
            return None
        mine = scores[members]
        found = binding_correct(mine) if quadruples else {"accuracy": pairwise_correct(mine[:, 0, 0], mine[:, 0, 1])}
        return {key: 100.0 * float(right.double().mean()) for key, right in found.items()}

    return GroupScores(name, len(members), chance, percent(towers), percent(fusion))


def _means(groups: Sequence[GroupScores], least: int) -> list[GroupScores]:
    """The macro average of each kind of items, over groups that are large enough."""
    found = []
    for kind in ("accuracy", "group"):
        alike = [one for one in groups if kind in one.chance and one.count >= least]
        if len(alike) > 1:
            sides = [
                _averaged([side for one in alike if (side := getattr(one, name)) is not None])
                for name in ("towers", "fusion")
            ]
            label = "mean of pairs" if kind == "accuracy" else "mean of quadruples"
            found.append(GroupScores(label, sum(one.count for one in alike), alike[0].chance, sides[0], sides[1]))
    return found


def _averaged(tables: list[dict[str, float]]) -> dict[str, float] | None:
    return {name: sum(table[name] for table in tables) / len(tables) for name in tables[0]} if tables else None
