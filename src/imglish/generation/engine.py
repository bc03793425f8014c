"""Texts about pictures: prompts in, texts out, each picture on its own terms whatever its batch is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import numpy as np
import torch

from imglish.data.batch import TextBatch
from imglish.generation.beam import CURRENT, BeamRule, search
from imglish.generation.config import GenerationConfig, Written
from imglish.generation.sampling import Uniforms, write
from imglish.models.capabilities import Captions, EncodedImages


class Vocabulary(Protocol):
    """What generation asks of a tokenizer."""

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Caption:
    """text: what follows the prompt; score: see :class:`Written`; ended: it closed by itself."""

    text: str
    score: float
    ended: bool


def caption(
    model: Captions,
    tokenizer: Vocabulary,
    images: EncodedImages,
    config: GenerationConfig,
    keys: Sequence[str],
    prompt: str | None = None,
) -> list[list[Caption]]:
    """``config.n`` captions for each of the B pictures, best first (samples: in their order).

    keys: names of the pictures, on which sampling depends; prompt: text that the captions begin with, not part of what
    is returned (None: the one that the model was trained with).
    """
    ids = prompt_ids(model, tokenizer, prompt)
    found = generate(model, images, [ids] * len(keys), tokenizer.eos_id, config, keys)
    return [[Caption(tokenizer.decode(w.ids), w.score, w.ended) for w in texts] for texts in found]


def prompt_ids(model: Captions, tokenizer: Vocabulary, prompt: str | None = None) -> list[int]:
    """Opening token and prompt as the model wants them."""
    form = model.caption_form()
    words = tokenizer.encode([form.prompt if prompt is None else prompt])[0]
    if words and words[0] == tokenizer.bos_id:
        words = words[1:]
    if words and words[-1] == tokenizer.eos_id:
        words = words[:-1]
    return [tokenizer.bos_id if form.start is None else form.start, *words]


@torch.no_grad()
def generate(
    model: Captions,
    images: EncodedImages,
    prompts: Sequence[Sequence[int]],
    end: int,
    config: GenerationConfig,
    keys: Sequence[str],
    rule: BeamRule = CURRENT,
    uniforms: Uniforms | None = None,
) -> list[list[Written]]:
    """Texts of token ids for each of the B pictures, the model in ``eval()`` mode.

    prompts: a sequence for each picture that its texts begin with, opening token included; end: the closing token;
    rule: of beam search; uniforms: the random numbers of sampling (default: from ``config.seed`` and ``keys``).
    Raises ``ValueError`` where prompts or ``max_length`` do not fit the model.
    """
    longest, most = model.caption_form().longest, max(map(len, prompts), default=1)
    if config.max_length > longest:
        raise ValueError(f"max_length is {config.max_length}, the model takes {longest} tokens")
    if min(map(len, prompts), default=1) < 1 or most >= config.max_length:
        raise ValueError(f"prompts have 1 to max_length - 1 = {config.max_length - 1} tokens; found one of {most}")
    if len(prompts) != len(keys):
        raise ValueError(f"{len(prompts)} prompts, {len(keys)} keys")
    if not keys:
        return []
    state = model.start_captions(images, config.max_length)
    logits = model.continue_captions(state, TextBatch.of(prompts).to(state.device))
    if config.beams > 1:
        return search(model, state, logits, prompts, end, config, rule)
    if uniforms is None:

        def uniforms(picture: int, number: int) -> np.ndarray:
            return random_numbers(config.seed, keys[picture], number, config.max_length)

    return write(model, state, logits, prompts, end, config, uniforms)


def random_numbers(seed: int, key: str, number: int, count: int) -> np.ndarray:
    """``count`` uniform numbers for sample ``number`` of the picture called ``key``."""
    name = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")
    stream = np.random.Philox(key=np.array([seed % 2**64, name], dtype=np.uint64), counter=[0, 0, number, 0])
    return np.random.Generator(stream).random(count)
