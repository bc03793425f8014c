"""The momentum teacher and its queues: a component that the trainer owns, saves and restores (ALBEF, sections 3.2-3.3).

Order of one training step: ``losses`` (teacher features, similarities against batch and queue) -> backward ->
optimiser -> ``update`` (this step's teacher features enter the queue; the teacher moves towards the student).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.objectives.gather import gather

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class TeacherConfig:
    """momentum: of the moving average, a step; queue_size: features kept of earlier batches (0: none); alpha: weight of
    the teacher's soft targets, reached linearly over the first ``ramp_epochs`` (ALBEF 1, BLIP 2)."""

    momentum: float = 0.995
    queue_size: int = 65536
    alpha: float = 0.4
    ramp_epochs: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"teacher.momentum is {self.momentum}, it must lie in 0..1")
        if self.queue_size < 0:
            raise ValueError(f"teacher.queue_size is {self.queue_size}, it must be at least 0")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"teacher.alpha is {self.alpha}, it must lie in 0..1")


class FeatureQueue:
    """Ring buffer of the last K momentum features of pictures and texts, with their image ids; any batch size.

    Pointer and fill are host integers, so the filled part is a view and reading it never waits for the device.
    """

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        self.image = torch.zeros(size, width, device=device)
        self.text = torch.zeros(size, width, device=device)
        self.ids = torch.full((size,), -1, dtype=torch.int64, device=device)
        self.pointer = 0
        self.filled = 0

    def push(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Write ``(B, E)`` features and ``(B,)`` ids at the pointer, around the end; of more than K the last K stay."""
        size = self.ids.shape[0]
        image, text, ids = image[-size:], text[-size:], ids[-size:]
        first = min(ids.shape[0], size - self.pointer)
        for store, new in ((self.image, image), (self.text, text), (self.ids, ids)):
            store[self.pointer : self.pointer + first] = new[:first]
            store[: ids.shape[0] - first] = new[first:]
        self.filled = min(size, max(self.filled, self.pointer + ids.shape[0]))
        self.pointer = (self.pointer + ids.shape[0]) % size

    def content(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of what has been written: image ``(F, E)``, text ``(F, E)``, ids ``(F,)``."""
        return self.image[: self.filled], self.text[: self.filled], self.ids[: self.filled]

    def state_dict(self) -> dict[str, Any]:
        tensors = {"image": self.image, "text": self.text, "ids": self.ids}
        return tensors | {"pointer": self.pointer, "filled": self.filled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("image", "text", "ids"):
            mine, theirs = getattr(self, name), state[name]
            if mine.shape != theirs.shape:
                raise ValueError(f"queue.{name} is {tuple(theirs.shape)} in the checkpoint, {tuple(mine.shape)} here")
            mine.copy_(theirs)
        self.pointer, self.filled = int(state["pointer"]), int(state["filled"])


class MomentumTeacher(Generic[ModelT]):
    """A slowly moving copy of the student, without gradients, and the queue of its features.

    ``model``: the copy, where a part of the student is enough; its parameters have the names that they have there.
    """

    def __init__(self, student: ModelT, config: TeacherConfig, embed_dim: int, model: ModelT | None = None) -> None:
        self.config = config
        self.model: ModelT = (copy.deepcopy(student) if model is None else model).requires_grad_(False)
        self.alpha = 0.0 if config.ramp_epochs > 0 else config.alpha
        device = next(student.parameters()).device
        self.queue = FeatureQueue(config.queue_size, embed_dim, device) if config.queue_size else None
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None

    def at(self, epochs: float) -> None:
        """Set alpha for a progress of ``epochs`` (fractional) since the start of training."""
        ramp = self.config.ramp_epochs
        self.alpha = self.config.alpha * (min(1.0, epochs / ramp) if ramp > 0 else 1.0)

    def remember(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Keep this step's teacher features for the queue; they enter it after the backward pass, in :meth:`update`."""
        self._pending = (image, text, ids)

    def enqueue(self) -> None:
        """Move the remembered features into the queue, if any."""
        if self._pending is not None and self.queue is not None:
            self.queue.push(*self._pending)
        self._pending = None

    @torch.no_grad()
    def blend(self, student: nn.Module) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, all parameters in one fused call."""
        theirs = {name: parameter.detach() for name, parameter in student.named_parameters()}
        names, mine = zip(*self.model.named_parameters(), strict=True)
        torch._foreach_lerp_(mine, [theirs[name] for name in names], 1 - self.config.momentum)
        buffers = dict(student.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

    def update(self, student: nn.Module) -> None:
        """After the optimiser's step: queue the features that the step used, then move towards ``student``."""
        self.enqueue()
        self.blend(student)

    def state_dict(self) -> dict[str, Any]:
        self.enqueue()
        state: dict[str, Any] = {"model": self.model.state_dict(), "alpha": self.alpha}
        return state | ({"queue": self.queue.state_dict()} if self.queue is not None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if ("queue" in state) != (self.queue is not None):
            raise ValueError("teacher.queue_size: one of checkpoint and recipe has a queue, the other has none")
        self.model.load_state_dict(state["model"])
        self.alpha = float(state["alpha"])
        if self.queue is not None:
            self.queue.load_state_dict(state["queue"])
        self._pending = None


@dataclass(frozen=True)
class DistilledItc:
    """The loss, 0-D, and the student's and teacher's similarities ``(B, N + queue)`` in both directions."""

    loss: Tensor
    i2t: Tensor
    t2i: Tensor
    i2t_teacher: Tensor
    t2i_teacher: Tensor


def distilled_itc(
    image: Tensor,
    text: Tensor,
    image_m: Tensor,
    text_m: Tensor,
    ids: Tensor,
    temperature: Tensor,
    teacher: MomentumTeacher[Any],
    swapped: Tensor | None = None,
) -> DistilledItc:
    """ITC against momentum features of this batch (all ranks) and of the queue, with soft targets (ALBEF, eq. 1 and 6).

    image, text: student ``(B, E)``; image_m, text_m: teacher ``(B, E)``, no gradient; ids: ``(B,)``, entries of one
    picture share the probability of a positive; temperature: 0-D; swapped: student features ``(B, E)`` of one wrong
    caption a picture, extra candidates of that picture alone. Targets are
    alpha * softmax(teacher similarities) + (1 - alpha) * positives; the loss is the soft cross-entropy, averaged over
    rows and directions. The teacher remembers the batch for its queue.
    """
    image_all, text_all, ids_all = gather(image_m), gather(text_m), gather(ids)
    teacher.remember(image_all, text_all, ids_all)
    columns = ids_all
    image_bank, text_bank = [image_all], [text_all]
    if teacher.queue is not None:
        image_q, text_q, ids_q = teacher.queue.content()
        image_bank.append(image_q)
        text_bank.append(text_q)
        columns = torch.cat([ids_all, ids_q])

    def similarities(x: Tensor, bank: list[Tensor]) -> Tensor:
        # logits are joined, not the (much larger) banks of features
        return torch.cat([x @ part.to(x.dtype).T for part in bank], dim=1).float() / temperature

    positive = (ids[:, None] == columns[None, :]).float()
    positive = positive / positive.sum(dim=1, keepdim=True)
    i2t, t2i = similarities(image, text_bank), similarities(text, image_bank)
    with torch.no_grad():
        i2t_teacher, t2i_teacher = similarities(image_m, text_bank), similarities(text_m, image_bank)

    def direction(logits: Tensor, from_teacher: Tensor, extra: Tensor | None) -> Tensor:
        target = positive
        if teacher.alpha > 0:
            target = torch.lerp(positive, torch.softmax(from_teacher, dim=1), teacher.alpha)
        if extra is not None:
            logits, target = torch.cat([logits, extra], dim=1), F.pad(target, (0, extra.shape[1]))
        return -(F.log_softmax(logits, dim=1) * target).sum(dim=1).mean()

    wrong = None if swapped is None else (image * swapped).sum(dim=1, keepdim=True).float() / temperature
    loss = (direction(i2t, i2t_teacher, wrong) + direction(t2i, t2i_teacher, None)) / 2
    return DistilledItc(loss, i2t, t2i, i2t_teacher, t2i_teacher)
