"""Visual entailment (SNLI-VE): does the picture entail the sentence, contradict it, or leave it open?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imglish.data.tasks import entailment as data
from imglish.data.tasks.examples import Example
from imglish.evaluation.tasks.base import Task, TaskScores, grouped, labels, mean


def score(examples: Sequence[Example], predictions: Mapping[str, str]) -> TaskScores:
    """Accuracy, overall and of each class."""
    of_example = {example.key: 100.0 * (predictions[example.key] == example.answers[0]) for example in examples}
    return TaskScores({"accuracy": mean(list(of_example.values()))}, grouped(examples, of_example), of_example)


TASK = Task(
    name="entailment",
    title="Visual entailment",
    read=data.read,
    weights=labels,
    written=labels,
    score=score,
    classes=data.CLASSES,
)
