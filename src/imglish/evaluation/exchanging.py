"""The control of a task: every text with pictures that belong to another one. What is still right, texts alone give."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

Shown = TypeVar("Shown", bound=Hashable)

EXCHANGED = "control: every text has the pictures of another one, so what is right here needs no pictures"


def exchanged(pictures: Sequence[Shown]) -> list[Shown]:
    """For each text what another one shows; texts that showed the same still do.

    What is shown, each once and in order of appearance, is shifted by half of the number: no text keeps its own, what
    stands side by side in a file (and is often alike) comes from far away, and nothing is drawn by chance. Raises
    ``ValueError`` where all texts show the same.
    """
    kinds = list(dict.fromkeys(pictures))
    if len(kinds) < 2:
        raise ValueError("pictures cannot be exchanged: all texts show the same")
    half = len(kinds) // 2
    other = dict(zip(kinds, kinds[half:] + kinds[:half]))
    return [other[shown] for shown in pictures]
