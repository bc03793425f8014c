"""Greedy and sampled texts: against decoding without a cache, and on their own whatever the batch is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from imglish.generation.config import GenerationConfig, Written
from imglish.generation.engine import caption, generate, prompt_ids, random_numbers
from imglish.generation.logits import constrain, draw, narrow, penalise_repetition
from imglish.models.captioning import CaptionForm
from tests.generation.toy import ToyCaptioner, pictures

END = 2


def run(
    model: ToyCaptioner, images: Tensor, config: GenerationConfig, keys: list[str] | None = None
) -> list[list[Written]]:
    keys = keys or [f"picture {i}" for i in range(len(images))]
    return generate(model, model.encode_images(images), [[1]] * len(images), END, config, keys)


def test_greedy_equals_decoding_without_cache() -> None:
    model, images = ToyCaptioner(seed=3), pictures(6)
    config = GenerationConfig(max_length=12, min_length=3)
    for image, [text] in zip(images, run(model, images, config)):
        ids, gains = [1], []
        while len(ids) < 12:
            logits = model.whole(image, ids)
            allowed = logits.clone()
            if len(ids) < 3:
                allowed[END] = -torch.inf
            token = int(allowed.argmax())
            gains.append(float(logits.log_softmax(0)[token]))
            if token == END:
                break
            ids.append(token)
        assert text.ids == tuple(ids[1:])
        assert text.ended == (token == END)
        assert text.score == pytest.approx(np.mean(gains), abs=1e-5)


@pytest.mark.parametrize(
    "config", [GenerationConfig(sample=True, n=4, max_length=14, top_p=0.9), GenerationConfig(max_length=14)]
)
def test_a_picture_does_not_depend_on_its_batch(config: GenerationConfig) -> None:
    model, images = ToyCaptioner(seed=3), pictures(5)
    keys = list("abcde")
    together = run(model, images, config, keys)
    back = run(model, images.flip(0), config, keys[::-1])[::-1]
    alone = [run(model, images[i : i + 1], config, keys[i : i + 1])[0] for i in range(5)]
    ids = [[[t.ids for t in texts] for texts in found] for found in (together, back, alone)]
    assert ids[0] == ids[1] == ids[2]


def test_samples_depend_on_seed_key_and_number() -> None:
    model, images = ToyCaptioner(seed=3), pictures(1).repeat(2, 1, 1)
    base = GenerationConfig(sample=True, n=3, max_length=14)
    same, other = run(model, images, base, ["a", "b"])
    assert [t.ids for t in same] != [t.ids for t in other]
    assert len({t.ids for t in same}) > 1
    reseeded = run(model, images, GenerationConfig(sample=True, n=3, max_length=14, seed=1), ["a", "b"])[0]
    assert [t.ids for t in reseeded] != [t.ids for t in same]
    assert random_numbers(0, "a", 0, 5).tolist() == random_numbers(0, "a", 0, 9)[:5].tolist()


def test_finished_samples_cost_nothing() -> None:
    model, images = ToyCaptioner(seed=3), pictures(4)
    texts = run(model, images, GenerationConfig(sample=True, n=5, max_length=20))
    fed = sum(len(text.ids) - (not text.ended) for found in texts for text in found)
    assert sum(model.steps) == 4 + fed  # the prompt of 4 pictures, then each token that was written, once
    assert len({len(text.ids) for found in texts for text in found}) > 3


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).repeat(4000, 1)
    uniforms = (torch.arange(4000) + 0.5) / 4000
    share = torch.bincount(draw(logits, uniforms), minlength=4) / 4000
    torch.testing.assert_close(share, logits[0].softmax(0), atol=1e-3, rtol=0)
    assert draw(logits[:1], torch.tensor([0.0])).item() == 0
    assert draw(logits[:1], torch.tensor([1.0])).item() == 3


def test_narrowing() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    kept = narrow(logits, GenerationConfig(sample=True, top_k=2))
    assert torch.isfinite(kept).tolist() == [[True, False, True, False]]
    probability = logits.softmax(1)[0]
    just = float(probability[0] + probability[2])
    for top_p, expected in ((just - 1e-3, [True, False, True, False]), (just + 1e-3, [True, True, True, False])):
        kept = narrow(logits, GenerationConfig(sample=True, top_p=top_p))
        assert torch.isfinite(kept).tolist() == [expected]
    assert torch.isfinite(narrow(logits, GenerationConfig(sample=True, top_p=1e-6))).sum() == 1
    torch.testing.assert_close(narrow(logits, GenerationConfig(sample=True, temperature=0.5)), logits * 2)


def test_penalties() -> None:
    scores = torch.tensor([[2.0, -2.0, 1.0], [1.0, 1.0, 1.0]])
    out = penalise_repetition(scores, [[0, 1, 1], [2]], 2.0)
    assert out.tolist() == [[1.0, -4.0, 1.0], [1.0, 1.0, 0.5]]
    banned = constrain(torch.zeros(2, 5), [[3, 4, 3], [0, 1]], END, GenerationConfig(no_repeat_ngram=2, min_length=3))
    assert banned[0].tolist() == [0, 0, 0, 0, -torch.inf]
    assert banned[1].tolist() == [0, 0, -torch.inf, 0, 0]


class Words:
    """A tokenizer of numbers."""

    bos_id, eos_id = 1, END

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[1, *(int(word) for word in text.split()), END] for text in texts]

    def decode(self, ids: tuple[int, ...]) -> str:
        return " ".join(map(str, ids))


def test_prompts() -> None:
    model, words = ToyCaptioner(seed=3), Words()
    assert prompt_ids(model, words, "5 6") == [1, 5, 6]
    model.caption_form = lambda: CaptionForm(start=9, prompt="7", longest=24)  # type: ignore[method-assign]
    assert prompt_ids(model, words) == [9, 7]
    assert prompt_ids(model, words, "") == [9]
    images = pictures(2)
    found = caption(model, words, model.encode_images(images), GenerationConfig(max_length=9), ["a", "b"], "5 6")
    wanted = generate(
        model, model.encode_images(images), [[9, 5, 6]] * 2, END, GenerationConfig(max_length=9), ["a", "b"]
    )
    assert [texts[0].text for texts in found] == [words.decode(texts[0].ids) for texts in wanted]
