"""Captioning measured: every picture gets a caption, which BLEU, ROUGE-L and CIDEr-D compare with its references."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from imglish.data.errors import Errors, Problem
from imglish.data.pictures import Picture
from imglish.data.records import Record
from imglish.evaluation.caption_metrics import caption_scores
from imglish.evaluation.encoding import Machine, device_of, picture_loader
from imglish.evaluation.java_metrics import JavaMetric, java_scores
from imglish.evaluation.judging import Judge
from imglish.evaluation.ptb import tokenized
from imglish.evaluation.retrieval import merge_pictures, text_table
from imglish.evaluation.sharing import blocks, mine, on_first
from imglish.evaluation.unreadable import without
from imglish.generation.config import CAPTIONS, GenerationConfig
from imglish.generation.engine import Vocabulary
from imglish.generation.stream import captions_of
from imglish.models.capabilities import Captions, require
from imglish.objectives.gather import rank, world_size

TITLES = {"bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L"}
TITLES |= {"cider": "CIDEr-D", "meteor": "METEOR", "spice": "SPICE", "clip_score": "CLIPScore", "match": "match"}


@dataclass(frozen=True)
class CaptioningConfig:
    """generation: how captions are written (the first of several is scored); prompt: what they begin with (None: as
    the model was trained); machine: how it is computed, in blocks of ``image_block`` pictures; java: further metrics
    (see :mod:`imglish.evaluation.java_metrics`)."""

    generation: GenerationConfig = CAPTIONS
    prompt: str | None = None
    machine: Machine = field(default_factory=lambda: Machine(image_block=16))
    java: tuple[JavaMetric, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """A caption beside its references, with its scores by the names of :data:`TITLES`."""

    key: str
    caption: str
    score: float
    references: tuple[str, ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class CaptioningResult:
    """metrics: of the whole set, times 100 as published tables have them (CIDEr-D up to 1000); unfinished: captions
    that were cut at ``max_length``; words: mean length; distinct: different captions; seconds: wall clock."""

    images: int
    references: int
    metrics: dict[str, float]
    words: float
    distinct: int
    unfinished: int
    generation: GenerationConfig
    seconds: float
    predictions: tuple[Prediction, ...] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the predictions."""
        found = {name: value for name, value in self.__dict__.items() if name not in ("predictions", "generation")}
        return {**found, "generation": asdict(self.generation)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The table as headers and one row of text."""
        return [TITLES[name] for name in self.metrics], [[f"{value:.1f}" for value in self.metrics.values()]]

    def text(self) -> str:
        """Table and facts for a terminal."""
        return "\n".join(
            [
                f"{self.images} pictures, {self.references} references; metrics times 100",
                text_table(*self.rows()),
                f"{self.words:.1f} words a caption, {self.distinct} different captions, {self.unfinished} cut at "
                f"{self.generation.max_length} tokens, {self.seconds:.1f} s",
            ]
        )


def evaluate_captioning(
    model: nn.Module,
    tokenizer: Vocabulary,
    records: Sequence[Record],
    config: CaptioningConfig = CaptioningConfig(),
    *,
    load: Callable[[Record], Picture] | None = None,
    predictions: Path | None = None,
    errors: Errors | None = None,
    judge: Judge | None = None,
) -> CaptioningResult:
    """Caption the pictures of ``records`` and compare with their captions; under ``torchrun`` all ranks share the work.

    load: gives a record's picture in the form that the model takes (default: as its ``config.image`` says);
    predictions: a JSONL file that receives each caption as soon as it is written (one file a rank, numbered after the
    first); judge: a model that says how well captions fit their pictures, whatever the references say. The model is
    evaluated as ``eval()`` and put back. Pictures that cannot be read are left out and counted in
    ``errors`` (default: a log, 1 % at most). Raises ``MissingCapabilityError`` for a model that writes no captions and
    ``ImageError`` for too many unreadable pictures.
    """
    pictures = merge_pictures(records)[0] if records else []
    if not pictures:
        raise ValueError("there are no records to evaluate on")
    references = _references(records)
    require(model, Captions, "captioning")
    if load is None:
        model_config: Any = model.config
        load = picture_loader(model_config.image.transform())
    began, training = time.perf_counter(), model.training
    model.eval()
    try:
        written, lost = _write(model, tokenizer, pictures, load, config, predictions)
    finally:
        model.train(training)
    if lost:
        pictures = without(pictures, lost, Errors() if errors is None else errors)
    captions = [written[record.key] for record in pictures]
    sides = [references[record.image_id] for record in pictures]
    corpus, items = _scores(captions, sides, config.java)
    if judge is not None:
        for name, values in judge.scores(pictures, [one["caption"] for one in captions], config.machine).items():
            corpus[name] = sum(values) / len(values)
            items = [item | {name: value} for item, value in zip(items, values, strict=True)]
    found = [
        Prediction(record.key, one["caption"], one["score"], side, item)
        for record, one, side, item in zip(pictures, captions, sides, items)
    ]
    return CaptioningResult(
        images=len(pictures),
        references=sum(map(len, sides)),
        metrics={name: 100 * value for name, value in corpus.items()},
        words=sum(len(one.caption.split()) for one in found) / len(found),
        distinct=len({one.caption for one in found}),
        unfinished=sum(not one["ended"] for one in captions),
        generation=config.generation,
        seconds=time.perf_counter() - began,
        predictions=tuple(found),
    )


def _scores(
    captions: Sequence[dict[str, Any]], sides: Sequence[tuple[str, ...]], java: Sequence[JavaMetric]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Of the set and of each caption; the programs in Java run on rank 0 alone."""
    written = [tokenized(one["caption"]) for one in captions]
    references = [[tokenized(text) for text in side] for side in sides]
    scores = caption_scores(written, references)
    corpus, items = dict(scores.corpus), [dict(item) for item in scores.items]
    for metric in java:
        corpus[metric], each = on_first(partial(java_scores, metric, written, references))
        items = [item | {metric: value} for item, value in zip(items, each, strict=True)]
    return corpus, items


def _references(records: Sequence[Record]) -> dict[int, tuple[str, ...]]:
    """All captions of each picture."""
    found: dict[int, tuple[str, ...]] = {}
    for record in records:
        found[record.image_id] = found.get(record.image_id, ()) + record.captions
    return found


def _write(
    model: nn.Module,
    tokenizer: Vocabulary,
    pictures: Sequence[Record],
    load: Callable[[Record], Picture],
    config: CaptioningConfig,
    predictions: Path | None,
) -> tuple[dict[str, dict[str, Any]], dict[int, Problem]]:
    """Key -> caption, score, ended, from all ranks, each of which writes the blocks that are its own; and the pictures
    that could not be read, by ``image_id``."""
    parts = blocks(len(pictures), config.machine.image_block)
    own = [pictures[i] for part in mine(len(parts)) for i in parts[part]]
    device = device_of(model)
    stream = captions_of(
        model,
        tokenizer,
        own,
        load,
        lambda record: record.key,
        config.generation,
        prompt=config.prompt,
        block=config.machine.image_block,
        threads=config.machine.decoders,
        arithmetic=lambda: config.machine.arithmetic(device),
    )
    found: dict[str, dict[str, Any]] = {}
    lost: dict[int, Problem] = {}
    file = None
    if predictions is not None:
        predictions.parent.mkdir(parents=True, exist_ok=True)
        name = predictions if rank() == 0 else predictions.with_suffix(f".{rank()}{predictions.suffix}")
        file = name.open("w", encoding="utf-8")
    try:
        with config.machine.bar(len(own), "captions", "picture") as bar:
            for one in stream:
                if one.problem is not None:
                    lost[one.item.image_id] = Problem(one.item.key, one.problem.reason, str(one.problem))
                    bar.update()
                    continue
                best = one.captions[0]
                found[one.item.key] = {"caption": best.text, "score": best.score, "ended": best.ended}
                if file is not None:
                    line = {"key": one.item.key, "captions": [c.text for c in one.captions], "score": best.score}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                bar.update()
    finally:
        if file is not None:
            file.close()
    if world_size() > 1:
        everyone: list[Any] = [None] * world_size()
        dist.all_gather_object(everyone, (found, lost))
        found = {key: value for part, _ in everyone for key, value in part.items()}
        lost = {number: problem for _, part in everyone for number, problem in part.items()}
    return found, lost
