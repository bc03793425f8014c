"""The match probability: Platt's scaling of the fusion tower's logits on pairs that the model was not trained on.

What is fitted is what a search shows: for each caption the first pictures of the towers, of which its own is right and
the others are not. So 0.7 means that of such candidates 7 of 10 are right, for the kind of data that it was fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from imglish.data.images import ImageError
from imglish.data.pictures import Picture
from imglish.data.records import Record
from imglish.evaluation.encoding import DEFAULT_MACHINE, Machine, encode_captions, encode_pictures, picture_loader
from imglish.evaluation.rerank import PairList, match_pairs, nearest
from imglish.evaluation.retrieval import merge_pictures
from imglish.models.capabilities import Matches, has_towers, require
from imglish.search.manifest import Calibration

if TYPE_CHECKING:
    from imglish.api import Model

CANDIDATES = 20  # of each caption that take part
BINS = 10
LEAST = 20  # captions


def margins(logits: Tensor, calibration: Calibration | None) -> Tensor:
    """Log-odds ``(...)`` float64 of a match, calibrated where there is a calibration, from ITM logits ``(..., 2)``."""
    margin = (logits[..., 1] - logits[..., 0]).double()
    return margin if calibration is None else calibration.slope * margin + calibration.offset


def calibrate(
    model: Model,
    records: Sequence[Record],
    data: str,
    candidates: int = CANDIDATES,
    machine: Machine = DEFAULT_MACHINE,
    load: Callable[[Record], Picture] | None = None,
) -> Calibration:
    """Fit on held-out ``records`` with captions; data: their name. Half of the captions measure the error.

    Raises ``MissingCapabilityError`` for a model without towers or fusion, ``ValueError`` for too few captions.
    """
    network = model.network
    require(network, Matches, "calibration")
    if not has_towers(network):
        raise ValueError("calibration needs a model with towers, which propose the pairs")
    load = load or picture_loader(model.config.image.transform())
    records = _readable(records, load)
    pictures, captions, owner = merge_pictures(records)
    if len(captions) < LEAST:
        raise ValueError(f"{data}: {len(captions)} captions are too few to calibrate on, at least {LEAST} are needed")
    with machine.store() as store:
        features = encode_pictures(network, pictures, load, machine, store)
        texts = encode_captions(network, captions, model.tokenizer, machine, keep_rows=True)
        near = nearest(texts.features, features, min(candidates, len(pictures)))
        query = torch.arange(len(captions))[:, None].expand_as(near)
        pairs = PairList.named(near.flatten(), query.flatten(), len(captions))
        logits = match_pairs(network, store, texts, pairs, len(pictures), machine)
    margin = (logits[:, 1] - logits[:, 0]).double().numpy()
    right = owner.numpy()[pairs.captions] == pairs.images
    fitting = owner.numpy()[pairs.captions] % 2 == 0  # by picture, so that both halves share none
    slope, offset = fit(margin[fitting], right[fitting])
    rest = margin[~fitting], right[~fitting]
    return Calibration(
        slope,
        offset,
        pairs=len(pairs),
        queries=len(captions),
        data=data,
        error_before=calibration_error(_sigmoid(rest[0]), rest[1]),
        error_after=calibration_error(_sigmoid(slope * rest[0] + offset), rest[1]),
    )


def _readable(records: Sequence[Record], load: Callable[[Record], Picture]) -> list[Record]:
    """Those with captions and a picture that can be read."""
    found = []
    for record in records:
        if not record.captions:
            continue
        try:
            load(record)
        except ImageError:
            continue
        found.append(record)
    return found


def fit(margin: np.ndarray, right: np.ndarray, steps: int = 100) -> tuple[float, float]:
    """Slope and offset of the logistic regression of ``right`` (bool) on ``margin``, by Newton's method, with Platt's
    targets (Platt 1999), so that separable data do not lead to an infinite slope; the slope is at least 0.001."""
    positives, negatives = float(right.sum()), float((~right).sum())
    target = np.where(right, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    centre, spread = float(margin.mean()), float(margin.std()) or 1.0
    x = (margin - centre) / spread
    weights = np.zeros(2)
    for _ in range(steps):
        chance = _sigmoid(weights[0] * x + weights[1])
        gradient = np.array([((chance - target) * x).sum(), (chance - target).sum()])
        curve = chance * (1 - chance)
        second = np.array([[(curve * x * x).sum(), (curve * x).sum()], [(curve * x).sum(), curve.sum()]])
        step = np.linalg.solve(second + 1e-6 * np.eye(2), gradient)
        step *= min(1.0, 2.0 / (float(np.abs(step).max()) or 1.0))
        weights -= step
        if np.abs(step).max() < 1e-10:
            break
    slope = max(float(weights[0]) / spread, 1e-3)
    return slope, float(weights[1]) - slope * centre


def calibration_error(chance: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: mean difference of probability and frequency over equal bins, by their counts."""
    place = np.minimum((chance * bins).astype(int), bins - 1)
    total = 0.0
    for one in range(bins):
        inside = place == one
        if inside.any():
            total += abs(float(chance[inside].mean()) - float(right[inside].mean())) * int(inside.sum())
    return total / max(1, len(chance))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = 0.5 * (1 + np.tanh(x / 2))
    return found
