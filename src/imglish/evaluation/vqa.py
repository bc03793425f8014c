"""VQA accuracy as the official script computes it (Antol et al. 2015; Goyal et al. 2017), in each of its versions.

A prediction is compared with the answers of ten people: the mean over the ten of min(1, matches among the others / 3).
So one, two, three, four or more matches of ten give 30, 60, 90, 100 %. The versions differ in what is normalised first:
see :data:`VqaVariant`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

VqaVariant = Literal["official_2021", "official_2017", "albef_vendored", "always_normalise"]
"""``official_2021``: prediction and answers are normalised, but only where the ten answers differ.
``official_2017``: the prediction always, of the answers only the punctuation, and only where they differ.
``albef_vendored``: the copy in ALBEF and LAVIS, equal to official_2017.
``always_normalise``: both, always."""
VQA_VARIANTS: tuple[VqaVariant, ...] = ("official_2021", "official_2017", "albef_vendored", "always_normalise")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_BETWEEN_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32  # the script passes a flag (re.UNICODE, 32) where the number of replacements belongs
_ARTICLES = frozenset(("a", "an", "the"))
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED)}

# Words that people write with an apostrophe too few. Forms that are words of their own (ill, id, wed, lets) are not
# here, nor those that the script spells in capitals, which no lower-cased word equals.
_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _one_missing(word: str) -> list[str]:
    """``word`` without one of its apostrophes, for each of them."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {short: word for word in _WITH_APOSTROPHES.split() for short in _one_missing(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the one entry that the script has the wrong way round


class VqaError(ValueError):
    """Answers or predictions that cannot be scored; the message names the question."""


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with the answers that people gave (ten in VQA v2), as they wrote them."""

    question_id: int
    answers: tuple[str, ...]
    answer_type: str = ""
    question_type: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.answers, str):
            raise VqaError(f"question {self.question_id}: the answers are one string, not a list of them")
        if not self.answers:
            raise VqaError(f"question {self.question_id} has no answers")


@dataclass(frozen=True)
class VqaScores:
    """Accuracies in percent: overall, by kind of answer, by kind of question, and of each question."""

    overall: float
    by_answer_type: dict[str, float]
    by_question_type: dict[str, float]
    of_question: dict[int, float]
    variant: VqaVariant


def strip_punctuation(text: str) -> str:
    """Punctuation becomes nothing where the same mark stands beside a space anywhere in ``text``, or where a comma
    stands between digits anywhere; else a space. Then periods go that no digit follows."""
    glued = _BETWEEN_DIGITS.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if glued or beside_space else " ")
    return _PERIOD.sub("", out, count=_PERIODS_REMOVED)


def simplify_words(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes back in contractions."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise_answer(text: str) -> str:
    """Both steps, after line breaks and tabs became spaces and the ends were stripped."""
    return simplify_words(strip_punctuation(_one_line(text)))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def answer_accuracy(prediction: str, answers: Sequence[str], variant: VqaVariant = "official_2021") -> float:
    """Accuracy of one prediction, 0 to 1. Each of ``answers`` is of another person, however equal they are."""
    if variant not in VQA_VARIANTS:
        raise ValueError(f"variant={variant!r}: choose one of {', '.join(VQA_VARIANTS)}")
    if variant in ("official_2017", "albef_vendored"):
        differ = len(set(answers)) > 1
        given = [strip_punctuation(answer) if differ else answer for answer in answers]
        predicted = normalise_answer(prediction)
    else:
        given = [_one_line(answer) for answer in answers]
        predicted = _one_line(prediction)
        if variant == "always_normalise" or len(set(given)) > 1:
            given = [normalise_answer(answer) for answer in given]
            predicted = normalise_answer(predicted)
    matches = [answer == predicted for answer in given]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def vqa_scores(
    questions: Iterable[AnsweredQuestion], predictions: Mapping[int, str], variant: VqaVariant = "official_2021"
) -> VqaScores:
    """Accuracies of ``predictions`` (question id -> answer) on ``questions``.

    Raises :class:`VqaError` where a question comes twice or has no prediction.
    """
    of_question: dict[int, float] = {}
    answer_types: dict[str, list[float]] = {}
    question_types: dict[str, list[float]] = {}
    for question in questions:
        number = question.question_id
        if number in of_question:
            raise VqaError(f"question {number} comes twice")
        if number not in predictions:
            raise VqaError(f"question {number} has no prediction")
        accuracy = 100.0 * answer_accuracy(predictions[number], question.answers, variant)
        of_question[number] = accuracy
        answer_types.setdefault(question.answer_type, []).append(accuracy)
        question_types.setdefault(question.question_type, []).append(accuracy)
    if not of_question:
        raise VqaError("there are no questions")
    return VqaScores(
        overall=_mean(of_question.values()),
        by_answer_type={name: _mean(values) for name, values in answer_types.items()},
        by_question_type={name: _mean(values) for name, values in question_types.items()},
        of_question=of_question,
        variant=variant,
    )


def soft_targets(answers: Sequence[str]) -> dict[str, float]:
    """Targets of answers as classes (ViLT, VLMo, BEiT-3): 0.3, 0.6, 0.9, 1 for one, two, three, more people."""
    counts = Counter(normalise_answer(answer) for answer in answers)
    return {answer: min(1.0, 0.3 * count) for answer, count in counts.items()}


def answer_weights(answers: Sequence[str]) -> dict[str, float]:
    """Weights of answers as texts to be written (ALBEF, BLIP): the share of people who gave each."""
    return {answer: count / len(answers) for answer, count in Counter(answers).items()}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
