"""How a model answers: by its classes, by ranking candidates, or by writing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from imglish.data.batch import TextBatch
from imglish.data.text import clean_question
from imglish.evaluation.encoding import Cleaned, Encodes
from imglish.evaluation.tasks.run import SHOWN, Answerer, classes
from imglish.generation.config import GenerationConfig
from imglish.generation.engine import Vocabulary, generate
from imglish.models.answering import BY_PROBABILITY, RankRule
from imglish.models.capabilities import Answers, EncodedImages

How = Literal["ranked", "generated"]


def questions(tokenizer: Encodes, trained: Mapping[str, Any]) -> Cleaned:
    """``tokenizer`` behind the clean-up of questions that ``trained`` states, the ``data`` of a recipe."""
    most, style = trained.get("max_words", 50), trained.get("clean", "none")
    return Cleaned(tokenizer, partial(clean_question, max_words=most, style=style))


def answerer(
    model: Any, tokenizer: Vocabulary | None, how: How = "ranked", rule: RankRule = BY_PROBABILITY
) -> Answerer:
    """How ``model`` answers; for one that writes answers: ``ranked`` among the candidates of its head by ``rule``, or
    ``generated`` by three beams."""
    if not isinstance(model, Answers):
        return classes
    assert tokenizer is not None  # whatever writes answers reads questions
    if how == "generated":
        return _generated(tokenizer)
    names = model.head.classes
    candidates = [answer_ids(tokenizer, name, None) for name in names]

    def ranked(model: Any, images: Sequence[Any], texts: TextBatch) -> list[tuple[tuple[str, float], ...]]:
        numbers, scores = model.rank(model.questions(images, texts), candidates, rule, SHOWN)
        return [
            tuple((names[number], math.exp(score)) for number, score in zip(row, values, strict=True))
            for row, values in zip(numbers.tolist(), scores.tolist(), strict=True)
        ]

    return ranked


def answer_ids(tokenizer: Vocabulary, answer: str, start: int | None) -> list[int]:
    """Tokens of a written answer: ``start`` (None: without), words, closing token."""
    words = tokenizer.encode([answer])[0]
    words = words[words[:1] == [tokenizer.bos_id] :]
    words = words[: len(words) - (words[-1:] == [tokenizer.eos_id])]
    return [*([] if start is None else [start]), *words, tokenizer.eos_id]


def _generated(tokenizer: Vocabulary) -> Answerer:
    def write(model: Any, images: Sequence[Any], texts: TextBatch) -> list[tuple[tuple[str, float], ...]]:
        states = model.questions(images, texts)
        encoded = EncodedImages(states.rows.new_zeros(len(states), 0), states)
        form = model.caption_form()
        config = GenerationConfig(beams=3, max_length=min(12, form.longest))
        found = generate(model, encoded, [[form.start]] * len(states), tokenizer.eos_id, config, [""] * len(states))
        return [((tokenizer.decode(best.ids), math.exp(best.score)),) for (best,) in found]

    return write
