"""Models of tasks: a pre-trained model of any family with the head that its paper puts on it.

A :class:`HeadConfig` says what the head is for; :func:`with_head` puts it on. Which families can is a table, so a job
asks for the task and never for a class name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import TextBatch
from imglish.data.pictures import Pictures
from imglish.data.tasks.batch import TaskBatch
from imglish.models.albef import Albef
from imglish.models.albef_heads import AlbefAssignment, AlbefEntailment, AlbefReasoning, AlbefVqa
from imglish.models.answering import BY_PROBABILITY, RankRule, answer_loss, distilled_tokens, summed
from imglish.models.beit import Beit
from imglish.models.beit3 import Beit3
from imglish.models.beit3_heads import Beit3Classifier, Beit3Nlvr2, Beit3Vqa
from imglish.models.beit_heads import BeitClassifier, with_own_tables
from imglish.models.blip import Blip
from imglish.models.blip_heads import BlipClassifier, BlipReasoning, BlipVqa
from imglish.models.capabilities import Embedded, EncodedImages, MissingCapabilityError
from imglish.models.captioning import CaptionForm, CaptionState
from imglish.models.vilt_heads import ViltAnswers, ViltReasoning
from imglish.models.vlmo_heads import VlmoAnswers, VlmoReasoning
from imglish.nn.segments import Ragged
from imglish.objectives.gather import global_mean
from imglish.objectives.mlm import mlm_loss
from imglish.objectives.momentum import MomentumTeacher, TeacherConfig

ASSIGNMENT = "text_assignment"


@dataclass(frozen=True)
class HeadConfig:
    """What a task model answers.

    task: name of the task; form: "classes", one of ``classes`` is chosen, or "answers", a text is written (``classes``
    are then the candidates that it is ranked among). soft: several classes may be right, each to a degree (binary
    cross-entropy); pictures: to a text; alpha: weight of what the momentum copy says in place of the labels, reached
    over the first epoch (0: no copy), and its momentum; start: token that opens a written answer, of a model that has
    none of its own for it; texts: whether a text comes with the pictures; smoothing: share of a class label that is
    spread over all classes.
    """

    task: str
    form: Literal["classes", "answers"] = "classes"
    classes: tuple[str, ...] = ()
    soft: bool = False
    pictures: int = 1
    alpha: float = 0.0
    momentum: float = 0.995
    start: int = 0
    texts: bool = True
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"{len(set(self.classes))} different classes of {len(self.classes)}: a choice needs two")
        if self.pictures < 1:
            raise ValueError(f"pictures is {self.pictures}: a task has at least one")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, it must lie in 0..1")
        if self.alpha and self.soft:
            raise ValueError("soft labels are not distilled: set alpha to 0")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}, it must lie in 0..1, below 1")
        if self.smoothing and (self.soft or self.form == "answers"):
            raise ValueError("only a choice of one class is smoothed: set smoothing to 0")
        if not self.texts and (self.form, self.pictures) != ("classes", 1):
            raise ValueError("without a text there is one picture to choose a class for")


class TaskModel(nn.Module):
    """A model with a head: it keeps family and configuration of what it was made of."""

    def __init__(self, base: nn.Module, head: HeadConfig, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = head
        self.config: Any = base.config
        self.family: str = base.family  # type: ignore[assignment]

    def forward(
        self, batch: TaskBatch, teacher: Any = None, feature_grads: Embedded | None = None
    ) -> dict[str, Tensor]:
        return self.losses(batch, teacher, feature_grads)

    def losses(self, batch: TaskBatch, teacher: Any = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]:
        """One training step."""
        raise NotImplementedError

    def make_teacher(self) -> MomentumTeacher[Self] | None:
        """The momentum copy whose answers are learned too; none where ``alpha`` is 0."""
        if not self.head.alpha:
            return None
        config = TeacherConfig(momentum=self.head.momentum, queue_size=0, alpha=self.head.alpha)
        return MomentumTeacher(self, config, 0)

    def head_parameters(self) -> set[str]:
        """Names of the parameters that the pre-trained model has not."""
        base = {f"inner.{name}." for name in ("albef", "blip", "vilt", "vlmo", "body") if hasattr(self.inner, name)}
        return {name for name, _ in self.named_parameters() if not name.startswith(tuple(base))}


class ClassModel(TaskModel):
    """Chooses one of ``head.classes`` for a text and its pictures, or for a picture alone
    (:class:`imglish.models.capabilities.Classifies`)."""

    def classify(self, images: Sequence[Pictures], texts: TextBatch) -> Tensor:
        """Logits ``(B, C)``; ``images[n]``: the n-th picture of each of the B texts, which a head without texts does
        not look at."""
        shown = images[0] if self.head.pictures == 1 else images
        logits: Tensor = self.inner(shown, texts) if self.head.texts else self.inner(shown)
        return logits

    def losses(self, batch: TaskBatch, teacher: Any = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]:
        """Cross-entropy with the (smoothed) class, partly with what the momentum copy says (ALBEF, section 3.3); or,
        with soft labels, binary cross-entropy summed over classes (ViLT, VLMo and BEiT-3 for VQA)."""
        if batch.labels is None:
            raise ValueError("this model chooses among classes: the batch has no labels")
        logits = self.classify(batch.images, batch.texts).float()
        chosen = logits.detach().argmax(1)
        if self.head.soft:
            loss = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="sum")
            hit = batch.labels.gather(1, chosen[:, None]).mean()
            return {"classes": global_mean(loss, len(batch)), "metric/accuracy": hit}
        soft = None
        if teacher is not None and teacher.alpha > 0:
            with torch.no_grad():
                soft = teacher.model.classify(batch.images, batch.texts)
        alpha = 0.0 if teacher is None else teacher.alpha
        loss = mlm_loss(logits, batch.labels, soft, alpha, smoothing=self.head.smoothing)
        return {"classes": loss, "metric/accuracy": (chosen == batch.labels).float().mean()}


class AnswerModel(TaskModel):
    """Writes answers, or ranks candidates (:class:`imglish.models.capabilities.Answers`); to the engine that writes, a
    question is what a picture is in captioning."""

    inner: AlbefVqa | BlipVqa

    def questions(self, images: Sequence[Pictures], texts: TextBatch) -> Ragged:
        """Fused states of the B texts with their pictures."""
        return self.inner.questions(images[0], texts)  # type: ignore[arg-type]

    def rank(
        self, questions: Ragged, candidates: Sequence[Sequence[int]], rule: RankRule = BY_PROBABILITY, keep: int = 5
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.inner.decoder.rank(questions, candidates, rule, keep)

    def caption_form(self) -> CaptionForm:
        return CaptionForm(start=self.inner.decoder.start, longest=self.config.max_length)

    def start_captions(self, images: EncodedImages, room: int) -> CaptionState:
        assert isinstance(images.tokens, Ragged)
        return self.inner.decoder.begin(images.tokens, room)

    def continue_captions(self, state: CaptionState, texts: TextBatch) -> Tensor:
        return self.inner.decoder.logits(self.inner.decoder.extend(state, texts))

    def losses(self, batch: TaskBatch, teacher: Any = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]:
        """Language modelling of the answers, each summed over its tokens and weighted, mean over questions; partly with
        what the momentum copy says (ALBEF), or label-smoothed (BLIP)."""
        answers = batch.answers
        if answers is None:
            raise ValueError("this model writes answers: the batch has none")
        decoder = self.inner.decoder
        logits, targets, owner = decoder.written(self.questions(batch.images, batch.texts), answers)
        tokens = answer_loss(logits, targets, getattr(self.config, "smoothing", 0.0))
        if teacher is not None and teacher.alpha > 0:
            copy = teacher.model
            with torch.no_grad():
                theirs, _, _ = copy.inner.decoder.written(copy.questions(batch.images, batch.texts), answers)
            tokens = torch.lerp(tokens, distilled_tokens(logits, theirs), teacher.alpha)
        each = summed(tokens, owner, len(answers.texts))
        return {"answers": global_mean((each * answers.weights).sum(), len(batch))}


class AssignmentModel(TaskModel):
    """Learns from pairs which of two pictures a caption belongs to; NLVR2 then begins with its layers (ALBEF)."""

    inner: AlbefAssignment

    def losses(self, batch: Any, teacher: Any = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]:
        logits, case = self.inner(batch)
        accuracy = (logits.detach().argmax(1) == case).float().mean()
        return {"assignment": mlm_loss(logits, case), "metric/accuracy": accuracy}


# ---- which families have which head --------------------------------------------------------------------------------

Builder = Callable[[nn.Module, HeadConfig], nn.Module]


def _beit3(base: nn.Module, head: HeadConfig) -> nn.Module:
    assert isinstance(base, Beit3)
    body, classes = base.body, len(head.classes)
    if head.pictures > 1:
        return Beit3Nlvr2(body, classes, head.pictures)
    body.norm = None
    return Beit3Vqa(body, classes) if head.texts else Beit3Classifier(body, classes)


def _beit(base: nn.Module, head: HeadConfig) -> nn.Module:
    assert isinstance(base, Beit)
    return BeitClassifier(with_own_tables(base), len(head.classes))


def _albef(base: nn.Module, head: HeadConfig) -> nn.Module:
    assert isinstance(base, Albef)
    classes = len(head.classes)
    return AlbefEntailment(base, classes) if head.pictures == 1 else AlbefReasoning(base, head.pictures, classes)


def _blip(base: nn.Module, head: HeadConfig) -> nn.Module:
    assert isinstance(base, Blip)
    classes, merged = len(head.classes), len(base.layers) // 2  # the published one: 6 of 12
    if head.pictures == 1:
        return BlipClassifier(base, classes)
    return BlipReasoning(base, classes, merged, head.pictures)


def _one_stream(one: Callable[..., nn.Module], several: Callable[..., nn.Module]) -> Builder:
    """Of a family that reads pictures and text in one Transformer (ViLT, VLMo), with a token type a picture."""

    def build(base: nn.Module, head: HeadConfig) -> nn.Module:
        if head.pictures == 1:
            return one(base, len(head.classes))
        _more_types(base, 1 + head.pictures)
        return several(base, head.pictures, len(head.classes))

    return build


def _more_types(base: Any, count: int) -> None:
    """Give a table of token types ``count`` rows; the new ones begin as copies of the first picture's (ViLT, VLMo)."""
    old = base.types.weight
    if len(old) < count:
        table = nn.Embedding(count, old.shape[1], device=old.device, dtype=old.dtype)
        with torch.no_grad():
            table.weight.copy_(torch.cat([old, old[1:2].expand(count - len(old), -1)]))
        base.types = table
        base.config = replace(base.config, types=count)


def _albef_answers(base: nn.Module, head: HeadConfig) -> nn.Module:
    assert isinstance(base, Albef)
    return AlbefVqa(base, head.start)


def _blip_answers(base: nn.Module, head: HeadConfig) -> nn.Module:
    assert isinstance(base, Blip)
    return BlipVqa(base)


CLASSIFIERS: dict[str, Builder] = {
    "albef": _albef,
    "beit3": _beit3,
    "blip": _blip,
    "vilt": _one_stream(ViltAnswers, ViltReasoning),
    "vlmo": _one_stream(VlmoAnswers, VlmoReasoning),
}
PICTURE_CLASSIFIERS: dict[str, Builder] = {"beit": _beit, "beit3": _beit3}
WRITERS: dict[str, Builder] = {"albef": _albef_answers, "blip": _blip_answers}


def families(form: str, texts: bool = True) -> list[str]:
    """Families that have a head of this form, for pictures with or without texts."""
    return sorted(_builders(form, texts))


def _builders(form: str, texts: bool) -> dict[str, Builder]:
    return WRITERS if form == "answers" else CLASSIFIERS if texts else PICTURE_CLASSIFIERS


def for_assignment(base: nn.Module) -> AssignmentModel:
    """``base``, which is taken over, made ready for text assignment."""
    if not isinstance(base, Albef):
        family: Any = base.family
        raise MissingCapabilityError(f"text assignment is a pre-training of ALBEF for NLVR2, not of {family}")
    head = HeadConfig(ASSIGNMENT, classes=("first", "second", "neither"), pictures=2)
    return AssignmentModel(base, head, AlbefAssignment(base))


def after_assignment(model: AssignmentModel, head: HeadConfig) -> TaskModel:
    """A model for NLVR2 that begins with the layers of text assignment; the head is new."""
    reasoning = model.inner.reasoning
    if head.pictures != reasoning.pictures or head.form != "classes":
        raise MissingCapabilityError(f"text assignment prepares a choice about {reasoning.pictures} pictures")
    width = reasoning.albef.config.width
    reasoning.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, len(head.classes)))
    return ClassModel(reasoning.albef, head, reasoning)


def with_head(base: nn.Module, head: HeadConfig) -> TaskModel:
    """``base``, which is taken over, with a new head.

    Raises :class:`MissingCapabilityError` for a family that has none of the kind.
    """
    family: Any = base.family
    if head.task == ASSIGNMENT:
        return for_assignment(base)
    builders = _builders(head.form, head.texts)
    if family not in builders:
        reads = "reads a picture and a text together" if head.texts else "reads pictures"
        what = "chooses among classes" if head.form == "classes" else "writes answers"
        raise MissingCapabilityError(
            f"{head.task} needs a model that {reads}, with a head that {what}; the family {family} has none. Families "
            f"that have: {', '.join(sorted(builders))}"
        )
    if head.form == "classes":
        return ClassModel(base, head, builders[family](base, head))
    if head.pictures != 1:
        raise MissingCapabilityError(f"{head.task}: answers are written about one picture, not about {head.pictures}")
    return AnswerModel(base, head, builders[family](base, head))
