"""NLVR2 and its like: is a statement true of two pictures, or of several?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imglish.data.tasks import nlvr2 as data
from imglish.data.tasks.examples import Example
from imglish.evaluation.nlvr2 import reasoning_scores, sentence_of
from imglish.evaluation.tasks.base import Task, TaskScores, grouped, labels


def score(examples: Sequence[Example], predictions: Mapping[str, str]) -> TaskScores:
    """Accuracy, and consistency: sentences that are judged right with all their pictures. NLVR2's identifiers say which
    examples share a sentence; elsewhere those of equal text do."""
    official = all(example.key.count("-") == 3 for example in examples)
    texts = {example.key: example.text for example in examples}
    right = {example.key: example.answers[0] for example in examples}
    found = reasoning_scores(right, predictions, sentence_of if official else texts.__getitem__)
    of_example = {key: 100.0 * (predictions[key] == label) for key, label in right.items()}
    metrics = {"accuracy": found.accuracy, "consistency": found.consistency}
    how = "by identifier" if official else "by text"
    return TaskScores(metrics, grouped(examples, of_example), of_example, (f"{found.sentences} sentences, {how}",))


TASK = Task(
    name="nlvr2",
    title="Statements about pictures",
    read=data.read,
    weights=labels,
    written=labels,
    score=score,
    classes=data.CLASSES,
    pictures=2,
)
