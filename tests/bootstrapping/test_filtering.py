"""The rules of the filter, and its quality where the truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from imglish.bootstrapping.filtering import FilterConfig, Scores, decide, parse_best, why
from imglish.bootstrapping.quality import quality
from imglish.data.errors import DataError


def scores(rows: list[dict[str, Any]]) -> Scores:
    default = {"key": "a", "record": 0, "shard": 0, "origin": "web", "text": "a dog", "itm": 0.9, "itc": 0.3}
    default |= {"ranker_itm": None, "ranker_itc": None, "problem": None, "root": None, "image": None}
    kinds = dict.fromkeys(("key", "origin", "text", "problem", "root", "image"), pa.string())
    kinds |= dict.fromkeys(("record", "shard"), pa.int32())
    kinds |= dict.fromkeys(("itm", "itc", "ranker_itm", "ranker_itc"), pa.float32())
    return Scores(pa.Table.from_pylist([default | row for row in rows], schema=pa.schema(list(kinds.items()))))


def reasons(rows: list[dict[str, Any]], **settings: Any) -> list[str]:
    found = decide(scores(rows), FilterConfig(**settings))
    return [found.reasons[i] for i in found.reason]


def test_the_published_rule_keeps_web_and_synthetic_from_one_half() -> None:
    rows = [{"itm": 0.5}, {"itm": 0.49, "text": "b"}, {"itm": 0.7, "origin": "synthetic", "text": "c"}]
    assert reasons(rows) == ["kept", "itm below 0.5", "kept"]
    assert reasons(rows, texts="web")[2] == "synthetic text"
    assert reasons(rows, texts="synthetic")[0] == "web text"


def test_scores_that_are_no_numbers_are_dropped_with_that_reason() -> None:
    rows = [{"itm": float("nan")}, {"itm": None, "problem": "broken: x", "text": "b"}, {"text": "c"}]
    assert reasons(rows) == ["itm is not a number", "the picture cannot be read", "kept"]


def test_texts() -> None:
    rows = [{"text": "one\x07two"}, {"text": "one"}, {"text": "a b c d"}, {"text": "ein Hund und eine Katze"}]
    found = reasons(rows, min_words=2, max_words=4)
    assert found == ["control characters", "fewer than 2 words", "kept", "more than 4 words"]
    said = reasons([{"text": "a dog and the cat are on it"}, {"text": "一只狗在雪地里"}], languages=("English",))
    assert said == ["kept", "not in English"]


def test_duplicates_keep_the_best_and_web_first() -> None:
    rows = [
        {"text": "A dog!", "itm": 0.6},
        {"text": "a  dog", "itm": 0.8, "origin": "synthetic"},
        {"text": "a dog.", "itm": 0.8},
        {"text": "a dog", "record": 1},
        {"text": "a dog on the white snow", "itm": 0.7},
        {"text": "the dog on a white snow", "itm": 0.9},
    ]
    same = "the same text of its picture"
    assert reasons(rows) == [same, same, "kept", "kept", "kept", "kept"]
    assert reasons(rows, near=0.9)[4:] == ["nearly the same text", "kept"]
    assert reasons(rows, max_repeats=1)[2:4] == ["text of more than 1 pictures"] * 2


def test_fractions_and_the_best_of_a_picture() -> None:
    rows = [{"itm": i / 10, "itc": -i / 10, "text": f"t{i}", "record": i % 2} for i in range(1, 9)]
    kept = [r == "kept" for r in reasons(rows, min_itm=None, keep_fraction=0.5)]
    assert kept == [False] * 4 + [True] * 4
    kept = [r == "kept" for r in reasons(rows, min_itm=None, best=((2, "itc"), (1, "itm")))]
    assert np.flatnonzero(kept).tolist() == [2, 3]  # t3 and t4: of the two lowest of each picture the higher


def test_a_score_that_there_is_not() -> None:
    with pytest.raises(DataError, match=r"Families that do: .*albef"):
        reasons([{"itm": None}])
    assert reasons([{"itm": None}], min_itm=None, min_itc=0.2) == ["kept"]
    with pytest.raises(DataError, match="ranker"):
        reasons([{}], best=(parse_best("3:ranker_itc"),))
    with pytest.raises(DataError):
        parse_best("3:cider")


def test_every_row_can_be_asked_why() -> None:
    made = scores([{"itm": 0.2}, {"text": "b"}, {"key": "other"}])
    first, second = why(made, decide(made), "a")
    assert first.startswith("dropped: itm below 0.5")
    assert "itm 0.2000" in first
    assert second.startswith("kept")
    with pytest.raises(DataError, match="no picture"):
        why(made, decide(made), "nobody")


def test_quality_against_counting() -> None:
    rng = np.random.default_rng(0)
    clean = rng.random(300) < 0.6
    values = np.round(rng.normal(size=300) + clean, 1)
    values[0] = np.nan
    found = quality(values, clean, [0.0, 0.5, 99])
    kept = values >= 0.5
    assert found.precision[1] == pytest.approx(clean[kept].mean())
    assert found.recall[1] == pytest.approx(kept[clean].mean())
    assert found.kept[1] == pytest.approx(kept.mean())
    assert np.isnan(found.precision[2])
    good, bad = np.nan_to_num(values, nan=-1e9)[clean], np.nan_to_num(values, nan=-1e9)[~clean]
    wins = (good[:, None] > bad).mean() + (good[:, None] == bad).mean() / 2
    assert found.auc == pytest.approx(wins)
    with pytest.raises(DataError):
        quality(values, np.ones(300, bool), [0])
