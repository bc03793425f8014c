"""NLVR2 (Suhr et al. 2019): is a sentence true of a pair of pictures? Accuracy and consistency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

_TRUTH = {"true": True, "false": False}


class ReasoningError(ValueError):
    """Examples or predictions that cannot be scored; the message names the example."""


@dataclass(frozen=True)
class ReasoningScores:
    """In percent. accuracy: of examples; consistency: of sentences that are judged right on all their pairs."""

    accuracy: float
    consistency: float
    examples: int
    sentences: int


def truth(label: str | bool) -> bool:
    """A label as the files write it: true or false in any case of letters."""
    found = label if isinstance(label, bool) else _TRUTH.get(str(label).strip().lower())
    if found is None:
        raise ReasoningError(f"the label {label!r} is neither true nor false")
    return found


def sentence_of(identifier: str) -> str:
    """What all examples of one sentence have in common: ``split-set-pair-sentence`` without the number of the pair."""
    fields = identifier.split("-")
    if len(fields) != 4:
        raise ReasoningError(f"{identifier!r} is not an identifier: split-set-pair-sentence")
    return "-".join((*fields[:2], "", fields[3]))


def reasoning_scores(
    labels: Mapping[str, str | bool] | Mapping[str, str] | Iterable[tuple[str, str | bool]],
    predictions: Mapping[str, str | bool] | Mapping[str, str],
    sentence_of: Callable[[str], str] = sentence_of,
) -> ReasoningScores:
    """Scores of ``predictions`` (identifier -> label) against ``labels``, a mapping or pairs of the same; sentence_of:
    identifier -> the sentence that it is about.

    Raises :class:`ReasoningError` on an example that comes twice or has no prediction, and on labels of other words.
    """
    right: dict[str, bool] = {}
    sentences: dict[str, bool] = {}
    for identifier, label in labels.items() if isinstance(labels, Mapping) else labels:
        if identifier in right:
            raise ReasoningError(f"{identifier} comes twice")
        if identifier not in predictions:
            raise ReasoningError(f"{identifier} has no prediction")
        hit = truth(label) == truth(predictions[identifier])
        right[identifier] = hit
        sentence = sentence_of(identifier)
        sentences[sentence] = sentences.get(sentence, True) and hit
    if not right:
        raise ReasoningError("there are no examples")
    return ReasoningScores(
        accuracy=100.0 * sum(right.values()) / len(right),
        consistency=100.0 * sum(sentences.values()) / len(sentences),
        examples=len(right),
        sentences=len(sentences),
    )
