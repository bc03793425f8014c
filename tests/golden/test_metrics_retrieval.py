"""Recalls against the official evaluation code of ALBEF/BLIP, ViLT/BEiT-3 and CLIP_benchmark (recorded numbers)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from imglish.evaluation.metrics import TIES, Ties, binding_correct, binding_scores, recalls
from tests.golden.support import golden_root

DIRECTIONS = {"txt": "i2t", "img": "t2i"}


def _load(name: str, key: str) -> list[Any]:
    """The cases of every file ``name`` below the golden folder, in a flat list."""
    found: list[Any] = []
    for path in sorted(golden_root().rglob(name)):
        held = json.loads(Path(path).read_text()).get(key, [])
        found += held if isinstance(held, list) else [held]
    return found


CASES = _load("retrieval.json", "cases")
WINOGROUND = _load("compositional.json", "winoground")


def _ours(case: dict[str, Any], ties: Ties) -> dict[str, float]:
    scores = torch.tensor(case["scores_i2t"], dtype=torch.float32)
    other = case.get("scores_t2i_transposed")
    t2i = torch.tensor(other, dtype=torch.float32).T if other is not None else None
    ks = sorted({int(key.rsplit("_r", 1)[1]) for key in case["albef_blip_itm_eval"] if key[-1].isdigit()})
    return recalls(scores, torch.tensor(case["text_owner"]), ks, ties, scores_t2i=t2i, chunk=17)


def _named_like_albef(table: dict[str, float]) -> dict[str, float]:
    named = {"r_mean": table["r_mean"]}
    for theirs, ours in DIRECTIONS.items():
        named |= {
            key.replace(ours, theirs).replace("_mean", "_r_mean"): value
            for key, value in table.items()
            if key.startswith(ours) and not key.endswith("_ties")
        }
    return named


def _other_names(case: dict[str, Any]) -> dict[str, float]:
    """Results of ViLT/BEiT-3 (``tr_``, ``ir_``) and CLIP_benchmark under the names of ALBEF."""
    found = {}
    for key, value in case.get("vilt_beit3_topk", {}).items():
        found[key.replace("tr_", "txt_").replace("ir_", "img_")] = value
    for key, value in case.get("clip_benchmark", {}).items():
        side, _, k = key.partition("_retrieval_recall@")
        found[f"{'img' if side == 'image' else 'txt'}_r{k} (clip_benchmark)"] = value
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recalls_equal_the_official_ones(case: dict[str, Any]) -> None:
    ours = {ties: _named_like_albef(_ours(case, ties)) for ties in TIES}
    assert ours["stable_reversed"] == pytest.approx(case["stable_argsort_reversed"], abs=1e-4)
    for rule, bound in case.get("rank_bounds", {}).items():
        for key, value in bound.items():
            assert ours[rule][key] == pytest.approx(value, abs=1e-4), (rule, key)
    # Every implementation lies between the bounds; where no tie touches a positive, the bounds are one number.
    for key, value in (case["albef_blip_itm_eval"] | _other_names(case)).items():
        name = key.split(" ")[0]
        assert ours["pessimistic"][name] - 1e-4 <= value <= ours["optimistic"][name] + 1e-4, key


@pytest.mark.parametrize("group", WINOGROUND, ids=lambda g: f"{len(g['items'])}-items")
def test_winoground_rules(group: dict[str, Any]) -> None:
    scores = torch.tensor([item["scores_image_by_caption"] for item in group["items"]])
    right = binding_correct(scores)
    for name in ("text", "image", "group"):
        assert right[name].tolist() == [item[name] for item in group["items"]]
        assert binding_scores(scores)[name] == pytest.approx(group[name], abs=1e-4)
