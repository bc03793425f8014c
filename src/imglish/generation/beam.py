"""Beam search as ``transformers`` defines it; the beams of all pictures are computed together.

A step takes the 2k best continuations of a picture's k beams. Closing tokens among the first k make finished
hypotheses, of which the k best are kept; the k best others go on. A picture is done when its worst kept hypothesis is
at least as good as what its best open beam has now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from imglish.data.batch import TextBatch
from imglish.generation.config import GenerationConfig, Written
from imglish.generation.logits import constrain
from imglish.models.capabilities import Captions
from imglish.models.captioning import CaptionState


def log_probabilities(logits: Tensor) -> Tensor:
    """``(N, V)`` -> ``(N, V)``"""
    return logits.log_softmax(1)


def raw(logits: Tensor) -> Tensor:
    """The logits themselves."""
    return logits


@dataclass(frozen=True)
class BeamRule:
    """What differs between implementations.

    prompt_counts: the length that scores are divided by includes opening token and prompt; end_counts: it includes the
    closing token; open_bound: whether a picture is done is judged by its best open beam, else by its best
    continuation, which may have closed just now; score: what of the logits ``(N, V)`` is added up.
    """

    prompt_counts: bool = False
    end_counts: bool = True
    open_bound: bool = True
    score: Callable[[Tensor], Tensor] = log_probabilities


CURRENT = BeamRule()
"""transformers since 4.50."""
PUBLISHED_BLIP = BeamRule(prompt_counts=True, end_counts=False, open_bound=False)
"""transformers 4.15, which BLIP's published code and numbers use."""
PUBLISHED_COCA = BeamRule(prompt_counts=True, open_bound=False, score=raw)
"""open_clip up to 3.3 adds up raw logits, a defect: its scores are no probabilities."""


@dataclass
class _Beam:
    ids: tuple[int, ...]
    score: np.float32


@dataclass
class _Search:
    """The search about one picture. found: finished hypotheses, the best first, as (score, text)."""

    prompt: int
    end: int
    config: GenerationConfig
    rule: BeamRule
    live: list[_Beam]
    found: list[tuple[float, Written]] = field(default_factory=list)

    def advance(self, scores: np.ndarray, tokens: np.ndarray) -> list[int]:
        """Take a step; scores, tokens: the best continuations ``(beams, 2k)`` of every beam, with its own score added.

        Returns the beam that each new beam continues; none where the search is done.
        """
        k, width = self.config.beams, scores.shape[1]
        flat = scores.reshape(-1)
        best = np.argsort(-flat, kind="stable")[: 2 * k]
        best = best[flat[best] > -np.inf]
        length = len(self.live[0].ids) + 1
        beams: list[_Beam] = []
        parents: list[int] = []
        for place, candidate in enumerate(best):
            parent, token, score = int(candidate) // width, int(tokens.reshape(-1)[candidate]), flat[candidate]
            ids = self.live[parent].ids
            if token == self.end:
                if place < k:
                    self._keep(ids, score, length - (not self.rule.end_counts), ended=True)
            elif len(beams) < k:
                beams.append(_Beam((*ids, token), score))
                parents.append(parent)
        self.live = beams
        if length == self.config.max_length:
            for beam in beams:
                self._keep(beam.ids, beam.score, length, ended=False)
            return []
        if beams and len(self.found) == k:
            bound = beams[0].score if self.rule.open_bound else flat[best[0]]
            if self.found[-1][0] >= self._mean(bound, length - (not self.rule.end_counts)):
                return []
        return parents

    def _keep(self, ids: tuple[int, ...], total: np.float32, length: int, ended: bool) -> None:
        score = self._mean(total, length)
        if len(self.found) == self.config.beams and score <= self.found[-1][0]:
            return
        self.found.append((score, Written(ids[self.prompt :], ended, score)))
        self.found = sorted(self.found, key=lambda hypothesis: -hypothesis[0])[: self.config.beams]

    def _mean(self, total: np.float32, length: int) -> float:
        counted = length if self.rule.prompt_counts else length - self.prompt
        return float(total / np.float32(counted**self.config.length_penalty))


def search(
    model: Captions,
    state: CaptionState,
    logits: Tensor,
    prompts: Sequence[Sequence[int]],
    end: int,
    config: GenerationConfig,
    rule: BeamRule = CURRENT,
) -> list[list[Written]]:
    """The ``config.n`` best texts for each picture, best first.

    state: has read ``prompts``, one a picture; logits: ``(B, V)`` after them. All pictures start with one beam, so
    the prompt is computed once a picture.
    """
    searches = [_Search(len(p), end, config, rule, [_Beam(tuple(p), np.float32(0))]) for p in prompts]
    live = searches
    while True:
        beams = [beam for one in live for beam in one.live]
        scores, tokens = _continuations(logits.float(), beams, end, config, rule)
        parents: list[int] = []
        going, row = [], 0
        for one in live:
            rows = slice(row, row + len(one.live))
            chosen = one.advance(scores[rows], tokens[rows])
            if chosen:
                going.append(one)
                parents += [row + parent for parent in chosen]
            row = rows.stop
        if not going:
            break
        live = going
        state.select(parents)
        last = [[beam.ids[-1]] for one in live for beam in one.live]
        logits = model.continue_captions(state, TextBatch.of(last).to(state.device))
    return [[text for _, text in one.found[: config.n]] for one in searches]


def _continuations(
    logits: Tensor, beams: Sequence[_Beam], end: int, config: GenerationConfig, rule: BeamRule
) -> tuple[np.ndarray, np.ndarray]:
    """The 2k best tokens after each beam, with its score added: float32 and int64 ``(beams, 2k)`` on the host."""
    gains = constrain(rule.score(logits), [beam.ids for beam in beams], end, config)
    best = gains.topk(min(2 * config.beams, gains.shape[1]), dim=1)
    both = torch.stack([best.values.double(), best.indices.double()]).cpu().numpy()  # one wait for the device
    before = np.array([beam.score for beam in beams], dtype=np.float32)
    return both[0].astype(np.float32) + before[:, None], both[1].astype(np.int64)
