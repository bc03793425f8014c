"""Grad-CAM of the matching score and of the towers against the official visual grounding code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from imglish.evaluation.explain import token_maps, tower_maps
from imglish.evaluation.watching import watch_looks
from tests.golden.aligned import texts_of
from tests.golden.support import Case, cases, check
from tests.golden.test_albef import build

CASES = [path for path in cases("albef-") if any(n.startswith("gradcam_itm") for n in Case(path).meta["outputs"])]


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.name)
def test_maps(path: Path) -> None:
    case = Case(path)
    model, _ = build(case)
    mask = case.inputs["text.attention_mask"]
    pictures, texts = case.inputs["image"], texts_of(case.inputs["text.input_ids"], mask)
    own = range(len(texts))
    memory = model.project_images(model.encode_images(pictures).tokens)
    with watch_looks(model) as looks:
        logits = model.match(memory, model.encode_texts(texts), own, own)
    gradients = torch.autograd.grad(logits[:, 1].sum(), looks)
    layers = sorted({name.split("/")[1] for name in case.outputs if name.startswith("gradcam_itm/")})
    assert len(layers) == len(looks)
    for number, layer in enumerate(layers):
        last = number == len(layers) - 1  # of which we compute [CLS] alone: the head reads nothing else
        for found, name in ((looks[number], "attention_map"), (gradients[number], "attention_grad")):
            expected = case.outputs[f"gradcam_itm/{layer}/{name}"]
            for b, length in enumerate(texts.segments.lengths):
                rows = slice(1 if last else length)
                torch.testing.assert_close(
                    found[b, :, rows], expected[b, :, rows], rtol=0, atol=1e-4 * float(expected.abs().max())
                )
        maps = token_maps(model, pictures, texts, number)
        assert [len(one) for one in maps.tokens] == ([0] * len(texts) if last else list(texts.segments.lengths))
        counted = torch.ones(len(mask)) if last else mask.sum(1)  # officially the mean is over the padding too
        whole = torch.stack(maps.whole) * (counted / mask.shape[1])[:, None, None]
        check(case, f"gradcam_itm/{layer}/map", whole)
    whole = torch.stack(tower_maps(model, pictures, texts).whole)
    check(case, "gradcam_itc/map", whole / model.temperature)  # officially of the cosine divided by the temperature
