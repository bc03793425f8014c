"""Retrieval by towers and by fusion reranking: every picture and every caption is encoded once.

Align before fuse, in use: the towers compare everything by dot product, the fusion tower looks again at the first k.
The result does not depend on the number of ranks, and on block sizes only by rounding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from imglish.data.aspect import AspectTransform
from imglish.data.errors import Errors, Problem
from imglish.data.images import ImageTransform
from imglish.data.pictures import Picture
from imglish.data.records import Record
from imglish.evaluation.encoding import Encodes, Machine, encode_captions, encode_pictures, picture_loader
from imglish.evaluation.metrics import TIES, Ties, beyond, both_ways, ranks, recalls_within
from imglish.evaluation.rerank import (
    SCORE_RULES,
    PairList,
    ScoreRule,
    above_the_rest,
    match_pairs,
    nearest,
    pair_scores,
)
from imglish.evaluation.unreadable import Tolerant, UnreadablePictures, without
from imglish.models.capabilities import EncodedTexts, Matches, can, has_towers

UNASKED = 1_000_000  # pairs that a model without towers scores without ``all_pairs``


@dataclass(frozen=True)
class RetrievalConfig:
    """What to measure.

    rerank: how many candidates of each query the fusion scores, both ways (0: towers only); all_pairs: it scores every
    pair, for sets of up to ``all_pairs_limit`` pairs (a model without towers always does, unasked up to
    :data:`UNASKED` pairs); sweep: also report recalls for these smaller k (no extra work of
    the model); ks: which R@k; ties: who wins ties, see :data:`imglish.evaluation.metrics.TIES`; score_rule: see
    :data:`imglish.evaluation.rerank.ScoreRule`; examples: length of the lists kept for reports.
    """

    rerank: int = 32
    all_pairs: bool = False
    all_pairs_limit: int = 10_000_000
    sweep: tuple[int, ...] = ()
    ks: tuple[int, ...] = (1, 5, 10)
    ties: Ties = "pessimistic"
    score_rule: ScoreRule = "itm"
    examples: int = 10
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        if self.rerank < 0:
            raise ValueError(f"rerank is {self.rerank}: 0 means towers only, k > 0 the first k of each query")
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks is {self.ks}: recalls need at least one k, from 1")
        if any(k < 1 for k in self.sweep):
            raise ValueError(f"sweep is {self.sweep}: every k has to be at least 1")
        if self.ties not in TIES:
            raise ValueError(f"ties is {self.ties!r}: choose one of {', '.join(TIES)}")
        if self.score_rule not in SCORE_RULES:
            raise ValueError(f"score_rule is {self.score_rule!r}: choose one of {', '.join(SCORE_RULES)}")


@dataclass(frozen=True)
class Lists:
    """What the queries found, for reports.

    found: pictures of each text query, best first, int64 ``(T, n)``; score: of each, ``(T, n)``; rank: ``(T,)`` of the
    right picture, 0 = first; text_rank: ``(I,)`` of each picture's best caption.
    """

    found: Tensor
    score: Tensor
    rank: Tensor
    text_rank: Tensor


@dataclass(frozen=True)
class RetrievalResult:
    """Recalls in percent under the names of :func:`imglish.evaluation.metrics.recalls`, and how they were measured.

    towers: by dot product, None for a model without towers; reranked: with the first ``rerank`` candidates ordered by
    the fusion, or None (one of the two is there); sweep: k -> the same for smaller k; image_to_image, text_to_text:
    where the data allow; pairs: how many pairs the fusion scored; seconds: wall clock of each part; notes: what was
    clamped or left out; left_out: ``image_id`` of pictures that could not be read. tower_lists, reranked_lists: for
    examples, not part of :meth:`to_dict`.
    """

    images: int
    texts: int
    rerank: int
    score_rule: str
    ties: str
    pairs: int
    towers: dict[str, float] | None
    reranked: dict[str, float] | None
    sweep: dict[int, dict[str, float]]
    image_to_image: dict[str, float] | None
    text_to_text: dict[str, float] | None
    seconds: dict[str, float]
    notes: tuple[str, ...]
    tower_lists: Lists | None = field(repr=False, compare=False)
    reranked_lists: Lists | None = field(repr=False, compare=False)
    left_out: tuple[int, ...] = ()

    @property
    def best(self) -> dict[str, float]:
        """The reranked recalls where there are any, else those of the towers: what a training run watches."""
        found = self.reranked if self.reranked is not None else self.towers
        assert found is not None
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the lists."""
        found = asdict(replace(self, tower_lists=None, reranked_lists=None))
        del found["tower_lists"], found["reranked_lists"]
        return found

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The table as headers and rows of text: a line for each way of ranking."""
        ks = [name.removeprefix("t2i_r") for name in self.best if name.startswith("t2i_r")]
        headers = ["ranking"]
        for way in ("text→image", "image→text"):  # the direction stands in the first of its columns
            headers += [f"{way} R@{k}" if k == ks[0] else f"R@{k}" for k in ks]
        headers += ["mean", "ties"]
        lines = [self._row("towers", self.towers, ks)] if self.towers is not None else []
        for k, table in sorted(self.sweep.items()):
            lines.append(self._row(f"reranked, first {k}", table, ks))
        if self.reranked is not None:
            name = "all pairs" if self.rerank >= max(self.images, self.texts) else f"reranked, first {self.rerank}"
            lines.append(self._row(name, self.reranked, ks))
        return headers, lines

    @staticmethod
    def _row(name: str, table: dict[str, float], ks: list[str]) -> list[str]:
        cells = [f"{table[f'{way}_r{k}']:.1f}" for way in ("t2i", "i2t") for k in ks]
        return [name, *cells, f"{table['r_mean']:.1f}", f"{max(table['t2i_ties'], table['i2t_ties']):.1f}"]

    def within_rows(self) -> tuple[list[str], list[list[str]]]:
        """Picture-to-picture and caption-to-caption recalls as headers and rows; no rows where the data allow none."""
        lines, headers = [], ["within", "queries"]
        for name, prefix, table in (
            ("image→image", "i2i", self.image_to_image),
            ("text→text", "t2t", self.text_to_text),
        ):
            if table is not None:
                ks = [key.removeprefix(f"{prefix}_r") for key in table if key.startswith(f"{prefix}_r")]
                headers = ["within", "queries"] + [f"R@{k}" for k in ks] + ["mean"]
                cells = [f"{table[f'{prefix}_r{k}']:.1f}" for k in ks]
                lines.append([name, f"{table[f'{prefix}_queries']:.0f}", *cells, f"{table[f'{prefix}_mean']:.1f}"])
        return headers, lines

    def text(self) -> str:
        """Tables and notes for a terminal."""
        parts = [f"{self.images} pictures, {self.texts} captions; percent"]
        parts.append(text_table(*self.rows()))
        headers, lines = self.within_rows()
        if lines:
            parts.append(text_table(headers, lines))
        parts += [f"note: {note}" for note in self.notes]
        return "\n".join(parts)


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, the first to the left, the others to the right."""
    table = [list(headers), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(headers))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


@dataclass(frozen=True)
class _Encoded:
    """Features on the model's device; owner: the picture of each caption; positives as labels."""

    pictures: Tensor
    captions: EncodedTexts
    owner: Tensor

    def towers(self, i2t: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query features, candidate features, query labels, candidate labels of one direction."""
        images = torch.arange(len(self.pictures))
        both = (self.pictures, self.captions.features), (images, self.owner)
        (query, candidate), (query_label, candidate_label) = both if i2t else (both[0][::-1], both[1][::-1])
        return query, candidate, query_label, candidate_label


def merge_pictures(records: Sequence[Record]) -> tuple[list[Record], list[str], Tensor]:
    """Each picture once (equal ``image_id`` = one picture), all captions, and the picture of each caption ``(T,)``."""
    place: dict[int, int] = {}
    pictures: list[Record] = []
    captions: list[str] = []
    owner: list[int] = []
    for record in records:
        if record.image_id not in place:
            place[record.image_id] = len(pictures)
            pictures.append(record)
        captions += record.captions
        owner += [place[record.image_id]] * len(record.captions)
    missing = set(range(len(pictures))) - set(owner)
    if missing:
        raise ValueError(f"{pictures[min(missing)].key}: a picture without a caption cannot be in a retrieval set")
    return pictures, captions, torch.tensor(owner, dtype=torch.int64)


def evaluate_retrieval(
    model: nn.Module,
    tokenizer: Encodes,
    records: Sequence[Record],
    config: RetrievalConfig = RetrievalConfig(),
    transform: ImageTransform | AspectTransform | Callable[[Record], Picture] | None = None,
    errors: Errors | None = None,
) -> RetrievalResult:
    """Measure retrieval on ``records``; under ``torchrun`` all ranks call this, share the work and get the result.

    transform: how a picture is brought to the model's size, or a function that gives a record's picture as
    ``(3, H, W)``, patches or regions; left out, as the model's ``config.image`` says.
    Pictures whose records share a ``group`` find each other in picture-to-picture search; without groups there is none.
    The model is evaluated as ``eval()`` and put back. Without a fusion tower the reranking is left out, and said; a
    model without towers scores every pair. Pictures that cannot be read are left out with their captions and counted in
    ``errors`` (default: a log, 1 % at most). Raises ``MissingCapabilityError`` for a model with neither, ``ImageError``
    for too many unreadable pictures.
    """
    if not records:
        raise ValueError("there are no records to evaluate on")
    errors = Errors() if errors is None else errors
    load = Tolerant(record_loader(model, transform))
    lost: dict[int, Problem] = {}
    while True:
        try:
            found = _evaluate(model, tokenizer, records, config, load)
        except UnreadablePictures as unreadable:  # from the start without them, on all ranks
            lost |= unreadable.lost
            records = without(records, unreadable.lost, errors)
            continue
        if not lost:
            return found
        note = f"{len(lost)} pictures cannot be read and are left out with their captions: {errors.summary()}"
        return replace(found, left_out=tuple(sorted(lost)), notes=(note, *found.notes))


def _evaluate(
    model: nn.Module, tokenizer: Encodes, records: Sequence[Record], config: RetrievalConfig, load: Tolerant
) -> RetrievalResult:
    pictures, captions, owner = merge_pictures(records)
    notes = [remark] if (remark := beyond(config.ks, min(len(pictures), len(captions)))) else []
    towers = has_towers(model)
    k = how_many(config, len(pictures), len(captions), model, notes)
    training = model.training
    model.eval()
    seconds: dict[str, float] = {}
    try:
        with config.machine.store() as store:
            began = time.perf_counter()
            features = encode_pictures(model, pictures, load, config.machine, store if k else None)
            load.check()
            texts = encode_captions(model, captions, tokenizer, config.machine, keep_rows=k > 0)
            encoded = _Encoded(features, texts, owner)
            seconds["encoding"] = time.perf_counter() - began
            tables, lists, pairs = _all_rankings(model, encoded, store, k, config, seconds)
            if store.on_disk():
                notes.append(f"{store.on_disk()} blocks of image tokens did not fit into token_memory: kept on disk")
    finally:
        model.train(training)
    within = _within(encoded, _labels(pictures), config, notes) if towers else (None, None)
    return RetrievalResult(
        images=len(pictures),
        texts=len(captions),
        rerank=k,
        score_rule=config.score_rule,
        ties=config.ties,
        pairs=pairs,
        towers=tables.get(0),
        reranked=tables.get(k) if k else None,
        sweep={size: table for size, table in tables.items() if 0 < size < k},
        image_to_image=within[0],
        text_to_text=within[1],
        seconds=seconds,
        notes=tuple(notes),
        tower_lists=lists.get(0),
        reranked_lists=lists.get(k) if k else None,
    )


def record_loader(
    model: nn.Module, transform: ImageTransform | AspectTransform | Callable[[Record], Picture] | None = None
) -> Callable[[Record], Picture]:
    """From a record to the model's input, by ``transform``: a function, or by default the one of the model's config."""
    if transform is None:
        config: Any = model.config
        transform = config.image.transform()
    if transform is None:
        raise ValueError("this model reads the regions of a detector: pass transform=region_loader(RegionFile(path))")
    return picture_loader(transform) if isinstance(transform, (ImageTransform, AspectTransform)) else transform


def how_many(config: RetrievalConfig, images: int, texts: int, model: object, notes: list[str]) -> int:
    """How many candidates to rerank, 0 for none; what differs from the wish is noted, what cannot be is a ValueError.

    model: the model, or its class.
    """
    towers, fuses = has_towers(model), can(model, Matches)
    if not fuses:
        if config.rerank or config.all_pairs:
            notes.append("the model has no fusion tower: towers only")
        return 0
    everything = f"{images} pictures x {texts} captions are {images * texts:,} pairs"
    if not towers:
        most = config.all_pairs_limit if config.all_pairs else min(UNASKED, config.all_pairs_limit)
        if images * texts > most:
            raise ValueError(
                f"the model has no towers, so it reads every pair: {everything}, more than {most:,}; take fewer "
                "pictures (--limit, validation.limit)" + ("" if config.all_pairs else " or ask for it (--all-pairs)")
            )
        notes.append(f"the model has no towers: it has read every pair, {images * texts:,}")
        return max(images, texts)
    wanted = config.rerank
    if config.all_pairs:
        if images * texts > config.all_pairs_limit:
            raise ValueError(
                f"all_pairs: {everything}, more than all_pairs_limit={config.all_pairs_limit:,}; use rerank=k"
            )
        wanted = max(images, texts)
    if wanted > min(images, texts) and not config.all_pairs:
        notes.append(f"rerank={wanted} is clamped to the set: {images} pictures, {texts} captions")
    return min(wanted, max(images, texts))


def _all_rankings(
    model: nn.Module, encoded: _Encoded, store: Any, k: int, config: RetrievalConfig, seconds: dict[str, float]
) -> tuple[dict[int, dict[str, float]], dict[int, Lists], int]:
    """Recall tables and lists by number of reranked candidates (0: towers), and how many pairs were scored.

    Without towers all cosines are zero, there is no table for 0, and ``k`` is everything.
    """
    images, texts = len(encoded.pictures), len(encoded.owner)
    shown = {True: min(max(k, config.examples), texts), False: min(max(k, config.examples), images)}
    began = time.perf_counter()
    near = {way: nearest(*encoded.towers(way)[:2], shown[way]) for way in (True, False)}
    found = {way: _cosines(encoded, near, way) for way in (True, False)}
    tables, lists = {}, {}
    if has_towers(model):
        tables[0], lists[0] = _ranking(encoded, near, found, 0, config)
    seconds["towers"] = time.perf_counter() - began
    if not k:
        return tables, lists, 0
    began = time.perf_counter()
    pairs = PairList.of(near[True][:, :k], near[False][:, :k])
    logits = match_pairs(model, store, encoded.captions, pairs, images, config.machine)
    scores = {}
    for way in (True, False):
        query = torch.arange(len(near[way]))[:, None].expand(-1, near[way][:, :k].shape[1])
        at = (query, near[way][:, :k]) if way else (near[way][:, :k], query)
        place = pairs.find(*at)
        flat = pair_scores(logits[place.flatten()], found[way][:, :k].flatten(), config.score_rule)
        scores[way] = flat.view(place.shape)
    seconds["reranking"] = time.perf_counter() - began
    for size in sorted({min(s, k) for s in config.sweep if tables} | {k}):
        tables[size], lists[size] = _ranking(encoded, near, scores, size, config)
    return tables, lists, len(pairs)


def _cosines(encoded: _Encoded, near: dict[bool, Tensor], i2t: bool) -> Tensor:
    """Cosines of the listed candidates, float32 on the host ``(Q, n)``."""
    query, candidate, *_ = encoded.towers(i2t)
    rows = [
        (query[a : a + 1024] @ candidate.T).gather(1, near[i2t][a : a + 1024].to(query.device)).cpu()
        for a in range(0, len(query), 1024)
    ]
    return torch.cat(rows)


def _ranking(
    encoded: _Encoded, near: dict[bool, Tensor], scores: dict[bool, Tensor], k: int, config: RetrievalConfig
) -> tuple[dict[str, float], Lists]:
    """Recalls and lists when the first k candidates are ordered by ``scores`` and the rest by the towers."""
    ranked = {}
    for way in (True, False):
        query, candidate, query_label, candidate_label = encoded.towers(way)

        def rows(low: int, high: int, way: bool = way, query: Tensor = query, candidate: Tensor = candidate) -> Tensor:
            cosine = query[low:high] @ candidate.T
            return above_the_rest(cosine, near[way][low:high, :k], scores[way][low:high, :k]) if k else cosine

        ranked[way] = ranks(rows, query_label, candidate_label, ties=config.ties)
    if k:
        score, order = scores[False][:, :k].sort(dim=1, descending=True, stable=True)
        found = near[False][:, :k].gather(1, order)
    else:
        found, score = near[False], scores[False]
    n = config.examples
    lists = Lists(found[:, :n], score[:, :n], ranked[False][0], ranked[True][0])
    return both_ways(*ranked[True], *ranked[False], config.ks), lists


def _labels(pictures: Sequence[Record]) -> Tensor:
    """A number for each picture, equal for those of one group: int64 ``(I,)``."""
    known: dict[str, int] = {}
    numbers = [known.setdefault(p.group or f"alone {i}", i) for i, p in enumerate(pictures)]
    return torch.tensor(numbers, dtype=torch.int64)


def _within(
    encoded: _Encoded, groups: Tensor, config: RetrievalConfig, notes: list[str]
) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """Picture-to-picture (by ``groups``) and caption-to-caption recalls, None where nothing shares a label."""
    pictures = recalls_within(encoded.pictures, groups, "i2i", config.ks, config.ties)
    texts = recalls_within(encoded.captions.features, encoded.owner, "t2t", config.ks, config.ties)
    if pictures is None:
        notes.append("image→image is left out: no two pictures share a group")
    if texts is None:
        notes.append("text→text is left out: no picture has two captions")
    return pictures, texts
