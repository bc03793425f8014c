"""METEOR and SPICE: what is handed to the programs, what comes back, and what is said where they are missing."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from imglish.evaluation.java_metrics import JavaMetricError, java_scores


def _install(monkeypatch: pytest.MonkeyPatch, metric: str, scorer: type) -> None:
    for name in ("pycocoevalcap", f"pycocoevalcap.{metric}", f"pycocoevalcap.{metric}.{metric}"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    setattr(sys.modules[f"pycocoevalcap.{metric}.{metric}"], metric.capitalize(), scorer)


def test_spice_gives_the_f_of_each_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spice:
        def compute_score(self, gts: dict[int, list[str]], res: dict[int, list[str]]) -> tuple[float, list[Any]]:
            assert gts == {0: ["a dog", "the dog"], 1: ["a cat"]}
            assert res == {0: ["a dog"], 1: ["two cats"]}
            return 0.4, [{"All": {"f": 0.5}}, {"All": {"f": 0.3}}]

    _install(monkeypatch, "spice", Spice)
    assert java_scores("spice", ["a dog", "two cats"], [["a dog", "the dog"], ["a cat"]]) == (0.4, [0.5, 0.3])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meteor:
        def __init__(self) -> None:
            raise FileNotFoundError("java")

    _install(monkeypatch, "meteor", Meteor)
    with pytest.raises(JavaMetricError, match=r"meteor failed: java; METEOR 1\.5 needs Java"):
        java_scores("meteor", ["a"], [["b"]])
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    for name in ("pycocoevalcap.meteor", "pycocoevalcap.meteor.meteor"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(JavaMetricError, match=r"pip install 'imglish\[captions\]'"):
        java_scores("meteor", ["a"], [["b"]])
