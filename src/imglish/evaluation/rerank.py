"""Fusion scores of the pairs that the towers propose.

Pairs are grouped by picture, whichever direction asked for them: a picture's keys and values are projected once for all
its captions, and a pair that both directions ask for is scored once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from imglish.evaluation.encoding import Machine, device_of
from imglish.evaluation.sharing import add_up, blocks, from_first, mine
from imglish.evaluation.tokens import TokenStore
from imglish.models.capabilities import EncodedTexts, Matches, require
from imglish.nn.segments import Ragged, upload_index

ScoreRule = Literal["itm", "itm_probability", "itm+itc"]
"""What a pair is ranked by. ``itm``: the logit of "matched" alone, as ALBEF's evaluation does; ``itm_probability``:
the difference of both logits, which orders pairs as their probability does (and never saturates); ``itm+itc``: the
logit plus the towers' cosine, as BLIP's evaluation does although its paper says ITM."""
SCORE_RULES: tuple[ScoreRule, ...] = get_args(ScoreRule)


def pair_scores(logits: Tensor, cosine: Tensor, rule: ScoreRule) -> Tensor:
    """Scores ``(P,)`` float32 from ITM logits ``(P, 2)`` and the cosines ``(P,)`` of the same pairs."""
    logits = logits.float()
    if rule == "itm":
        return logits[:, 1]
    if rule == "itm_probability":
        return logits[:, 1] - logits[:, 0]
    if rule == "itm+itc":
        return logits[:, 1] + cosine.float()
    raise ValueError(f"score rule {rule!r}: choose one of {', '.join(SCORE_RULES)}")


def nearest(queries: Tensor, candidates: Tensor, k: int, chunk: int = 1024) -> Tensor:
    """The k candidates with the largest dot product, best first: int64 ``(Q, k)`` on the host, equal on all ranks."""
    found = [
        (queries[a : a + chunk] @ candidates.T).topk(k, dim=1).indices.cpu() for a in range(0, len(queries), chunk)
    ]
    return from_first(torch.cat(found) if found else torch.zeros(0, k, dtype=torch.int64))


@dataclass(frozen=True)
class PairList:
    """Unique pairs of a picture and a caption by picture: ``codes`` int64 ``(P,)``, picture * texts + text, rise."""

    codes: np.ndarray
    texts: int

    @staticmethod
    def of(i2t: Tensor, t2i: Tensor) -> PairList:
        """The union of what both directions ask for: i2t ``(I, k)`` captions, t2i ``(T, k)`` pictures."""
        texts = t2i.shape[0]
        asked = torch.arange(i2t.shape[0])[:, None] * texts + i2t, t2i * texts + torch.arange(texts)[:, None]
        return PairList(np.unique(torch.cat([a.flatten() for a in asked]).numpy()), texts)

    @staticmethod
    def named(images: Tensor, captions: Tensor, texts: int) -> PairList:
        """The pairs (``images[p]``, ``captions[p]``) of a set of ``texts`` captions."""
        return PairList(np.unique((images * texts + captions).numpy()), texts)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def images(self) -> np.ndarray:
        return self.codes // self.texts

    @property
    def captions(self) -> np.ndarray:
        return self.codes % self.texts

    def find(self, images: Tensor, captions: Tensor) -> Tensor:
        """Places of pairs in this list, int64 of the common shape; every pair has to be in it."""
        wanted = (images * self.texts + captions).cpu().numpy()
        return torch.from_numpy(np.searchsorted(self.codes, wanted))


def match_pairs(
    model: nn.Module, store: TokenStore, texts: EncodedTexts, pairs: PairList, images: int, machine: Machine
) -> Tensor:
    """ITM logits ``(P, 2)`` float32 on the host of all ``pairs``, the same on all ranks.

    ``store`` holds the image tokens of this rank's blocks of the ``images`` pictures: a rank scores the pairs of the
    pictures that it encoded, so tokens never travel.
    """
    require(model, Matches, "reranking")
    assert isinstance(model, Matches)
    parts = blocks(images, machine.image_block)
    bounds = np.searchsorted(pairs.images, [part.start for part in parts] + [images])
    logits = torch.zeros(len(pairs), 2)
    own = mine(len(parts))
    with torch.no_grad(), machine.bar(sum(int(bounds[b + 1] - bounds[b]) for b in own), "pairs", "pair") as bar:
        for block in own:
            low, high = bounds[block], bounds[block + 1]
            if high > low:
                local = pairs.images[low:high] - parts[block].start
                logits[low:high] = _match_block(
                    model, store.get(block), texts, local, pairs.captions[low:high], machine, bar.update
                )
    return add_up(logits)


def _match_block(
    model: Matches,
    tokens: Tensor | Ragged,
    texts: EncodedTexts,
    images: np.ndarray,
    captions: np.ndarray,
    machine: Machine,
    done: Callable[[int], object],
) -> Tensor:
    """Logits ``(P, 2)`` on the host of the pairs (picture of ``tokens``, caption); ``images`` ascends."""
    assert isinstance(model, nn.Module)
    assert texts.rows is not None
    device, dtype = device_of(model), next(model.parameters()).dtype
    places, scored = [], []
    with machine.arithmetic(device):
        for members, place, member in _groups(images, machine.pair_block):
            memory = model.project_images(_chosen(tokens, members, device, dtype))
            for low in range(0, len(place), machine.pair_block):
                some = slice(low, low + machine.pair_block)
                chosen, text_index = np.unique(captions[place[some]], return_inverse=True)
                rows = texts.rows[upload_index(texts.segments.rows_of(chosen), device)].to(dtype)
                part = EncodedTexts(texts.features[upload_index(chosen, device)], texts.segments.select(chosen), rows)
                scored.append(model.match(memory, part, member[some].tolist(), text_index.tolist()).float())
                places.append(place[some])
                done(len(place[some]))
    logits = torch.empty(len(images), 2)
    logits[torch.from_numpy(np.concatenate(places))] = torch.cat(scored).cpu()  # the device is waited for only here
    return logits


def _chosen(tokens: Tensor | Ragged, members: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor | Ragged:
    """The tokens of some pictures on the model's device."""
    if isinstance(tokens, Tensor):
        return tokens[torch.from_numpy(members)].to(device, dtype)
    return tokens.select(members).map(lambda rows: rows.to(device, dtype))


def _groups(images: np.ndarray, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Divide pairs (``images``: their pictures, ascending) into groups of whole pictures with about ``limit`` pairs.

    Pictures with similarly many pairs come together, so their packed queries are of similar length. Yields the
    pictures of a group, the places of its pairs, and for each of these which of the group's pictures it has.
    """
    pictures, first, count = np.unique(images, return_index=True, return_counts=True)
    order = np.argsort(-count, kind="stable")
    start = 0
    while start < len(order):
        inside = np.searchsorted(np.cumsum(count[order[start:]]), limit, side="right")
        group = order[start : start + max(1, int(inside))]
        place = np.concatenate([np.arange(first[g], first[g] + count[g]) for g in group])
        yield pictures[group], place, np.repeat(np.arange(len(group)), count[group])
        start += len(group)


def above_the_rest(rest: Tensor, candidates: Tensor, scores: Tensor) -> Tensor:
    """Scores ``(Q, C)`` in which reranked candidates stand above all others, which keep their tower order.

    rest: cosines ``(Q, C)``; candidates: int64 ``(Q, k)``; scores: ``(Q, k)`` of the candidates. Only the order within
    a row means anything: each candidate gets 2 + its place among the distinct values, exact whatever the range.
    """
    ordered, order = scores.sort(dim=1)
    steps = torch.zeros_like(order)
    steps[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    place = torch.empty_like(steps).scatter_(1, order, steps)
    return rest.scatter(1, candidates.to(rest.device), 2 + place.to(rest.device, rest.dtype))
