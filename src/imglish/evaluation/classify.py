"""Zero-shot classification of a set of pictures: by the towers over all templates, by the fusion over the first one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from imglish.data.pictures import Picture
from imglish.data.records import Record
from imglish.evaluation.encoding import DEFAULT_MACHINE, Encodes, Machine, encode_captions, encode_pictures
from imglish.evaluation.rerank import PairList, ScoreRule, above_the_rest, match_pairs, nearest, pair_scores
from imglish.evaluation.zeroshot import Classification, class_features, class_scores, classification
from imglish.models.capabilities import Matches, has_towers

Table = tuple[list[str], list[list[str]]]
"""Headers and rows."""


@dataclass(frozen=True)
class ZeroShotConfig:
    """templates: each with ``{}``; rerank: classes a picture that the fusion scores, 0: none (a model without towers
    scores all); names: what a class of the data is called in a sentence, itself where it is not here."""

    templates: tuple[str, ...]
    rerank: int = 10
    names: Mapping[str, str] | None = None
    rule: ScoreRule = "itm"
    machine: Machine = DEFAULT_MACHINE


@dataclass(frozen=True)
class ZeroShotResult:
    """towers, fusion: None for a model without them. labels, scores: the class and the best scores ``(N, C)`` of each
    picture (only the order within a row means anything)."""

    classes: list[str]
    towers: Classification | None
    fusion: Classification | None
    labels: Tensor
    scores: Tensor
    notes: list[str]

    @property
    def best(self) -> Classification:
        found = self.fusion if self.fusion is not None else self.towers
        assert found is not None
        return found

    def rows(self) -> tuple[list[str], list[list[str]]]:
        found = {"towers": self.towers, "fusion": self.fusion}
        count = len(self.classes)
        table = [
            [name, *(f"{value:.1f}" for value in (one.top1, one.top5, one.mean_recall, one.ties))]
            for name, one in found.items()
            if one is not None
        ]
        return ["scores", "top-1", f"top-{min(5, count)}", "mean recall", "ties"], table

    def class_rows(self) -> tuple[list[str], list[list[str]]]:
        return class_table(self.best)

    def text(self) -> str:
        """Both tables for a terminal."""
        return two_tables(self.rows(), self.class_rows(), self.notes)

    def to_json(self) -> str:
        held = {name: asdict(one) if one else None for name, one in (("towers", self.towers), ("fusion", self.fusion))}
        return json.dumps(held | {"notes": self.notes}, indent=1, ensure_ascii=False)


def class_table(found: Classification) -> Table:
    """A row for each class."""
    rows = [
        [one.name, str(one.pictures), f"{one.recall:.1f}", f"{one.taken_for} ({one.taken})" if one.taken else ""]
        for one in found.classes
    ]
    return ["class", "pictures", "recall", "most often taken for"], rows


def two_tables(first: Table, second: Table, notes: Sequence[str]) -> str:
    """Tables for a terminal, and what is to be said of them."""
    parts = []
    for headers, rows in (first, second):
        widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
        for row in [headers, *rows]:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            parts.append("  ".join(cells).rstrip())
        parts.append("")
    return "\n".join([*parts[:-1], *(f"note: {note}" for note in notes)])


def labelled(records: Sequence[Record], classes: Sequence[str] | None = None) -> tuple[list[str], Tensor]:
    """The classes (default: all that occur, sorted) and the number of each record's, int64 ``(N,)``.

    Raises ``ValueError`` on a record without a class or with several, on fewer than two classes and without records.
    """
    if not records:
        raise ValueError("there are no pictures to classify")
    for record in records:
        if len(record.captions) != 1:
            raise ValueError(f"{record.key}: {len(record.captions)} captions in place of the name of a class")
    known = sorted({record.captions[0] for record in records}) if classes is None else list(classes)
    if len(known) < 2:
        raise ValueError(f"{len(known)} classes: there is nothing to choose from")
    numbers = {name: number for number, name in enumerate(known)}
    return known, torch.tensor([numbers[record.captions[0]] for record in records])


def evaluate_zeroshot(
    model: nn.Module,
    tokenizer: Encodes,
    records: Sequence[Record],
    load: Callable[[Record], Picture],
    config: ZeroShotConfig,
) -> ZeroShotResult:
    """Classify the pictures of ``records``, whose one caption is the name of the class; the classes are all such names.

    Raises ``ValueError`` on a record without a class or with several.
    """
    classes, labels = labelled(records)
    called = [(config.names or {}).get(name, name) for name in classes]
    sentences = [template.format(name) for name in called for template in config.templates]
    training = model.training
    model.eval()
    try:
        towers, fusion = _scores(model, tokenizer, records, load, config, sentences, len(classes))
    finally:
        model.train(training)
    best = fusion if fusion is not None else towers
    if best is None:
        raise ValueError("a model without towers needs rerank above 0")
    notes = []
    if len(classes) <= 5:
        notes.append(f"top-5 of {len(classes)} classes is always 100 %")
    if fusion is not None and towers is not None and config.rerank > len(classes):
        notes.append(f"rerank {config.rerank} clamped to the {len(classes)} classes")
    if fusion is not None and len(config.templates) > 1:
        notes.append(f"the fusion reads the first template alone: {config.templates[0]}")
    return ZeroShotResult(
        classes=classes,
        towers=classification(towers, labels, classes) if towers is not None else None,
        fusion=classification(fusion, labels, classes) if fusion is not None else None,
        labels=labels,
        scores=best,
        notes=notes,
    )


def _scores(
    model: nn.Module,
    tokenizer: Encodes,
    records: Sequence[Record],
    load: Callable[[Record], Picture],
    config: ZeroShotConfig,
    sentences: list[str],
    classes: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Scores ``(N, C)`` of the towers and of the fusion, on the host."""
    fuses = isinstance(model, Matches) and config.rerank > 0
    machine, each = config.machine, len(config.templates)
    with machine.store() as store:
        features = encode_pictures(model, records, load, machine, store if fuses else None)
        texts = encode_captions(model, sentences, tokenizer, machine, keep_rows=fuses)
        towers = None
        if has_towers(model):
            named = class_features(texts.features.unflatten(0, (classes, each)))
            towers = class_scores(features, named).cpu()
        if not fuses:
            return towers, None
        if towers is None:
            chosen = torch.arange(classes).expand(len(records), -1)
        else:
            chosen = nearest(features, named, min(config.rerank, classes))
        image = torch.arange(len(records))[:, None].expand_as(chosen)
        pairs = PairList.named(image.flatten(), chosen.flatten() * each, len(sentences))
        logits = match_pairs(model, store, texts, pairs, len(records), machine)
    place = pairs.find(image, chosen * each).flatten()
    cosine = torch.zeros(chosen.numel()) if towers is None else towers.gather(1, chosen).flatten()
    scored = pair_scores(logits[place], cosine, config.rule).view(chosen.shape)
    return towers, scored if towers is None else above_the_rest(towers, chosen, scored)
