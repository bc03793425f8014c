"""What a task is: how its data are read, what a head is asked, what counts as right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from imglish.data.errors import Errors
from imglish.data.tasks.examples import Example, TaskData


@dataclass(frozen=True)
class TaskScores:
    """In percent. metrics: the first one is that by which models are chosen; groups: of each kind of examples;
    of_example: by key; notes: what a reader has to know about the numbers."""

    metrics: dict[str, float]
    groups: dict[str, float]
    of_example: dict[str, float] = field(repr=False)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """read: examples of its files; classes: what may be said, empty where the training answers decide; soft: several
    answers may be right, each to a degree; pictures: to a text; weights: what is right for an example, answer ->
    weight, as classes, and as texts that are to be written; score: of predictions (key -> answer), which may be of
    fewer examples; the keyword ``variant`` chooses among the rules of a metric; texts: whether a text comes with the
    pictures."""

    name: str
    title: str
    read: Callable[[TaskData, Errors], list[Example]]
    weights: Callable[[Example], Mapping[str, float]]
    written: Callable[[Example], Mapping[str, float]]
    score: Callable[..., TaskScores]
    classes: tuple[str, ...] = ()
    soft: bool = False
    pictures: int = 1
    texts: bool = True


def grouped(examples: Sequence[Example], of_example: Mapping[str, float]) -> dict[str, float]:
    """The mean of each kind of examples, where there are several kinds."""
    kinds: dict[str, list[float]] = {}
    for example in examples:
        kinds.setdefault(example.kind, []).append(of_example[example.key])
    return {kind: mean(values) for kind, values in sorted(kinds.items())} if len(kinds) > 1 else {}


def labels(example: Example) -> dict[str, float]:
    """The answers of an example that is right or wrong, each with weight 1."""
    return dict.fromkeys(example.answers, 1.0)


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def frequent(examples: Sequence[Example], weights: Callable[[Example], Mapping[str, float]], most: int) -> list[str]:
    """The answers that are right most often, at most ``most``; equal ones by name."""
    counts: Counter[str] = Counter()
    for example in examples:
        counts.update(dict(weights(example)))
    return [answer for answer, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]


def best_constant(examples: Sequence[Example], task: Task) -> str:
    """The one answer that is right most often: what a model has to beat that looks at nothing."""
    return frequent(examples, task.weights, 1)[0]
