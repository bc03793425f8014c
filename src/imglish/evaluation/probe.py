"""The linear probe: how well a linear classifier tells classes from the features of pictures (Radford et al. 2021,
section 3.2). It measures what the pictures' tower holds, whatever texts it was trained with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.pictures import Picture
from imglish.data.records import Record
from imglish.evaluation.classify import class_table, labelled, two_tables
from imglish.evaluation.encoding import DEFAULT_MACHINE, Machine, encode_pictures
from imglish.evaluation.zeroshot import Classification, classification
from imglish.models.capabilities import EncodesImages, require

STRENGTHS = tuple(10.0**power for power in range(-6, 2))
"""Penalties on the squared weights that are tried."""
HELD_OUT = 5  # every so-many-th picture of each class chooses the penalty


@dataclass(frozen=True)
class ProbeResult:
    """found: on the test pictures; majority: percent right by always saying the most frequent training class; strength:
    the penalty that was chosen on a fifth of the training pictures. kept: the numbers of the test pictures whose class
    occurs in training; labels, scores: of each of these, ``(N, C)``."""

    classes: list[str]
    train: int
    test: int
    width: int
    found: Classification
    majority: float
    strength: float
    notes: list[str]
    kept: list[int] = field(repr=False, compare=False)
    labels: Tensor = field(repr=False, compare=False)
    scores: Tensor = field(repr=False, compare=False)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        one = self.found
        cells = [f"{value:.1f}" for value in (one.top1, one.top5, one.mean_recall)]
        rows = [["linear probe", *cells], ["most frequent class", f"{self.majority:.1f}", "–", "–"]]
        return ["classifier", "top-1", f"top-{min(5, len(self.classes))}", "mean recall"], rows

    def class_rows(self) -> tuple[list[str], list[list[str]]]:
        return class_table(self.found)

    def text(self) -> str:
        """Both tables for a terminal."""
        head = f"{self.train} training and {self.test} test pictures, {self.width} features, penalty {self.strength:g}"
        return "\n".join([head, two_tables(self.rows(), self.class_rows(), self.notes)])

    def to_json(self) -> str:
        left_out = ("kept", "labels", "scores")
        held = {name: value for name, value in self.__dict__.items() if name not in left_out}
        return json.dumps({**held, "found": asdict(self.found)}, indent=1, ensure_ascii=False)


def evaluate_probe(
    model: nn.Module,
    train: Sequence[Record],
    test: Sequence[Record],
    load: Callable[[Record], Picture],
    machine: Machine = DEFAULT_MACHINE,
) -> ProbeResult:
    """Fit on the normalised features of ``train``, whose one caption is the class, and measure on ``test``.

    The test pictures choose nothing. Raises ``ValueError`` for records without a class or with several, or a file that
    is in both; ``MissingCapabilityError`` for a model without a tower of pictures.
    """
    require(model, EncodesImages, "a linear probe")
    classes, labels = labelled(train)
    shown = {record.image for record in train if record.image is not None}
    if shared := sorted(record.key for record in test if record.image in shown):
        raise ValueError(f"{len(shared)} test pictures are training pictures too, for example {shared[0]}")
    kept = [number for number, record in enumerate(test) if set(record.captions) <= set(classes)]
    known = [test[number] for number in kept]
    _, wanted = labelled(known, classes)
    training = model.training
    model.eval()
    try:
        features, asked = (encode_pictures(model, part, load, machine).double().cpu() for part in (train, known))
    finally:
        model.train(training)
    if not features.shape[1]:
        raise ValueError(f"{type(model).__name__} gives pictures no features to classify by")
    strength = choose_strength(features, labels, len(classes))
    weight, bias = fit(features, labels, len(classes), strength)
    scores = asked @ weight.T + bias
    notes = []
    if len(known) < len(test):
        notes.append(f"{len(test) - len(known)} test pictures left out: no training picture has their class")
    return ProbeResult(
        classes=classes,
        train=len(train),
        test=len(known),
        width=features.shape[1],
        found=classification(scores, wanted, classes),
        majority=100.0 * float((wanted == labels.bincount().argmax()).double().mean()),
        strength=strength,
        notes=notes,
        kept=kept,
        labels=wanted,
        scores=scores,
    )


def choose_strength(features: Tensor, labels: Tensor, classes: int) -> float:
    """The penalty that is best on every fifth picture of each class, when the others are fitted; the largest of equal
    ones. Classes with fewer than five pictures hold none out."""
    place = torch.zeros_like(labels)
    for number in range(classes):
        members = (labels == number).nonzero().flatten()
        place[members] = torch.arange(len(members))
    held = place % HELD_OUT == HELD_OUT - 1
    if not held.any():
        return 1e-3
    best, chosen = -1.0, STRENGTHS[0]
    for strength in reversed(STRENGTHS):
        weight, bias = fit(features[~held], labels[~held], classes, strength)
        right = float(((features[held] @ weight.T + bias).argmax(1) == labels[held]).double().mean())
        if right > best:
            best, chosen = right, strength
    return chosen


def fit(features: Tensor, labels: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: weights ``(C, E)`` and biases ``(C,)`` that make the mean cross-entropy plus
    ``strength`` times the squared weights smallest (L-BFGS in float64, from zero: the same result every time)."""
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def step() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + strength * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(step)
    return weight.detach(), bias.detach()
