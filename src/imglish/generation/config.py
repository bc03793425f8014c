"""How tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationConfig:
    """Greedy by default; ``beams`` for beam search, ``sample`` for sampling.

    n: texts a picture (the best n of the beams, or n samples); min_length, max_length: tokens of a whole sequence,
    opening token, prompt and closing token included, as in transformers; temperature, top_k (0: all), top_p: which
    tokens are drawn, in this order; repetition_penalty: logits of tokens that occur already, prompt included, are
    divided by it (multiplied where negative; Keskar et al. 2019); no_repeat_ngram: no n-gram of this length twice (0:
    allowed); length_penalty: beams are ordered by their log-probability / length ** length_penalty; seed: sampling
    depends on this, on the key of the picture and on the number of the sample, and on nothing else.
    """

    beams: int = 1
    sample: bool = False
    n: int = 1
    min_length: int = 0
    max_length: int = 30
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    length_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("beams", 1), ("n", 1), ("min_length", 0), ("top_k", 0), ("no_repeat_ngram", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it has to be at least {least}")
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it has to be above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: the share of probability to draw from lies above 0, up to 1")
        if self.max_length < max(2, self.min_length):
            raise ValueError(f"max_length is {self.max_length}: it has to be at least 2 and min_length")
        if self.sample and self.beams > 1:
            raise ValueError("either sample, or search with beams")
        if not self.sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError("temperature, top_k and top_p are for sampling: set sample")
        if not self.sample and self.n > self.beams:
            raise ValueError(f"{self.n} texts a picture need sampling or at least {self.n} beams")


CAPTIONS = GenerationConfig(beams=3, min_length=5)
"""The usual setting for captions: three beams, at least four tokens before the end."""


@dataclass(frozen=True)
class Written:
    """One text. ids: its tokens after the prompt, without the closing token; ended: whether it closed by itself or was
    cut at ``max_length``; score: log-probability / length ** length_penalty for beams, else the mean log-probability
    of its tokens (closing token included) under the model as it is, whatever was filtered."""

    ids: tuple[int, ...]
    ended: bool
    score: float
