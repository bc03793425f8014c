"""Examples of a task, ready to be put in batches; every random choice from (seed, epoch, item) alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from imglish.data.aspect import AspectTransform
from imglish.data.augment import AugmentPolicy
from imglish.data.batch import TextBatch
from imglish.data.dataset import UNREADABLE_IN_A_ROW, PairDataset
from imglish.data.errors import Problem
from imglish.data.images import Detail, ImageError, ImageTransform
from imglish.data.pictures import Picture, stack
from imglish.data.records import Record
from imglish.data.tasks.batch import Answers, TaskBatch
from imglish.data.tasks.examples import Example
from imglish.data.text import CaptionStyle, clean_question, mentions_side
from imglish.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Label:
    """What is right for an example: weights of classes by number, or of answers as token ids."""

    classes: Mapping[int, float]
    answers: tuple[tuple[list[int], float], ...] = ()


@dataclass(frozen=True)
class TaskSample:
    """An example as it is in an epoch; unreadable: pictures in whose place this example stands."""

    key: str
    pixels: tuple[Picture, ...]
    ids: list[int]
    label: Label
    unreadable: tuple[Problem, ...] = ()


class TaskDataset:
    """Examples with their labels.

    label: of an example, made once. classes: how many there are where labels are classes, ``soft`` where several may be
    right for an example; None where answers are written. pictures: to a text; tokenizer: None where only pictures are
    looked at, every text then has no tokens. The rest: as in :class:`PairDataset`. A picture is mirrored only where
    neither text nor answers name a side.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        label: Callable[[Example], Label],
        transform: ImageTransform | AspectTransform,
        tokenizer: Tokenizer | None,
        *,
        classes: int | None,
        soft: bool = False,
        pictures: int = 1,
        clean: CaptionStyle = "none",
        max_words: int = 50,
        cache: bool = False,
        detail: Detail = "good",
        augment: AugmentPolicy | None = None,
    ) -> None:
        if not examples:
            raise ValueError("a data set without examples")
        self.examples = examples
        self.labels = [label(example) for example in examples]
        self.tokenizer = tokenizer
        self.classes, self.soft, self.pictures = classes, soft, pictures
        self.clean: CaptionStyle = clean
        self.max_words = max_words
        names = sorted({path for example in examples for path in example.images[:pictures]})
        self._number = {path: number for number, path in enumerate(names)}
        records = [Record(str(path), path, (), number) for path, number in self._number.items()]
        self._pictures = PairDataset(records, transform, None, cache=cache, detail=detail, augment=augment)

    def __len__(self) -> int:
        return len(self.examples)

    def sample(self, seed: int, epoch: int, item: int) -> TaskSample:
        """The item as it is in ``epoch``. Where a picture cannot be read the next example stands in, and it is named.

        Raises :class:`ImageError` when too many in a row cannot be read.
        """
        unreadable: list[Problem] = []
        for step in range(min(UNREADABLE_IN_A_ROW, len(self))):
            number = (item + step) % len(self)
            example = self.examples[number]
            side = any(map(mentions_side, (example.text, *example.answers)))
            try:
                pixels = tuple(
                    self._pictures.pixels(self._number[path], (seed, epoch, item * self.pictures + n), not side)
                    for n, path in enumerate(example.images[: self.pictures])
                )
            except ImageError as error:
                unreadable.append(Problem(example.key, error.reason, f"{example.place}: {error}"))
                continue
            return TaskSample(example.key, pixels, self._ids(example), self.labels[number], tuple(unreadable))
        last = unreadable[-1].message
        raise ImageError(f"{len(unreadable)} pictures in a row cannot be read; the last: {last}")

    def _ids(self, example: Example) -> list[int]:
        if self.tokenizer is None:
            return []
        return self.tokenizer.encode([clean_question(example.text, self.max_words, self.clean)])[0]

    def collate(self, samples: Sequence[TaskSample]) -> TaskBatch:
        """A batch of samples."""
        columns = zip(*(sample.pixels for sample in samples), strict=True)
        labels = answers = None
        if self.classes is None:
            texts = [text for sample in samples for text, _ in sample.label.answers]
            weights = [weight for sample in samples for _, weight in sample.label.answers]
            counts = tuple(len(sample.label.answers) for sample in samples)
            answers = Answers(TextBatch.of(texts), counts, torch.tensor(weights, dtype=torch.float32))
        elif self.soft:
            scores = np.zeros((len(samples), self.classes), dtype=np.float32)
            for row, sample in zip(scores, samples, strict=True):
                row[list(sample.label.classes)] = list(sample.label.classes.values())
            labels = torch.from_numpy(scores)
        else:
            labels = torch.tensor([next(iter(sample.label.classes)) for sample in samples], dtype=torch.int64)
        return TaskBatch(
            images=tuple(stack(column) for column in columns),
            texts=TextBatch.of([sample.ids for sample in samples]),
            labels=labels,
            answers=answers,
            keys=tuple(sample.key for sample in samples),
        )
