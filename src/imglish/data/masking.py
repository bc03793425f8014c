"""Masking for masked language modelling (BERT, section 3.1), with an option for whole words (ViLT, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imglish.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class MaskConfig:
    """probability: of each token, or with ``whole_word`` of each word with all its pieces, to be predicted; end: also
    the closing token may be (BEiT-3's captioning, which learns from it where a caption ends)."""

    probability: float = 0.15
    whole_word: bool = False
    end: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"a masking probability of {self.probability}")


def mask_tokens(
    ids: Sequence[int],
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    probability: float = 0.15,
    whole_word: bool = False,
    end: bool = False,
) -> tuple[list[int], list[int], list[int]]:
    """Choose tokens to be predicted: (ids with the masks, positions of the chosen, their original tokens).

    Each text token is chosen independently with ``probability``; special tokens ([CLS], [SEP], [PAD] ...) never are,
    except with ``end`` a closing token in the last place.
    Of the chosen 80 % become [MASK], 10 % a random text token, 10 % stay. With ``whole_word`` the choice and the
    80/10/10 fall for a word at a time, so that no piece betrays another. It may happen that nothing is chosen: then
    the ids stay and both lists are empty.
    """
    given = np.asarray(ids, dtype=np.int64)
    words = np.arange(len(given))
    if whole_word:
        words = np.cumsum(tokenizer.word_starts(ids)) if len(given) else words
        words = words - words[:1]
    open_to_choice = ~tokenizer.is_special[given]
    if end and len(given) and given[-1] == tokenizer.eos_id:
        open_to_choice[-1] = True
    chosen = (rng.random(len(given)) < probability)[words] & open_to_choice
    fate = rng.random(len(given))[words]
    random_ids = rng.choice(tokenizer.ordinary_ids, size=len(given))
    masked = np.where(fate < 0.8, tokenizer.mask_id, np.where(fate < 0.9, random_ids, given))
    positions = np.flatnonzero(chosen)
    result = np.where(chosen, masked, given)
    return result.tolist(), positions.tolist(), given[positions].tolist()
