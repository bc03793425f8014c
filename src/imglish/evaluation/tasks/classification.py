"""Which of many classes does a picture show? (ImageNet), by a classifier that was trained for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imglish.data.tasks import classification as data
from imglish.data.tasks.examples import Example
from imglish.evaluation.tasks.base import Task, TaskScores, grouped, labels, mean


def score(examples: Sequence[Example], predictions: Mapping[str, str]) -> TaskScores:
    """Accuracy over the pictures (top-1), its mean over the classes, and that of each class."""
    of_example = {example.key: 100.0 * (predictions[example.key] == example.answers[0]) for example in examples}
    of_class = grouped(examples, of_example)
    accuracy = mean(list(of_example.values()))
    metrics = {"accuracy": accuracy, "mean recall": mean(list(of_class.values())) if of_class else accuracy}
    return TaskScores(metrics, of_class, of_example)


TASK = Task(
    name="classification",
    title="Classes of pictures",
    read=data.read,
    weights=labels,
    written=labels,
    score=score,
    texts=False,
)
