"""Visual question answering: VQA v2 and its like, or questions with one answer (DAQUAR)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imglish.data.tasks import vqa as data
from imglish.data.tasks.examples import Example
from imglish.evaluation.tasks.base import Task, TaskScores, grouped, mean
from imglish.evaluation.vqa import VqaVariant, answer_accuracy, answer_weights, normalise_answer, soft_targets

PEOPLE = 10  # who answer a question of VQA v2; with fewer its accuracy cannot reach 100 %


def weights(example: Example) -> Mapping[str, float]:
    """How right each answer is, normalised: by the number of people, or 1 where too few were asked to count them."""
    if len(example.answers) >= PEOPLE:
        return soft_targets(example.answers)
    return dict.fromkeys(map(normalise_answer, example.answers), 1.0)


def score(
    examples: Sequence[Example], predictions: Mapping[str, str], variant: VqaVariant = "official_2021"
) -> TaskScores:
    """VQA accuracy where ten people answered every question, else the share of predictions that are among the answers
    (both normalised)."""
    counted = all(len(example.answers) >= PEOPLE for example in examples)
    of_example = {}
    for example in examples:
        said = predictions[example.key]
        if counted:
            of_example[example.key] = 100 * answer_accuracy(said, example.answers, variant)
        else:
            of_example[example.key] = 100.0 * (normalise_answer(said) in map(normalise_answer, example.answers))
    metrics = {"accuracy": mean(list(of_example.values()))}
    if counted:
        return TaskScores(metrics, grouped(examples, of_example), of_example, (f"VQA accuracy, variant {variant}",))
    note = f"questions have fewer than {PEOPLE} answers, so right is a prediction that is one of them"
    several = [of_example[example.key] for example in examples if len(set(example.answers)) > 1]
    single = [of_example[example.key] for example in examples if len(set(example.answers)) == 1]
    if several and single:
        groups = {"with one answer": mean(single), "with several": mean(several)}
        return TaskScores(metrics, grouped(examples, of_example) | groups, of_example, (note,))
    return TaskScores(metrics, grouped(examples, of_example), of_example, (note,))


TASK = Task(
    name="vqa",
    title="Visual question answering",
    read=data.read,
    weights=weights,
    written=lambda example: answer_weights(example.answers),
    score=score,
    soft=True,
)
