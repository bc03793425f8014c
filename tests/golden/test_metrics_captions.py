"""Caption metrics against coco-caption (recorded numbers), from its tokenized strings and from the raw ones."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from imglish.evaluation.caption_metrics import CaptionScores, caption_scores
from imglish.evaluation.java_metrics import java_scores
from imglish.evaluation.ptb import tokenized
from tests.golden.support import golden_root

OFFICIAL = {"bleu1": "Bleu_1", "bleu2": "Bleu_2", "bleu3": "Bleu_3", "bleu4": "Bleu_4", "rouge_l": "ROUGE_L"}
OFFICIAL |= {"cider": "CIDEr"}
SETS: list[dict[str, Any]] = [
    one for path in sorted(golden_root().rglob("captions.json")) for one in json.loads(path.read_text())
]


def scores(items: list[dict[str, Any]]) -> CaptionScores:
    return caption_scores([item["hypothesis"] for item in items], [item["references"] for item in items])


def strings(items: list[dict[str, Any]]) -> list[str]:
    return [text for item in items for text in (item["hypothesis"], *item["references"])]


@pytest.mark.parametrize("one", SETS, ids=lambda one: one["name"])
def test_metrics_of_tokenized_strings(one: dict[str, Any]) -> None:
    found = scores(one["tokenized"])
    for ours, theirs in OFFICIAL.items():
        assert found.corpus[ours] == pytest.approx(one["corpus"][theirs], abs=1e-6), ours
        for mine, item in zip(found.items, one["per_item"], strict=True):
            assert mine[ours] == pytest.approx(item[theirs], abs=1e-6), (ours, item["id"])


@pytest.mark.parametrize("one", SETS, ids=lambda one: one["name"])
def test_own_tokens(one: dict[str, Any]) -> None:
    """Natural captions: 99 % of the strings; strings written to be hard: most of them."""
    natural = "tricky" not in one["name"]
    pairs = list(zip(strings(one["inputs"]), strings(one["tokenized"]), strict=True))
    same = sum(tokenized(raw) == tokens for raw, tokens in pairs)
    assert same >= (0.99 if natural else 0.8) * len(pairs)
    if natural:
        raw = [
            {"hypothesis": tokenized(i["hypothesis"]), "references": [tokenized(r) for r in i["references"]]}
            for i in one["inputs"]
        ]
        assert scores(raw).corpus["cider"] == pytest.approx(one["corpus"]["CIDEr"], abs=0.02)


@pytest.mark.parametrize("one", [one for one in SETS if "METEOR" in one["corpus"]], ids=lambda one: one["name"])
def test_meteor(one: dict[str, Any]) -> None:
    """By the extra ``captions`` and Java, from strings tokenized by the reference."""
    pytest.importorskip("pycocoevalcap", reason="the extra captions is not installed")
    if shutil.which("java") is None:
        pytest.skip("Java is not installed")
    items = one["tokenized"]
    corpus, each = java_scores("meteor", [item["hypothesis"] for item in items], [item["references"] for item in items])
    assert corpus == pytest.approx(one["corpus"]["METEOR"], abs=1e-6)
    assert each == pytest.approx([item["METEOR"] for item in one["per_item"]], abs=1e-6)


def test_there_are_sets() -> None:
    assert SETS
