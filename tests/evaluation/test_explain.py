"""Heat maps of words: hooks change nothing, rollout against a plain computation, words, models without maps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from imglish.data.aspect import AspectTransform
from imglish.data.batch import TextBatch
from imglish.data.images import ImageTransform
from imglish.data.patches import PatchBatch
from imglish.data.pictures import stack
from imglish.evaluation.explain import explain_pairs, token_maps
from imglish.evaluation.heatmaps import over_picture
from imglish.evaluation.watching import watch_looks, watch_self
from imglish.models import registry
from imglish.models.capabilities import MissingCapabilityError

TEXTS = TextBatch.of([[5, 6, 7, 8, 9], [5, 10, 11]])
SINGLE = ("vilt-tiny", "vlmo-tiny", "beit3-tiny")


def _model(name: str) -> Any:
    torch.manual_seed(0)
    changes: dict[str, Any] = {"outputs": ("mlm", "itc", "itm"), "objective": "itc"} if name == "beit3-tiny" else {}
    model = registry.build(dataclasses.replace(registry.named(name), **changes)).eval()
    for parameter in model.parameters():  # so that attention is not uniform
        if parameter.ndim == 2:
            parameter.data.mul_(3)
    return model


def _pictures(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 48, 48), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", ["albef-tiny", "blip-tiny"])
def test_watching_changes_no_score_and_needs_no_gradient_of_weights(name: str) -> None:
    model = _model(name).requires_grad_(False)
    assert torch.is_grad_enabled()
    written = model.encode_texts(TEXTS)
    memory = model.project_images(model.encode_images(_pictures()).tokens)
    plain = model.match(memory, written, [0, 1], [0, 1])
    with watch_looks(model) as looks:
        watched = model.match(memory, written, [0, 1], [0, 1])
    torch.testing.assert_close(watched, plain)
    assert all(torch.allclose(weights.sum(3), torch.ones(())) for weights in looks)
    torch.testing.assert_close(token_maps(model, _pictures(), TEXTS).score, plain.softmax(1)[:, 1])
    with watch_self(model):
        torch.testing.assert_close(model.encode_texts(TEXTS).features, written.features)


@pytest.mark.parametrize("name", ["albef-tiny", "clip-tiny", *SINGLE])
def test_a_pair_has_the_same_maps_in_any_company(name: str) -> None:
    model, pictures = _model(name), _pictures()
    both = token_maps(model, pictures, TEXTS)
    for b, ids in enumerate([[5, 6, 7, 8, 9], [5, 10, 11]]):
        alone = token_maps(model, pictures[b : b + 1], TextBatch.of([ids]))
        torch.testing.assert_close(alone.tokens[0], both.tokens[b])
        torch.testing.assert_close(alone.whole[0], both.whole[b])
        assert float(both.whole[b].amax()) > 0
        assert both.whole[b].shape == (6, 6)


@pytest.mark.parametrize("name", SINGLE)
def test_rollout_is_what_a_plain_computation_gives(name: str) -> None:
    """Dense attention of one pair, layer by layer, read off the inputs of the blocks."""
    model, texts = _model(name), TextBatch.of([[5, 6, 7, 8, 9]])
    found = token_maps(model, _pictures(1), texts)
    inputs: list[tuple[Any, ...]] = []
    blocks = model.blocks if hasattr(model, "blocks") else model.body.blocks
    assert isinstance(blocks, nn.ModuleList)
    handles = [block.register_forward_pre_hook(lambda _, given: inputs.append(given)) for block in blocks]
    with torch.no_grad():
        memory, written = model.project_images(_tokens(model, _pictures(1))), _written(model, texts)
        inputs.clear()
        model.match(memory, written, [0], [0])
        flow = torch.eye(5 + 37)
        for block, given in zip(blocks, inputs, strict=True):
            flow = (_dense(block, given) + torch.eye(5 + 37)) / 2 @ flow
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(flow.sum(1), torch.ones(42))
    text, patches = (slice(0, 5), slice(6, 42)) if name == "vilt-tiny" else (slice(37, 42), slice(1, 37))
    torch.testing.assert_close(found.tokens[0], flow[text, patches].unflatten(1, (6, 6)))


def _tokens(model: Any, pictures: Tensor) -> Any:
    return (model.embed_images if hasattr(model, "embed_images") else model.encode_images)(pictures).tokens


def _written(model: Any, texts: TextBatch) -> Any:
    return (model.embed_texts if hasattr(model, "embed_texts") else model.encode_texts)(texts)


def _dense(block: Any, given: tuple[Any, ...]) -> Tensor:
    if len(given) < 3:  # ViLT's blocks
        q, k, _ = block.attn.qkv(block.norm1(given[0])).unflatten(1, (3, block.attn.heads, -1)).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q, k)
    else:
        q, k, _ = block.attn.project(given[0], given[1])
        scores = torch.einsum("qhd,khd->hqk", q, k)
    scores = scores / math.sqrt(q.shape[2])
    if len(given) > 2 and given[2] is not None:
        scores = scores + given[2][0]
    return scores.softmax(2).mean(0)


class Pieces:
    """Words of one or two pieces: token n continues the word before where n is odd; 5 is special."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[5, 6, 7, 8] for _ in texts]

    def word_starts(self, ids: Sequence[int]) -> list[bool]:
        return [i == 5 or i % 2 == 0 for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"<{i}>" for i in ids if i != 5)


def test_a_word_is_the_mean_of_its_pieces_and_special_tokens_are_none() -> None:
    model, picture = _model("albef-tiny"), _pictures(1)[0]
    maps = token_maps(model, picture[None], TextBatch.of([[5, 6, 7, 8]]))
    (found,) = explain_pairs(model, Pieces(), [picture], ["anything"])
    assert found.words == ("<6><7>", "<8>")
    torch.testing.assert_close(found.maps[0], maps.tokens[0][1:3].mean(0))
    torch.testing.assert_close(found.maps[1], maps.tokens[0][3])
    torch.testing.assert_close(found.whole, maps.tokens[0].mean(0))
    assert bool((found.maps >= 0).all())


def test_layers() -> None:
    model = _model("albef-tiny")
    middle = token_maps(model, _pictures(), TEXTS)
    torch.testing.assert_close(middle.whole, token_maps(model, _pictures(), TEXTS, 0).whole)
    assert [len(one) for one in token_maps(model, _pictures(), TEXTS, 1).tokens] == [0, 0]
    with pytest.raises(ValueError, match="fusion layers 0 to 1"):
        token_maps(model, _pictures(), TEXTS, 2)
    with pytest.raises(ValueError, match="no fusion layers"):
        token_maps(_model("vilt-tiny"), _pictures(), TEXTS, 0)


def test_pictures_of_any_shape() -> None:
    transform = AspectTransform(48, 80, 8)
    cut = [transform.cut(transform(Image.new("RGB", size))) for size in ((96, 60), (60, 60))]
    pictures = stack(cut)
    assert isinstance(pictures, PatchBatch)
    found = token_maps(_model("vilt-tiny"), pictures, TEXTS)
    assert [tuple(one.shape) for one in found.whole] == [(6, 9), (6, 6)]


def test_models_without_maps_say_so() -> None:
    with pytest.raises(MissingCapabilityError, match="class token"):
        token_maps(_model("coca-tiny"), _pictures(), TEXTS)
    towers = token_maps(_model("clip-tiny"), _pictures(), TEXTS)
    assert towers.method == "grad-cam of towers"
    assert [len(one) for one in towers.tokens] == [0, 0]


def test_a_map_covers_what_the_model_saw() -> None:
    heat = torch.ones(4, 4)
    whole = over_picture(heat, (60, 40), ImageTransform(32))
    torch.testing.assert_close(whole, torch.ones(40, 60))
    cut = over_picture(heat, (60, 40), ImageTransform(32, resize="center"))
    assert float(cut[:, :10].abs().max()) == float(cut[:, 50:].abs().max()) == 0
    torch.testing.assert_close(cut[:, 10:50], torch.ones(40, 40))
