"""One token at a time, the best or a drawn one; sequences that end leave the rows that are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from imglish.data.batch import TextBatch
from imglish.generation.config import GenerationConfig, Written
from imglish.generation.logits import constrain, draw, narrow
from imglish.models.capabilities import Captions
from imglish.models.captioning import CaptionState

Uniforms = Callable[[int, int], np.ndarray]
"""(picture, sample) -> uniform numbers in [0, 1), one a token, at least as many as a text can get."""


@dataclass
class _Growing:
    """A text that is being written: ids with the prompt; gains: log-probability of each token after it."""

    picture: int
    ids: list[int]
    prompt: int
    uniforms: np.ndarray | None
    gains: list[float] = field(default_factory=list)
    ended: bool = False

    def written(self) -> Written:
        return Written(tuple(self.ids[self.prompt :]), self.ended, float(np.mean(self.gains)))


def write(
    model: Captions,
    state: CaptionState,
    logits: Tensor,
    prompts: Sequence[Sequence[int]],
    end: int,
    config: GenerationConfig,
    uniforms: Uniforms,
) -> list[list[Written]]:
    """``config.n`` texts for each picture, in the order of their samples.

    state: has read ``prompts``, one a picture; logits: ``(B, V)`` after them.
    """
    everyone = [
        _Growing(picture, list(prompt), len(prompt), uniforms(picture, number) if config.sample else None)
        for picture, prompt in enumerate(prompts)
        for number in range(config.n)
    ]
    state.select([text.picture for text in everyone])
    logits, live = logits.repeat_interleave(config.n, 0), everyone
    while live:
        for text, token, gain in zip(live, *_choose(logits.float(), live, end, config), strict=True):
            text.gains.append(gain)
            text.ended = token == end
            if not text.ended:
                text.ids.append(token)
        going = [i for i, text in enumerate(live) if not text.ended and len(text.ids) < config.max_length]
        live = [live[i] for i in going]
        if live:
            state.select(going)
            last = TextBatch.of([[text.ids[-1]] for text in live])
            logits = model.continue_captions(state, last.to(state.device))
    found: list[list[Written]] = [[] for _ in prompts]
    for text in everyone:
        found[text.picture].append(text.written())
    return found


def _choose(
    logits: Tensor, live: Sequence[_Growing], end: int, config: GenerationConfig
) -> tuple[list[int], list[float]]:
    """The next token of each text, and its log-probability under the model as it is."""
    whole = logits.logsumexp(1)
    texts = [text.ids for text in live]
    scores = constrain(logits.clone(), texts, end, config)
    if config.sample:
        numbers = [text.uniforms[len(text.gains)] for text in live if text.uniforms is not None]
        tokens = draw(narrow(scores, config), torch.tensor(numbers, dtype=torch.float64).to(logits.device))
    else:
        tokens = scores.argmax(1)
    gains = logits.gather(1, tokens[:, None])[:, 0] - whole
    both = torch.stack([tokens.double(), gains.double()]).tolist()  # one wait for the device
    return [int(token) for token in both[0]], both[1]
