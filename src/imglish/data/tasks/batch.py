"""What a fine-tuning step receives: texts, each with its pictures, and what is to be said to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imglish.data.batch import TextBatch
from imglish.data.pictures import Pictures
from imglish.nn.segments import Segments


@dataclass(frozen=True)
class Answers:
    """Answers to be written: packed ``texts``, ``counts[b]`` of them for question b, one behind the other, each with
    its weight float32 ``(A,)``."""

    texts: TextBatch
    counts: tuple[int, ...]
    weights: Tensor

    def map(self, move: Callable[[Tensor], Tensor]) -> Answers:
        return Answers(self.texts.map(move), self.counts, move(self.weights))

    def part(self, questions: slice) -> Answers:
        """The answers of some questions, as views."""
        answers = slice(sum(self.counts[: questions.start]), sum(self.counts[: questions.stop]))
        segments = self.texts.segments
        rows = slice(int(segments.bounds[answers.start]), int(segments.bounds[answers.stop]))
        texts = TextBatch(self.texts.ids[rows], Segments(segments.lengths[answers]))
        return Answers(texts, self.counts[questions], self.weights[answers])


@dataclass(frozen=True)
class TaskBatch:
    """B texts, each with as many pictures.

    images: the first picture of every text, the second, ...; labels: the class int64 ``(B,)``, or float32 ``(B, C)``
    how right each class is; answers: in place of labels, what is to be written; keys: names for messages.
    """

    images: tuple[Pictures, ...]
    texts: TextBatch
    labels: Tensor | None = None
    answers: Answers | None = None
    keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def map(self, move: Callable[[Tensor], Tensor]) -> TaskBatch:
        return replace(
            self,
            images=tuple(move(some) if isinstance(some, Tensor) else some.map(move) for some in self.images),
            texts=self.texts.map(move),
            labels=move(self.labels) if self.labels is not None else None,
            answers=self.answers.map(move) if self.answers is not None else None,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TaskBatch:
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TaskBatch:
        """Called by ``DataLoader(pin_memory=True)``, so that copies to a GPU need not block."""
        return self.map(lambda x: x.pin_memory())

    def blended(self) -> TaskBatch:
        """There are no mixtures among tasks."""
        return self

    def part(self, texts: slice) -> TaskBatch:
        """Some of the texts with what belongs to them, as views."""
        segments = self.texts.segments
        rows = slice(int(segments.bounds[texts.start]), int(segments.bounds[texts.stop]))
        return replace(
            self,
            images=tuple(some[texts] for some in self.images),
            texts=TextBatch(self.texts.ids[rows], Segments(segments.lengths[texts])),
            labels=self.labels[texts] if self.labels is not None else None,
            answers=self.answers.part(texts) if self.answers is not None else None,
            keys=self.keys[texts],
        )
