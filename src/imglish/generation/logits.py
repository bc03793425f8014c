"""What is done to the logits of the next token before one is chosen. All functions take ``(N, V)`` and say what of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from imglish.generation.config import GenerationConfig
from imglish.nn.segments import upload_index


def constrain(scores: Tensor, texts: Sequence[Sequence[int]], end: int, config: GenerationConfig) -> Tensor:
    """Penalise repetition, forbid repeated n-grams and ends before ``min_length``.

    scores: logits or log-probabilities ``(N, V)`` after the N ``texts`` (whole sequences); may be changed in place.
    """
    if config.repetition_penalty != 1:
        scores = penalise_repetition(scores, texts, config.repetition_penalty)
    if config.no_repeat_ngram:
        rows, tokens = _repeats(texts, config.no_repeat_ngram)
        scores[upload_index(rows, scores.device), upload_index(tokens, scores.device)] = -torch.inf
    short = np.array([i for i, text in enumerate(texts) if len(text) < config.min_length], dtype=np.int64)
    if len(short):
        scores[upload_index(short, scores.device), end] = -torch.inf
    return scores


def penalise_repetition(scores: Tensor, texts: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Divide the scores of the tokens of each text by ``penalty``, or multiply negative ones."""
    longest = max(len(text) for text in texts)
    filled = [[*text, *[text[0]] * (longest - len(text))] for text in texts]  # a text's own token fills it up
    seen = upload_index(np.array(filled, dtype=np.int64), scores.device)
    found = scores.gather(1, seen)
    return scores.scatter(1, seen, torch.where(found < 0, found * penalty, found / penalty))


def _repeats(texts: Sequence[Sequence[int]], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and tokens that would complete an n-gram which the text has already."""
    rows, tokens = [], []
    for row, text in enumerate(texts):
        tail = tuple(text[len(text) - n + 1 :])
        for start in range(len(text) - n + 1):
            if tuple(text[start : start + n - 1]) == tail:
                rows.append(row)
                tokens.append(text[start + n - 1])
    return np.array(rows, dtype=np.int64), np.array(tokens, dtype=np.int64)


def narrow(logits: Tensor, config: GenerationConfig) -> Tensor:
    """Temperature, then only the ``top_k`` best tokens, then the fewest whose probability reaches ``top_p``."""
    if config.temperature != 1:
        logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[1]:
        least = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.top_p < 1:
        descending, order = logits.sort(dim=1, descending=True)
        probability = descending.softmax(1)
        before = probability.cumsum(1) - probability  # what the better tokens hold together
        beyond = before >= config.top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return logits


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens ``(N,)`` by the inverse cumulative distribution over the vocabulary; uniforms: ``(N,)`` in [0, 1)."""
    reached = logits.double().softmax(1).cumsum(1)
    aim = uniforms.to(reached.dtype)[:, None] * reached[:, -1:]
    chosen = (reached <= aim).sum(1).clamp(max=logits.shape[1] - 1)
    possible = logits.gather(1, chosen[:, None])[:, 0] > -torch.inf
    return torch.where(possible, chosen, logits.argmax(1))  # rounding must not lead to an impossible token
