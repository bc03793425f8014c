"""Zero-shot classification (Radford et al. 2021, section 3.1): classes are texts, written into templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ClassScores:
    """One class: pictures of it, percent of them found, and the class that they are most often taken for instead."""

    name: str
    pictures: int
    recall: float
    taken_for: str
    taken: int


@dataclass(frozen=True)
class Classification:
    """In percent. top1, top5: of pictures (5 is clamped to the number of classes); mean_recall: over the classes."""

    top1: float
    top5: float
    mean_recall: float
    ties: float
    classes: tuple[ClassScores, ...]


def class_features(texts_CTE: Tensor) -> Tensor:
    """Features ``(C, E)`` of C classes from those of T templates each: normalise, mean, normalise again."""
    if texts_CTE.ndim != 3 or 0 in texts_CTE.shape:
        raise ValueError(f"text features have shape (classes, templates, width), not {tuple(texts_CTE.shape)}")
    return F.normalize(F.normalize(texts_CTE, dim=-1).mean(1), dim=-1)


def class_scores(images_NE: Tensor, classes_CE: Tensor) -> Tensor:
    """Cosines ``(N, C)`` of pictures and classes."""
    return F.normalize(images_NE, dim=-1) @ classes_CE.T


def classification(scores_NC: Tensor, labels_N: Tensor, names: Sequence[str]) -> Classification:
    """Accuracies of ``scores`` against ``labels`` (int64). A tie with the right class counts against it.

    Classes without pictures are left out of the mean recall.
    """
    count, classes = scores_NC.shape
    if len(names) != classes or len(labels_N) != count:
        raise ValueError(f"{count} x {classes} scores, {len(labels_N)} labels and {len(names)} names of classes")
    if not count:
        raise ValueError("there are no pictures")
    if scores_NC.isnan().any():
        raise ValueError(f"picture {int(scores_NC.isnan().nonzero()[0, 0])} has a score that is not a number")
    if not 0 <= int(labels_N.min()) <= int(labels_N.max()) < classes:
        raise ValueError(f"labels reach from {int(labels_N.min())} to {int(labels_N.max())}: {classes} classes")
    own = torch.zeros_like(scores_NC, dtype=torch.bool).scatter_(1, labels_N[:, None], True)
    right = scores_NC[own][:, None]
    equal = (scores_NC == right) & ~own
    rank = (scores_NC > right).sum(1) + equal.sum(1)
    others = scores_NC.masked_fill(own, -torch.inf).argmax(1)
    made = []
    for number, name in enumerate(names):
        members = labels_N == number
        hits = int((rank[members] == 0).sum())
        wrong = others[members & (rank > 0)]
        most = int(wrong.mode().values) if len(wrong) else -1
        total = int(members.sum())
        taken = int((wrong == most).sum())
        made.append(
            ClassScores(name, total, 100.0 * hits / total if total else 0.0, names[most] if taken else "", taken)
        )
    present = [one.recall for one in made if one.pictures]
    return Classification(
        top1=100.0 * float((rank == 0).double().mean()),
        top5=100.0 * float((rank < min(5, classes)).double().mean()),
        mean_recall=sum(present) / len(present),
        ties=100.0 * float(equal.any(1).double().mean()),
        classes=tuple(made),
    )
