"""Beam search against enumeration of all texts, and its rules."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from imglish.generation.beam import CURRENT, PUBLISHED_BLIP, PUBLISHED_COCA, BeamRule, _Beam, _Search
from imglish.generation.config import GenerationConfig, Written
from imglish.generation.engine import generate
from tests.generation.toy import ToyCaptioner, pictures

END = 2


def run(
    model: ToyCaptioner,
    images: Tensor,
    config: GenerationConfig,
    prompts: list[list[int]] | None = None,
    **more: object,
) -> list[list[Written]]:
    prompts = prompts or [[1]] * len(images)
    keys = [str(i) for i in range(len(images))]
    return generate(model, model.encode_images(images), prompts, END, config, keys, **more)  # type: ignore[arg-type]


def log_probability(model: ToyCaptioner, image: Tensor, text: list[int], prompt: int) -> float:
    return sum(float(model.whole(image, text[:i]).log_softmax(0)[text[i]]) for i in range(prompt, len(text)))


def everything(
    model: ToyCaptioner, image: Tensor, prompt: list[int], vocab: int, longest: int
) -> list[tuple[float, tuple[int, ...]]]:
    """Every text up to ``longest`` tokens with its mean log-probability, the best first."""
    words = [token for token in range(vocab) if token != END]
    found = []
    for count in range(longest - len(prompt) + 1):
        for body in itertools.product(words, repeat=count):
            text = [*prompt, *body]
            if len(text) < longest:
                text.append(END)
            found.append((log_probability(model, image, text, len(prompt)) / (len(text) - len(prompt)), body))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wide_beams_find_the_best_of_all_texts(seed: int) -> None:
    model, images = ToyCaptioner(vocab_size=5, seed=seed), pictures(2, seed)
    # so many beams that nothing is lost on the way; the search ends at the longest length
    config = GenerationConfig(beams=64, n=3, max_length=4)
    found = run(model, images, config, [[1], [3]])
    for image, prompt, texts in zip(images, [[1], [3]], found):
        best = everything(model, image, prompt, 5, 4)
        assert [text.ids for text in texts] == [body for _, body in best[:3]]
        assert [text.score for text in texts] == pytest.approx([score for score, _ in best[:3]], abs=1e-5)


def reference(model: ToyCaptioner, image: Tensor, prompt: list[int], config: GenerationConfig) -> list[tuple[int, ...]]:
    """Beam search of one picture, written for reading: everything computed anew in every step."""
    k, live, found = config.beams, [(0.0, prompt)], []
    while True:
        candidates = []
        for total, text in live:
            gains = model.whole(image, text).log_softmax(0)
            candidates += [(total + float(gains[t]), text, t) for t in range(len(gains))]
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * k]
        length = len(live[0][1]) + 1
        for total, text, token in candidates[:k]:
            if token == END or length == config.max_length:
                body = text[len(prompt) :] + [token] * (token != END)
                found.append((total / (length - len(prompt)) ** config.length_penalty, body))
        found = sorted(found, key=lambda f: -f[0])[:k]
        live = [(total, [*text, token]) for total, text, token in candidates if token != END][:k]
        done = len(found) == k and found[-1][0] >= live[0][0] / (length - len(prompt)) ** config.length_penalty
        if done or length == config.max_length:
            return [tuple(body) for _, body in found[: config.n]]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("beams", [2, 3])
def test_equals_a_plain_search(beams: int, penalty: float) -> None:
    model, images = ToyCaptioner(seed=3), pictures(6)
    prompts = [[1], [1, 4], [1, 5, 6], [1], [3, 3], [1]]
    config = GenerationConfig(beams=beams, n=beams, max_length=9, length_penalty=penalty)
    found = run(model, images, config, prompts)
    wanted = [reference(model, image, prompt, config) for image, prompt in zip(images, prompts)]
    assert [[text.ids for text in texts] for texts in found] == wanted
    assert len({len(text.ids) for texts in found for text in texts}) > 1


def test_a_picture_does_not_depend_on_the_others() -> None:
    model, images = ToyCaptioner(seed=3), pictures(7)
    config = GenerationConfig(beams=3, max_length=12)
    together = run(model, images, config)
    alone = [run(model, images[i : i + 1], config)[0] for i in range(len(images))]
    assert [[t.ids for t in texts] for texts in together] == [[t.ids for t in texts] for texts in alone]


def test_finished_pictures_cost_nothing() -> None:
    model, images = ToyCaptioner(seed=3), pictures(7)
    run(model, images, GenerationConfig(beams=3, max_length=20))
    assert model.steps[0] == 7  # the prompt is read once a picture, not once a beam
    assert model.steps[1] == 21
    assert model.steps[-1] < 21
    assert sum(model.steps[1:]) < 21 * 19


def test_constraints_hold() -> None:
    model, images = ToyCaptioner(seed=3), pictures(4)
    config = GenerationConfig(beams=3, n=3, max_length=12, min_length=8, no_repeat_ngram=2, repetition_penalty=1.3)
    for texts in run(model, images, config):
        for text in texts:
            whole = (1, *text.ids)
            assert len(whole) >= 8
            pairs = list(itertools.pairwise(whole))
            assert len(pairs) == len(set(pairs))


def scored(values: dict[int, float], beams: int) -> tuple[np.ndarray, np.ndarray]:
    best = sorted(values, key=lambda t: -values[t])[: 2 * beams]
    return np.array([[values[t] for t in best]], dtype=np.float32), np.array([best])


@pytest.mark.parametrize(("rule", "score"), [(CURRENT, -1.0), (PUBLISHED_BLIP, -1.0 / 3), (PUBLISHED_COCA, -1.0 / 4)])
def test_lengths_that_scores_are_divided_by(rule: BeamRule, score: float) -> None:
    config = GenerationConfig(beams=2, max_length=9)
    search = _Search(3, END, config, rule, [_Beam((7, 8, 9), np.float32(0))])
    parents = search.advance(*scored({END: -1.0, 4: -2.0, 5: -3.0, 6: -4.0}, 2))
    assert parents == [0, 0]
    assert search.found[0][0] == pytest.approx(score)
    assert search.found[0][1].ids == ()


def test_only_the_first_k_may_close() -> None:
    config = GenerationConfig(beams=2, max_length=9)
    search = _Search(1, END, config, CURRENT, [_Beam((7,), np.float32(0))])
    search.advance(*scored({4: -1.0, 5: -2.0, END: -3.0, 6: -4.0}, 2))
    assert not search.found


def test_wrong_requests() -> None:
    model, images = ToyCaptioner(), pictures(1)
    with pytest.raises(ValueError, match="takes 24"):
        run(model, images, GenerationConfig(max_length=25))
    with pytest.raises(ValueError, match="max_length - 1 = 3"):
        run(model, images, GenerationConfig(max_length=4), [[1, 1, 1, 1]])
    with pytest.raises(ValueError, match="sample, or search"):
        GenerationConfig(beams=2, sample=True)
    with pytest.raises(ValueError, match="at least 3 beams"):
        GenerationConfig(beams=2, n=3)
    with pytest.raises(ValueError, match="for sampling"):
        GenerationConfig(top_p=0.9)
    assert replace(GenerationConfig(), sample=True, top_p=0.9).top_p == 0.9


def test_half_precision_logits() -> None:
    model, images = ToyCaptioner(seed=3), pictures(3)
    with torch.autocast("cpu", torch.bfloat16):
        texts = run(model, images, GenerationConfig(beams=3, max_length=8))
    assert all(np.isfinite(text[0].score) for text in texts)
