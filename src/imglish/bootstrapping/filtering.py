"""Which texts are kept, and why the others are not: on columns, seconds for a million rows.

Rules apply one after the other, and a row carries the first one that drops it. Nothing is deleted: scores stay as they
are, and other settings give another choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from imglish.bootstrapping.stage import Stage
from imglish.data.errors import DataError
from imglish.data.sources.arrow import pyarrow

Measure = Literal["itm", "itc", "ranker_itm", "ranker_itc"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
KEPT = "kept"
READ = ["key", "root", "image", "record", "origin", "text", "problem", *MEASURES]


@dataclass(frozen=True)
class FilterConfig:
    """min_itm, min_itc: the least that is kept (``min_itm=0.5`` is the published rule of BLIP). texts: which are looked
    at. min_words, max_words: of a text. languages: names as :mod:`imglish.inspection.languages` has them, empty: all.
    max_repeats: how many pictures may have the same text. near: of texts of a picture that share so much of their words
    (Jaccard) the best is kept; None: of equal texts only. keep_fraction: share of what is left, the best by ``by``.
    best: of what is left at most so many texts a picture, one step after the other, as (number, measure)."""

    min_itm: float | None = 0.5
    min_itc: float | None = None
    texts: Literal["web", "synthetic", "both"] = "both"
    min_words: int = 1
    max_words: int | None = None
    languages: tuple[str, ...] = ()
    max_repeats: int | None = None
    near: float | None = None
    keep_fraction: float | None = None
    by: Measure = "itm"
    best: tuple[tuple[int, Measure], ...] = ()

    def __post_init__(self) -> None:
        if self.texts not in ("web", "synthetic", "both"):
            raise DataError(f"texts is {self.texts!r}: choose web, synthetic or both")
        for measure in (self.by, *(measure for _, measure in self.best)):
            if measure not in MEASURES:
                raise DataError(f"there is no measure {measure!r}: choose {', '.join(MEASURES)}")
        for name, value in (("keep_fraction", self.keep_fraction), ("near", self.near)):
            if value is not None and not 0 < value <= 1:
                raise DataError(f"{name} is {value}: it is a share, above 0, up to 1")
        if any(count < 1 for count, _ in self.best) or (self.max_repeats is not None and self.max_repeats < 1):
            raise DataError("best and max_repeats keep at least 1")


class Scores:
    """Rows of scores in columns. picture: number of the row's picture, int64 ``(N,)``; measures: float32 ``(N,)`` with
    NaN where there is no number; unknown: for each measure, where none was given (the picture could not be read, or
    the model has no such score)."""

    def __init__(self, table: Any) -> None:
        pyarrow()
        from pyarrow import compute

        self.table: Any = table
        self.compute: Any = compute
        codes = table["shard"].to_numpy().astype(np.int64) << 32 | table["record"].to_numpy()
        self.picture = np.unique(codes, return_inverse=True)[1].astype(np.int64)
        self.web = self.compute.equal(table["origin"], "web").to_numpy()
        self.unreadable = ~table["problem"].is_null().to_numpy()
        self.unknown: dict[str, np.ndarray] = {name: table[name].is_null().to_numpy() for name in MEASURES}
        self.measures: dict[str, np.ndarray] = {name: table[name].to_numpy().astype(np.float32) for name in MEASURES}

    @staticmethod
    def of(stage: Stage) -> Scores:
        if stage.kind != "scores":
            raise DataError(f"{stage.out} holds {stage.kind}, not scores")
        if waiting := stage.missing():
            raise DataError(f"{stage.out}: {len(waiting)} of {len(stage.shards)} shards are not scored yet")
        return Scores(stage.tables(READ))

    def __len__(self) -> int:
        return len(self.picture)

    def has(self, measure: str) -> bool:
        return bool((~self.unknown[measure]).any())

    def normalised(self) -> Any:
        """Texts in lower case, of punctuation and spaces one space: equal ones say the same."""
        lower = self.compute.utf8_lower(self.table["text"])
        return self.compute.utf8_trim_whitespace(
            self.compute.replace_substring_regex(lower, pattern=r"[\s\pP]+", replacement=" ")
        )


@dataclass(frozen=True)
class Decisions:
    """reason: number of the reason of each row in ``reasons``, uint8 ``(N,)``; 0: kept."""

    reason: np.ndarray
    reasons: tuple[str, ...]

    @property
    def kept(self) -> np.ndarray:
        return self.reason == 0

    def counts(self) -> dict[str, int]:
        """Rows by reason, kept ones first, reasons without rows left out."""
        found = np.bincount(self.reason, minlength=len(self.reasons)).tolist()
        return {name: count for name, count in zip(self.reasons, found) if count or name == KEPT}


class _Rules:
    """Takes rows away, step by step; ``left`` are those that no rule has dropped."""

    def __init__(self, count: int) -> None:
        self.reason = np.zeros(count, np.uint8)
        self.reasons = [KEPT]

    @property
    def left(self) -> np.ndarray:
        return self.reason == 0

    def drop(self, rows: np.ndarray, reason: str) -> None:
        self.reasons.append(reason)
        self.reason[rows & self.left] = len(self.reasons) - 1


def decide(scores: Scores, config: FilterConfig = FilterConfig()) -> Decisions:
    """Which rows are kept. Raises :class:`DataError` where a rule needs a score that there is not."""
    limits: list[tuple[Measure, float]] = [("itm", config.min_itm or 0.0)] if config.min_itm is not None else []
    limits += [("itc", config.min_itc)] if config.min_itc is not None else []
    needed: list[Measure] = [*(name for name, _ in limits), *(measure for _, measure in config.best)]
    needed += [config.by] if config.keep_fraction is not None else []
    for name in needed:
        if not scores.has(name):
            raise DataError(_without(name))
    rules = _Rules(len(scores))
    rules.drop(scores.unreadable, "the picture cannot be read")
    if config.texts != "both":
        rules.drop(scores.web != (config.texts == "web"), f"{'synthetic' if config.texts == 'web' else 'web'} text")
    for name in dict.fromkeys(needed):
        rules.drop(np.isnan(scores.measures[name]), f"{name} is not a number")
    _texts(scores, config, rules)
    for name, least in limits:
        rules.drop(~(scores.measures[name] >= np.float32(least)), f"{name} below {least:g}")
    _duplicates(scores, config, rules)
    if config.keep_fraction is not None:
        left = np.flatnonzero(rules.left)
        order = left[np.argsort(-scores.measures[config.by][left], kind="stable")]
        out = np.zeros(len(scores), bool)
        out[order[int(np.ceil(config.keep_fraction * len(left))) :]] = True
        rules.drop(out, f"not among the best {config.keep_fraction:.1%} by {config.by}")
    for count, measure in config.best:
        rules.drop(
            _beyond(scores, rules.left, count, measure), f"not among the best {count} of its picture ({measure})"
        )
    return Decisions(rules.reason, tuple(rules.reasons))


def _without(name: str) -> str:
    from imglish.models.capabilities import EncodesTexts, Matches
    from imglish.models.registry import families_with

    able = families_with(Matches if name.endswith("itm") else EncodesTexts)
    which = "the ranker" if name.startswith("ranker") else "the model"
    return f"these scores have no {name}: {which} gave none. Families that do: {', '.join(able)}"


def _texts(scores: Scores, config: FilterConfig, rules: _Rules) -> None:
    """Rules about the text alone."""
    compute, texts = scores.compute, scores.table["text"]
    rules.drop(compute.match_substring_regex(texts, r"[\x00-\x1f\x7f]").to_numpy(), "control characters")
    words = compute.count_substring_regex(texts, r"\S+").to_numpy()
    rules.drop(words < config.min_words, f"fewer than {config.min_words} words")
    if config.max_words is not None:
        rules.drop(words > config.max_words, f"more than {config.max_words} words")
    if config.languages:
        from imglish.inspection.languages import language_of

        coded = texts.combine_chunks().dictionary_encode()
        fits = np.array([language_of(text) in config.languages for text in coded.dictionary.to_pylist()], bool)
        rules.drop(~fits[coded.indices.to_numpy()], f"not in {' or '.join(config.languages)}")


def _duplicates(scores: Scores, config: FilterConfig, rules: _Rules) -> None:
    """Of texts of a picture that say the same the one with the best score stays, web texts before synthetic ones."""
    coded = scores.normalised().combine_chunks().dictionary_encode()
    text = coded.indices.to_numpy().astype(np.int64)
    left = np.flatnonzero(rules.left)
    quality = np.nan_to_num(scores.measures[config.by], nan=-np.inf)
    order = left[np.lexsort((~scores.web[left], -quality[left], text[left], scores.picture[left]))]
    again = np.zeros(len(scores), bool)
    same = (np.diff(text[order]) == 0) & (np.diff(scores.picture[order]) == 0)
    again[order[1:][same]] = True
    rules.drop(again, "the same text of its picture")
    if config.max_repeats is not None:
        left = np.flatnonzero(rules.left)
        counts = np.bincount(text[left], minlength=len(coded.dictionary))
        rules.drop(counts[text] > config.max_repeats, f"text of more than {config.max_repeats} pictures")
    if config.near is not None:
        rules.drop(_near(scores, config.near, rules.left, quality, coded.dictionary, text), "nearly the same text")


def _near(
    scores: Scores, near: float, left: np.ndarray, quality: np.ndarray, dictionary: Any, text: np.ndarray
) -> np.ndarray:
    """Texts that share ``near`` of their words with a better one of their picture."""
    found = np.zeros(len(left), bool)
    words = [frozenset(entry.split()) for entry in dictionary.to_pylist()]
    for rows in groups(scores.picture, np.flatnonzero(left)):
        if len(rows) < 2:
            continue
        kept: list[frozenset[str]] = []
        for row in rows[np.argsort(-quality[rows], kind="stable")]:
            own = words[text[row]]
            if any(len(own & other) >= near * len(own | other) for other in kept):
                found[row] = True
            else:
                kept.append(own)
    return found


def _beyond(scores: Scores, left: np.ndarray, count: int, measure: Measure) -> np.ndarray:
    """Rows behind the best ``count`` of their picture."""
    rows = np.flatnonzero(left)
    order = rows[np.lexsort((-scores.measures[measure][rows], scores.picture[rows]))]
    picture = scores.picture[order]
    starts = np.flatnonzero(np.r_[True, np.diff(picture) != 0]) if len(order) else np.zeros(0, np.int64)
    place = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    out = np.zeros(len(left), bool)
    out[order[place >= count]] = True
    return out


def groups(picture: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """``rows`` by picture, in the order of the rows."""
    if not len(rows):
        return
    order = rows[np.argsort(picture[rows], kind="stable")]
    yield from np.split(order, np.flatnonzero(np.diff(picture[order])) + 1)


def why(scores: Scores, decisions: Decisions, key: str) -> list[str]:
    """A line for each text of the picture called ``key``. Raises :class:`DataError` where there is none."""
    rows = np.flatnonzero(scores.compute.equal(scores.table["key"], key).to_numpy())
    if not len(rows):
        raise DataError(f"there is no picture {key!r} in these scores")
    lines = []
    for row in rows.tolist():
        entry = scores.table.slice(row, 1).to_pylist()[0]
        values = [f"{name} {entry[name]:.4f}" for name in MEASURES if entry[name] is not None]
        reason = decisions.reasons[decisions.reason[row]]
        said = reason if reason == KEPT else f"dropped: {reason}"
        if entry["problem"]:
            said += f" ({entry['problem']})"
        lines.append(f"{said}\t{entry['origin']}\t{', '.join(values)}\t{entry['text']}")
    return lines


def parse_best(text: str) -> tuple[int, Measure]:
    """``5:itc``, or ``1`` for the best by ITM."""
    count, _, measure = text.partition(":")
    known: Sequence[Measure] = [name for name in MEASURES if name == (measure or "itm")]
    if not count.isdigit() or not known:
        raise DataError(f"{text!r}: expected NUMBER or NUMBER:MEASURE, with {', '.join(MEASURES)}")
    return int(count), known[0]
