from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from imglish.evaluation.binding import Quadruple, evaluate_binding
from imglish.evaluation.encoding import Machine
from tests.evaluation.fakes import Fusion, Towers, Words, pictures_of

QUIET = Machine(image_block=3, pair_block=5, progress=False)


@dataclass(frozen=True)
class _Picture:
    pixels: Tensor


def _quadruples(model: Towers) -> list[Quadruple[_Picture]]:
    captions = [("w1 w2 w3", "w4 w5"), ("w6 w7", "w8 w9 w10 w11"), ("w12", "w13 w14")]
    made = []
    for i, pair in enumerate(captions):
        left, right = pictures_of(model, list(pair), 0.1, seed=i)
        made.append(Quadruple((_Picture(left), _Picture(right)), pair))
    return made


def test_towers_and_fusion_score_every_quadruple() -> None:
    model = Fusion()
    result = evaluate_binding(model, Words(), _quadruples(model), lambda p: p.pixels, QUIET)
    assert result.fusion == {"text": 100.0, "image": 100.0, "group": 100.0}
    assert model.calls["pairs"] == 3 * 4
    assert result.fusion_scores is not None
    with torch.no_grad():
        for q, quadruple in enumerate(_quadruples(model)):
            for i, picture in enumerate(quadruple.pictures):
                seen = picture.pixels.flatten(1).mean(1)
                for c, caption in enumerate(quadruple.captions):
                    said = model.words[Words().encode([caption])[0]].mean(0)
                    expected = 20 * torch.cosine_similarity(seen, said, dim=0)
                    assert result.fusion_scores[q, i, c] == pytest.approx(expected.item(), abs=1e-4)
                    coarse = torch.cosine_similarity(seen[:3], said[:3], dim=0)
                    assert result.tower_scores[q, i, c] == pytest.approx(coarse.item(), abs=1e-5)


def test_swapped_captions_are_wrong_in_every_way() -> None:
    model = Fusion()
    crossed = [Quadruple(q.pictures, (q.captions[1], q.captions[0])) for q in _quadruples(model)]
    result = evaluate_binding(model, Words(), crossed, lambda p: p.pixels, QUIET)
    assert result.fusion == {"text": 0.0, "image": 0.0, "group": 0.0}


def test_a_model_of_towers_alone() -> None:
    model = Towers()
    result = evaluate_binding(model, Words(), _quadruples(model), lambda p: p.pixels, QUIET)
    assert result.fusion is None
    with pytest.raises(ValueError, match="no quadruples"):
        evaluate_binding(model, Words(), [], lambda p: p.pixels, QUIET)
