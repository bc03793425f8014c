"""Grounding measured: does the heat map of a text lie on what the text is about?

Two questions: is its highest point inside of the right box (the pointing game, Zhang et al. 2016); does it choose the
right one among proposed boxes (RefCOCO, by ALBEF's rule). Both stand beside answers that need no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from imglish.data.errors import DataError, Errors, Problem
from imglish.data.images import ImageError, decode
from imglish.data.pictures import picture_of
from imglish.data.tasks.examples import items_of, picture
from imglish.evaluation.encoding import DEFAULT_MACHINE, Machine
from imglish.evaluation.explain import Explanation, Method, ReadsWords, explain_pairs
from imglish.evaluation.grounding import Box, overlap, points_at, proposal_scores
from imglish.evaluation.heatmaps import over_picture
from imglish.evaluation.retrieval import text_table
from imglish.evaluation.sharing import blocks, mine
from imglish.models.capabilities import MissingCapabilityError
from imglish.objectives.gather import world_size

MAPS = ("whole text", "words")


@dataclass(frozen=True)
class Reference:
    """A text about something in a picture. boxes: where that is, one or several, ``left, top, width, height``;
    proposals: boxes to choose among, or none; size: (width, height) in which boxes are given, None: the picture's own;
    group: what results are listed by; place: ``file:number``."""

    place: str
    image: Path
    text: str
    boxes: tuple[Box, ...]
    proposals: tuple[Box, ...] = ()
    size: tuple[int, int] | None = None
    group: str = ""

    def rightly(self, box: Box) -> bool:
        """Whether ``box`` overlaps one of the right ones by half or more."""
        return any(overlap(box, right, pixels=True) >= 0.5 for right in self.boxes)


def read_references(path: Path, images: Path | None, errors: Errors, template: str = "{}") -> list[Reference]:
    """References of a file, JSON or JSON lines, of one of two layouts.

    ``{"image", "text", "bbox"}``, one line a text (or a list of texts), perhaps with ``proposals``, a list of boxes;
    and ``{"image", "objects": [{"label", "bbox_xywh"}]}``, a line a picture, whose labels become texts by ``template``:
    the right boxes are all with that label, the proposals all of the picture (none where it has one label only).
    ``orig_size`` ([width, height]) says in which size boxes are given; ``split`` or the label is the group. images:
    folder of the pictures (default: where the file lies). What is wrong is counted in ``errors``; too much of it, or
    nothing else, is a :class:`DataError`.
    """
    if template.count("{}") != 1:
        raise ValueError(f"template {template!r}: expected one {{}}, where the label goes")

    def parse(file: Path, place: str, entry: Any) -> list[Reference]:
        """All references to one picture."""
        return list(_references(entry, place, images or file.parent, template))

    found = items_of([path], parse, lambda reference: [reference.image], errors)
    if not found:
        raise DataError(f"{path}: no reference to evaluate on ({errors.summary() or 'no entries'})")
    return found


def _references(entry: Any, place: str, images: Path, template: str) -> Iterator[Reference]:
    if not isinstance(entry, Mapping):
        raise TypeError(f"{type(entry).__name__} in place of an object")
    image, size = picture(images, entry["image"]), entry.get("orig_size")
    if size is not None:
        width, height = size
        size = int(width), int(height)
    if "objects" not in entry:
        texts = [entry["text"]] if isinstance(entry["text"], str) else entry["text"]
        proposals = tuple(_box(box) for box in entry.get("proposals", ()))
        if not texts:
            raise ValueError("no text")
        for text in texts:
            box = _box(entry["bbox"])
            yield Reference(place, image, _text(text), (box,), proposals, size, str(entry.get("split", "")))
        return
    labelled: dict[str, list[Box]] = {}
    for thing in entry["objects"]:
        labelled.setdefault(_text(thing["label"]), []).append(_box(thing["bbox_xywh"]))
    if not labelled:
        raise ValueError("no objects")
    proposals = tuple(box for boxes in labelled.values() for box in boxes) if len(labelled) > 1 else ()
    for label, boxes in labelled.items():
        yield Reference(place, image, template.format(label), tuple(boxes), proposals, size, label)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{value!r} in place of a text")
    return value


def _box(value: Any) -> Box:
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"a box {value!r}: expected left, top, width, height")
    left, top, width, height = (float(side) for side in value)
    if not (width > 0 and height > 0 and left + width > 0 and top + height > 0):
        raise ValueError(f"a box {value!r}: expected left, top, width, height with positive sides")
    return left, top, width, height


@dataclass(frozen=True)
class Judged:
    """What the maps of one reference did, by the names of :data:`MAPS`: points: its highest point is right; chosen: the
    number of the proposal (empty without proposals); right: whether that is a right one."""

    score: float
    points: dict[str, bool]
    chosen: dict[str, int]
    right: dict[str, bool]
    chance: dict[str, float]


@dataclass(frozen=True)
class GroundingResult:
    """pointing, choice: percent of right answers by the maps and by what needs no model; the names are those of the
    table. groups: name -> (references, pointing by the whole text). judged: of each reference, None where its picture
    could not be read."""

    method: Method
    references: int
    choices: int
    pointing: dict[str, float]
    choice: dict[str, float]
    groups: dict[str, tuple[int, float]]
    notes: tuple[str, ...]
    judged: tuple[Judged | None, ...] = field(repr=False, compare=False)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows of the table."""
        names = dict.fromkeys([*self.pointing, *self.choice])
        cells = [
            [name, *(f"{side[name]:.1f}" if name in side else "–" for side in (self.pointing, self.choice))]
            for name in names
        ]
        return ["answered by", f"pointing ({self.references})", f"choice ({self.choices})"], cells

    def text(self) -> str:
        """The table for a terminal."""
        head = f"{self.references} references, maps by {self.method}; percent"
        return "\n".join([head, text_table(*self.rows()), *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> str:
        return json.dumps({k: v for k, v in asdict(self).items() if k != "judged"}, indent=1, ensure_ascii=False)


def evaluate_grounding(
    model: nn.Module,
    tokenizer: ReadsWords,
    references: Sequence[Reference],
    machine: Machine = DEFAULT_MACHINE,
    layer: int | None = None,
    errors: Errors | None = None,
) -> GroundingResult:
    """Explain every reference and judge its maps; under ``torchrun`` the ranks share the work, and the numbers depend
    neither on how many they are nor, but for rounding, on ``machine.image_block``.

    layer: as in :func:`imglish.evaluation.explain.token_maps`. Pictures that cannot be read are counted in ``errors``
    (default: 1 % at most). Raises ``MissingCapabilityError`` for a model of which there are no maps.
    """
    if not references:
        raise ValueError("there are no references to evaluate on")
    config: Any = model.config
    transform = config.image.transform()
    if transform is None:
        raise MissingCapabilityError("grounding needs maps over patches; this model reads the regions of a detector")
    parts = blocks(len(references), machine.image_block)
    judged: dict[int, Judged] = {}
    lost: dict[int, Problem] = {}
    method: Method = "grad-cam"
    with machine.bar(len(mine(len(parts))), "grounding", "block") as bar:
        for part in mine(len(parts)):
            opened: dict[int, Image.Image] = {}
            for number in parts[part]:
                try:
                    opened[number] = decode(references[number].image)
                except ImageError as error:
                    lost[number] = Problem(references[number].place, error.reason, str(error))
            if opened:
                pixels = [picture_of(transform(image), transform) for image in opened.values()]
                texts = [references[number].text for number in opened]
                for (number, image), found in zip(
                    opened.items(), explain_pairs(model, tokenizer, pixels, texts, layer), strict=True
                ):
                    method = found.method
                    judged[number] = _judge(references[number], found, image, transform)
            bar.update()
    if world_size() > 1:
        everyone: list[Any] = [None] * world_size()
        dist.all_gather_object(everyone, (judged, lost, method))
        judged = {number: one for part, _, _ in everyone for number, one in part.items()}
        lost = {number: one for _, part, _ in everyone for number, one in part.items()}
        method = everyone[0][2]
    errors = Errors() if errors is None else errors
    errors.extend_checked([lost[number] for number in sorted(lost)], len(references))
    return _summary(method, references, [judged.get(number) for number in range(len(references))], len(lost))


def _judge(reference: Reference, found: Explanation, image: Image.Image, transform: Any) -> Judged:
    size = reference.size or image.size
    maps = {"whole text": found.whole} | ({"words": found.maps.mean(0)} if len(found.maps) else {})
    points, chosen, right = {}, {}, {}
    for name, heat in maps.items():
        spread = over_picture(heat, size, transform)
        points[name] = points_at(spread, size, reference.boxes)
        if reference.proposals:
            chosen[name] = int(proposal_scores(spread, reference.proposals).argmax())
            right[name] = reference.rightly(reference.proposals[chosen[name]])
    return Judged(found.score, points, chosen, right, _without_model(reference, size))


def _without_model(reference: Reference, size: tuple[int, int]) -> dict[str, float]:
    """How often answers are right that look at nothing: the picture's centre, any point, any proposal, the largest."""
    width, height = size
    inside = torch.zeros(height, width)
    for left, top, across, down in reference.boxes:
        inside[max(int(top), 0) : int(top + down), max(int(left), 0) : int(left + across)] = 1
    chances = {"centre": float(inside[height // 2, width // 2]), "any": float(inside.mean())}
    if reference.proposals:
        rightly = [float(reference.rightly(box)) for box in reference.proposals]
        areas = [box[2] * box[3] for box in reference.proposals]
        chances |= {"any proposal": sum(rightly) / len(rightly), "largest": rightly[areas.index(max(areas))]}
    return chances


def _summary(
    method: Method, references: Sequence[Reference], judged: Sequence[Judged | None], lost: int
) -> GroundingResult:
    known = [(one, found) for one, found in zip(references, judged, strict=True) if found is not None]
    if not known:
        raise DataError("no picture of the references can be read")
    offered = [found for one, found in known if one.proposals]
    pointing = {f"map of the {name}": _percent(f.points[name] for _, f in known) for name in known[0][1].points}
    pointing["the picture's centre"] = _percent(found.chance["centre"] for _, found in known)
    pointing["any point"] = _percent(found.chance["any"] for _, found in known)
    choice = {}
    if offered:
        choice = {f"map of the {name}": _percent(f.right[name] for f in offered) for name in offered[0].right}
        choice["the largest box"] = _percent(found.chance["largest"] for found in offered)
        choice["any box"] = _percent(found.chance["any proposal"] for found in offered)
    grouped: dict[str, list[bool]] = {}
    for one, found in known:
        grouped.setdefault(one.group, []).append(found.points[MAPS[0]])
    groups = {name: (len(hits), _percent(hits)) for name, hits in sorted(grouped.items())}
    notes = (f"{lost} references left out: their pictures cannot be read",) if lost else ()
    return GroundingResult(method, len(known), len(offered), pointing, choice, groups, notes, tuple(judged))


def _percent(values: Any) -> float:
    held = [float(value) for value in values]
    return 100 * sum(held) / len(held)
