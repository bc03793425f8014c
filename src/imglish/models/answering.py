"""Answers written by a decoder that looks at the states of a question (ALBEF, section 5; BLIP, section 5.3).

question + picture -> the model's fused states (L, D) -> keys and values of every decoder layer, once a question
                                                      -> [start] word word [end]: generated, or ranked among candidates
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import TextBatch
from imglish.data.tasks.batch import Answers
from imglish.models.aligned import AlignedConfig, look
from imglish.models.capabilities import ImageMemory
from imglish.models.captioning import CaptionState
from imglish.nn.blocks import Block, BlockConfig
from imglish.nn.embed import BertEmbedding, MlmHead
from imglish.nn.segments import Ragged, Segments, upload_index
from imglish.objectives.lm import lm_rows

ROWS = 1024  # whose logits over the vocabulary exist at a time


@dataclass(frozen=True)
class RankRule:
    """How candidates are ranked. shortlist: only so many candidates, those whose first word is most probable, are
    scored to their end (published: 128; 0: all); smoothing: rank by the label-smoothed loss (BLIP's code: 0.1);
    first_twice: the first word counts twice (ALBEF's code). By default the score is the log-probability of the answer.
    """

    shortlist: int = 128
    smoothing: float = 0.0
    first_twice: bool = False

    def __post_init__(self) -> None:
        if self.shortlist < 0 or not 0 <= self.smoothing < 1:
            raise ValueError(f"shortlist {self.shortlist}, smoothing {self.smoothing}: 0 or more; a share below 1")


BY_PROBABILITY = RankRule()


class AnswerDecoder(nn.Module):
    """A causal text Transformer whose layers all look at the states of the question.

    start: id of the token that opens an answer; types: rows of the table of token types (ALBEF's BERT has two).
    """

    def __init__(self, config: AlignedConfig, depth: int, start: int, types: int) -> None:
        super().__init__()
        self.start = start
        c = config
        self.embedding = BertEmbedding(c.vocab_size, c.max_length, c.width, c.norm_eps, c.dropout, types=types)
        block = BlockConfig(
            width=c.width,
            heads=c.heads,
            hidden=c.hidden,
            norm="post",
            norm_eps=c.norm_eps,
            cross_width=c.width,
            dropout=c.dropout,
        )
        self.layers = nn.ModuleList(block.build() for _ in range(depth))
        self.head = MlmHead(c.width, c.vocab_size, c.norm_eps)

    def begin_as(self, embedding: nn.Module, layers: Sequence[nn.Module], head: nn.Module) -> None:
        """Start with the weights of a pre-trained text Transformer; of a cross-attention to pictures of another width
        the keys and values stay new."""
        self.embedding.load_state_dict(embedding.state_dict())
        self.head.load_state_dict(head.state_dict())
        for mine, theirs in zip(self.layers, layers, strict=True):
            held, given = mine.state_dict(), copy.deepcopy(theirs).state_dict()
            fitting = {name: value for name, value in given.items() if value.shape == held[name].shape}
            mine.load_state_dict({**held, **fitting})

    def project(self, questions: Ragged) -> ImageMemory:
        """Keys and values of the question states for every layer."""
        crosses = [cast(Block, layer).cross for layer in self.layers]
        made = tuple(cross.project(questions.rows) for cross in crosses if cross is not None)
        return ImageMemory(made, questions.segments)

    def logits(self, states: Tensor) -> Tensor:
        """Logits ``(M, V)`` of the token after each of ``states (M, D)``."""
        found: Tensor = self.head(states, self.embedding.words.weight)
        return found

    # ---- training -------------------------------------------------------------------------------------------------

    def written(self, questions: Ragged, answers: Answers) -> tuple[Tensor, Tensor, np.ndarray]:
        """Logits ``(M, V)`` and targets ``(M,)`` of every token of the ``answers`` behind the first one, which is
        :attr:`start`; and the number of the answer that each belongs to (host)."""
        texts, device = answers.texts, questions.rows.device
        given, targets = lm_rows(texts.segments)
        shorter = Segments.of(n - 1 for n in texts.segments.lengths)
        rows = self.embedding(TextBatch(texts.ids[upload_index(given, device)], shorter))
        counts = Segments.of(answers.counts)
        states = look(self.layers, rows, shorter, self.project(questions), counts, causal=True)
        return (
            self.logits(states),
            texts.ids[upload_index(targets, device)],
            np.repeat(np.arange(len(texts)), shorter.lengths),
        )

    # ---- writing and ranking --------------------------------------------------------------------------------------

    def begin(self, questions: Ragged, room: int) -> CaptionState:
        """One empty answer to each question."""
        return CaptionState.begin(self.project(questions), len(self.layers), room)

    def extend(self, state: CaptionState, texts: TextBatch) -> Tensor:
        """Append ``texts`` to the answers; states ``(N, D)`` of the last tokens."""
        step = state.cache.extend(texts.segments, state.device)
        rows = self.embedding(texts, step.positions)
        for layer, memory, cache in zip(self.layers, state.memories(), step.layers, strict=True):
            rows = layer(rows, texts.segments, memory, cache=cache)
        ends: Tensor = rows[texts.segments.ends(rows.device)]
        return ends

    @torch.no_grad()
    def rank(
        self, questions: Ragged, candidates: Sequence[Sequence[int]], rule: RankRule = BY_PROBABILITY, keep: int = 5
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best ``keep`` candidates of each of Q questions: numbers and scores, ``(Q, keep)``, best first.

        candidates: token ids without the start, with the closing token. Beginnings that candidates share are computed
        once a question, and so are the question's keys and values; logits exist for the tokens that are asked for.
        """
        count, device = len(questions), questions.rows.device
        if not candidates or not all(candidates):
            raise ValueError("candidates are needed, each with a token at least")
        state = self.begin(questions, max(map(len, candidates)) + 1)
        states = self.extend(state, TextBatch.of([[self.start]] * count).to(device))
        logits = self.logits(states).float()
        firsts = upload_index(np.array([candidate[0] for candidate in candidates]), device)
        normal = logits.logsumexp(1, keepdim=True)
        plain = logits[:, firsts] - normal  # (Q, N)
        chosen = plain.argsort(dim=1, descending=True, stable=True)[:, : rule.shortlist or len(candidates)]
        likely = plain.gather(1, chosen).double().cpu().numpy()
        even = (logits.mean(1, keepdim=True) - normal).double().cpu().numpy()
        scores = (1 - rule.smoothing) * likely + rule.smoothing * even
        if rule.first_twice:
            scores = scores + likely
        numbers = chosen.cpu().numpy()
        self._follow(state, candidates, numbers, scores, rule.smoothing)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
        return np.take_along_axis(numbers, order, 1), np.take_along_axis(scores, order, 1)

    def _follow(
        self,
        state: CaptionState,
        candidates: Sequence[Sequence[int]],
        numbers: np.ndarray,
        scores: np.ndarray,
        smoothing: float,
    ) -> None:
        """Add to ``scores (Q, k)`` what the tokens after the first one give, level by level of the tree of beginnings
        that the chosen candidates of a question make."""
        above: dict[tuple[int, ...], int] = {(question,): question for question in range(len(numbers))}
        depth = 1
        while True:
            open_ones = [
                (question, place, candidates[number])
                for question, row in enumerate(numbers)
                for place, number in enumerate(row)
                if len(candidates[number]) > depth
            ]
            if not open_ones:
                return
            nodes = sorted({(question, *tokens[:depth]) for question, _, tokens in open_ones})
            state.select([above[node[:-1]] for node in nodes])
            states = self.extend(state, TextBatch.of([[node[-1]] for node in nodes]).to(state.device))
            above = {node: number for number, node in enumerate(nodes)}
            rows = np.array([above[(question, *tokens[:depth])] for question, _, tokens in open_ones])
            wanted = np.array([tokens[depth] for _, _, tokens in open_ones])
            found = self._scores(states, rows, wanted, smoothing)
            np.add.at(scores, (np.array([q for q, _, _ in open_ones]), np.array([p for _, p, _ in open_ones])), found)
            depth += 1

    def _scores(self, states: Tensor, rows: np.ndarray, wanted: np.ndarray, smoothing: float) -> np.ndarray:
        """Log-probability of token ``wanted[i]`` after state ``rows[i]``, perhaps smoothed; float64 ``(M,)``."""
        order = np.argsort(rows, kind="stable")
        found = np.empty(len(rows))
        for low in range(0, len(states), ROWS):
            block = self.logits(states[low : low + ROWS]).float()
            mine = order[np.searchsorted(rows[order], low) : np.searchsorted(rows[order], low + len(block))]
            at = upload_index(rows[mine] - low, states.device)
            normal = block.logsumexp(1)
            value = (1 - smoothing) * (block[at, upload_index(wanted[mine], states.device)] - normal[at])
            if smoothing:
                value = value + smoothing * (block.mean(1) - normal)[at]
            found[mine] = value.double().cpu().numpy()
        return found


def answer_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Loss of each token ``(M,)``, label-smoothed as BLIP trains (0.1)."""
    return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)


def distilled_tokens(logits: Tensor, theirs: Tensor) -> Tensor:
    """Soft cross-entropy of each token ``(M,)`` with what the momentum copy says (ALBEF, equation 7)."""
    return -(F.log_softmax(logits.float(), dim=1) * torch.softmax(theirs.float(), dim=1)).sum(1)


def summed(values: Tensor, owner: np.ndarray, answers: int) -> Tensor:
    """Sums ``(A,)`` of the ``values (M,)`` of each answer's tokens."""
    index = upload_index(owner, values.device)
    return torch.zeros(answers, device=values.device, dtype=values.dtype).index_add(0, index, values)
