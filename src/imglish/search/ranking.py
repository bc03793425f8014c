"""The fusion tower's order of some pictures, and what is remembered from one search to the next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from imglish.models.capabilities import EncodedTexts
from imglish.nn.segments import Ragged, Segments
from imglish.search.calibration import margins
from imglish.search.manifest import Calibration

T = TypeVar("T")


@dataclass(frozen=True)
class Ranking:
    """order: keys, best first; seen: of each its match and the probability of the negative words; notes: what could not
    be looked at."""

    order: tuple[str, ...] = ()
    seen: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def match(self, key: str) -> float:
        """What ``min_match`` cuts on; below all for a picture that was not looked at."""
        return self.seen.get(key, (-1.0, None))[0]


def rank_pictures(
    network: Any,
    tokens: Tensor | Ragged,
    keys: Sequence[str],
    texts: Sequence[EncodedTexts],
    calibration: Calibration | None,
) -> Ranking:
    """Order the pictures ``keys``, whose image tokens are ``tokens``, by their match.

    texts: the words, and those that the pictures should not show. The match is the probability of the words, with
    negative words P(words) (1 - P(not words)). It is ordered by before it is rounded, so whatever rule the checkpoint's
    authors evaluate by, what stands higher never shows a smaller match. Each picture's keys and values are projected
    once for all texts.
    """
    count, n = len(keys), len(texts)
    memory = network.project_images(tokens)
    pictures = [i for i in range(count) for _ in range(n)]
    logits = network.match(memory, joined(texts), pictures, list(range(n)) * count)
    margin = margins(logits.float().cpu().view(count, n, 2), calibration)
    score = F.logsigmoid(margin[:, 0])
    if n == 2:
        score = score + F.logsigmoid(-margin[:, 1])
    order = score.argsort(descending=True, stable=True).tolist()
    excluded = margin[:, 1].sigmoid().tolist() if n == 2 else [None] * count
    seen = {key: (match, other) for key, match, other in zip(keys, score.exp().tolist(), excluded)}
    return Ranking(tuple(keys[i] for i in order), seen)


def joined(texts: Sequence[EncodedTexts]) -> EncodedTexts:
    """Texts that were encoded one by one as one batch."""
    rows = [text.rows for text in texts if text.rows is not None]
    lengths = tuple(length for text in texts for length in text.segments.lengths)
    return EncodedTexts(torch.cat([text.features for text in texts]), Segments(lengths), torch.cat(rows))


def parted(texts: EncodedTexts) -> list[EncodedTexts]:
    """Each text by itself."""
    lengths = texts.segments.lengths
    rows = texts.rows.split(list(lengths)) if texts.rows is not None else [None] * len(lengths)
    return [
        EncodedTexts(texts.features[i : i + 1], Segments((length,)), part)
        for i, (length, part) in enumerate(zip(lengths, rows))
    ]


class Recent(Generic[T]):
    """The last ``most`` values by name."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._held: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, name: Hashable) -> T | None:
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
            return self._held.get(name)

    def put(self, name: Hashable, value: T) -> None:
        with self._lock:
            self._held[name] = value
            while len(self._held) > self._most:
                self._held.popitem(last=False)
