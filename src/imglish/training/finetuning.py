"""Fine-tuning for a task: its examples, a head on a pre-trained model, its metric as validation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imglish.data.augment import policy
from imglish.data.errors import DataError, Errors
from imglish.data.loader import Position
from imglish.data.records import Record
from imglish.data.tasks.dataset import Label, TaskDataset
from imglish.data.tasks.examples import Example, TaskData, hold_out
from imglish.evaluation.encoding import Machine
from imglish.evaluation.tasks import TASKS
from imglish.evaluation.tasks.answering import answer_ids, answerer, questions
from imglish.evaluation.tasks.base import frequent
from imglish.evaluation.tasks.run import TaskResult, evaluate_task, out_of_reach
from imglish.models.capabilities import MissingCapabilityError
from imglish.models.heads import AssignmentModel, HeadConfig, TaskModel, after_assignment, with_head
from imglish.report import Report
from imglish.training.config import Recipe
from imglish.training.settings import SettingsError
from imglish.training.setup import gather_materials, new_model
from imglish.training.validation import Validated
from imglish.training.work import Events, batches_of


class TaskWork:
    """A task of :data:`imglish.evaluation.tasks.TASKS`, as ``recipe.task`` says."""

    def __init__(self, recipe: Recipe, resumed: dict[str, Any] | None = None, errors_file: Path | None = None) -> None:
        assert recipe.task.name is not None
        self.recipe, self.task = recipe, TASKS[recipe.task.name]
        self.pictures = recipe.task.pictures or self.task.pictures
        self.held_out: list[Example] = []
        examples = self._read(errors_file)
        records = [
            Record(example.key, None, (example.text, *example.answers), number)
            for number, example in enumerate(examples)
        ]
        self.materials = gather_materials(recipe, records, [], resumed, errors_file, self.task.texts)
        self.head = self._head(examples)
        self.notes: list[str] = []
        known = set(self.head.classes)
        kept = examples
        if self.head.form == "classes":  # answers that are written need not be among the candidates
            kept = [example for example in examples if not known.isdisjoint(self.task.weights(example))]
        if len(kept) < len(examples):
            self.notes.append(
                f"{len(examples) - len(kept)} of {len(examples)} training examples have none of the {len(known)} "
                "answers and are left out"
            )
        try:
            out_of_reach(self.head, self.task, self.held_out)
        except DataError as error:
            raise SettingsError("validation.data", str(error)) from error
        self.dataset = self._dataset(kept)
        self.items = len(self.dataset)
        self.validates = bool(self.held_out)
        self.last: TaskResult | None = None

    # ---- data and labels ------------------------------------------------------------------------------------------

    def _read(self, errors_file: Path | None) -> list[Example]:
        """The training examples; those that are held out go to ``held_out``."""
        recipe, task = self.recipe, self.recipe.task
        if recipe.data.train is None:
            raise SettingsError("data.train", "names no data; give a file of examples (docs/tasks.md)")
        share = recipe.data.source.max_errors
        data = TaskData(
            Path(recipe.data.train),
            _path(recipe.data.images),
            _path(task.annotations),
            recipe.data.split,
            self.pictures,
        )
        examples = self._examples("data.train", data, Errors(share, errors_file, "examples"))
        wanted = recipe.validation
        if wanted.data is not None:
            if task.hold_out:
                raise SettingsError("task.hold_out", "validation.data names other data; give one of the two")
            annotations = _path(task.validation_annotations)
            other = TaskData(Path(wanted.data), _path(wanted.images), annotations, wanted.split, self.pictures)
            errors = Errors(wanted.source.max_errors, errors_file, "examples")
            self.held_out = self._examples("validation.data", other, errors)
            shared = {example.shows for example in examples} & {example.shows for example in self.held_out}
            if shared:
                raise SettingsError(
                    "validation.data",
                    f"{len(shared)} of its pictures are training pictures too, for example {min(shared)}: it would "
                    "measure what was learned by heart; use other data or task.hold_out",
                )
        elif task.hold_out:
            self.held_out = hold_out(examples, task.hold_out, True)
            examples = hold_out(examples, task.hold_out, False)
        self.held_out = self.held_out[: wanted.limit]
        if not examples:
            raise SettingsError("task.hold_out", "no training example is left; lower it")
        return examples

    def _examples(self, key: str, data: TaskData, errors: Errors) -> list[Example]:
        try:
            examples = self.task.read(data, errors)
        except DataError as error:
            raise SettingsError(key, str(error)) from error
        if lacking := [example.place for example in examples if not example.answers]:
            raise SettingsError(key, f"{len(lacking)} examples have no answers; the first: {lacking[0]}")
        return examples

    def _head(self, examples: Sequence[Example]) -> HeadConfig:
        """The head that the recipe asks for, or that of the model to start from, where it has one."""
        task, wanted = self.task, self.recipe.task
        if wanted.answers is not None:
            names = read_answers(Path(wanted.answers))
        else:
            weights = task.written if wanted.head == "answers" else task.weights
            most = wanted.most_answers if task.texts else len(examples)  # of pictures every class is wanted
            names = task.classes or tuple(frequent(examples, weights, most))
        if not task.texts:
            names = tuple(sorted(names))  # as everybody numbers the classes of folders
        soft = task.soft and wanted.head == "classes"
        try:
            start = self.materials.tokenizer.cls_id if wanted.head == "answers" else 0
            return HeadConfig(
                task.name,
                wanted.head,
                tuple(names),
                soft,
                self.pictures,
                wanted.alpha,
                start=start,
                texts=task.texts,
                smoothing=wanted.smoothing,
            )
        except ValueError as error:
            raise SettingsError("task", str(error)) from error

    def _dataset(self, examples: Sequence[Example]) -> TaskDataset:
        data, config = self.recipe.data, self.materials.config
        crop = None if data.crop is None else (data.crop, 1.0)
        numbers = {name: number for number, name in enumerate(self.head.classes)}
        start = getattr(config, "decode_id", self.head.start)
        writes = self.head.form == "answers"

        def label(example: Example) -> Label:
            if writes:
                texts = self.task.written(example).items()
                return Label({}, tuple((answer_ids(self.materials.tokenizer, text, start), w) for text, w in texts))
            found = self.task.weights(example)
            return Label({numbers[answer]: weight for answer, weight in found.items() if answer in numbers})

        try:
            return TaskDataset(
                examples,
                label,
                config.image.transform(crop, data.flip),
                self.materials.words,
                classes=None if writes else len(numbers),
                soft=self.head.soft,
                pictures=self.pictures,
                clean=data.clean,
                max_words=data.max_words,
                cache=data.cache,
                detail=data.decode,
                augment=policy(data.augment, data.magnitude) if data.augment is not None else None,
            )
        except ValueError as error:
            raise SettingsError("data", str(error)) from error

    # ---- what a run asks for --------------------------------------------------------------------------------------

    def new_model(self) -> nn.Module:
        """The model to start from with its head: new, or that of an earlier fine-tuning for the same."""
        try:
            start = new_model(self.materials, self.recipe.seed)
            torch.manual_seed(self.recipe.seed)
            if isinstance(start, AssignmentModel):
                return after_assignment(start, self.head)
            if not isinstance(start, TaskModel):
                return with_head(start, self.head)
            if (start.head.form, start.head.classes) != (self.head.form, self.head.classes):
                raise SettingsError(
                    "model.init",
                    f"it has a head for {start.head.task} with {len(start.head.classes)} answers, not the "
                    f"{len(self.head.classes)} of this recipe: start from a model without a head",
                )
            start.head = self.head
            return start
        except MissingCapabilityError as error:
            raise SettingsError("model", str(error)) from error

    def check(self, model: nn.Module) -> None:
        """Nothing that could fail later."""

    def told(self) -> str:
        some = f"{self.items} training examples, {len(self.held_out)} held out, {len(self.head.classes)} answers"
        return "\n".join([some, *self.notes])

    def batches(self, position: Position, workers: int, errors: Errors) -> Iterator[tuple[Any, Position]]:
        return batches_of(self.recipe, self.dataset, position, workers, errors, join=self.dataset.collate)

    def validate(self, model: nn.Module, teacher: Any, errors: Errors) -> Validated:
        """The task's metric on what is held out, by all ranks together."""
        precision = "bfloat16" if self.recipe.compute.precision == "bf16" else "float32"
        machine = Machine(precision=precision, progress=False)
        words = questions(self.materials.tokenizer, asdict(self.recipe.data)) if self.task.texts else None
        answer = answerer(model, self.materials.words)
        self.last = evaluate_task(model, words, self.task, self.held_out, machine, answer=answer)
        name, score = next(iter(self.last.metrics.items()))
        entries = {"metrics": self.last.metrics, "groups": self.last.groups, "constant": self.last.constant}
        return Validated(entries, name, score, f"{self.task.name} {name} {score:.2f} %")

    def finish(self, model: nn.Module) -> Callable[[Report, Events], None]:
        from imglish.evaluation.tasks.report import add_course

        return partial(add_course, task=self.task, last=self.last, examples=self.held_out, notes=self.notes)


def read_answers(path: Path) -> tuple[str, ...]:
    """Candidate answers: a JSON list, a JSON object from answer to number (VQA v2's), or a text with one a line."""
    try:
        text = path.read_text(encoding="utf-8")
        held = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise SettingsError("task.answers", f"{path} cannot be read: {error}") from error
    if isinstance(held, dict):
        held = sorted(held, key=held.__getitem__)
    if not isinstance(held, list) or not all(isinstance(answer, str) for answer in held):
        raise SettingsError("task.answers", f"{path} holds no list of answers")
    return tuple(held)


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
