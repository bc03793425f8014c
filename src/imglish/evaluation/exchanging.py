"""The control of a task: every text with pictures that belong to another one. What is still right, texts alone give."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

Shown = TypeVar("Shown", bound=Hashable)

EXCHANGED = "control: every text has the pictures of another one, so what is right here needs no pictures"


def exchanged(pictures: Sequence[Shown], share: float = 0.5) -> list[Shown]:
    """For each text what another one shows; texts that showed the same still do.

    What is shown, each once and in order of appearance, is shifted by ``share`` of the number, at least by one: no text
    keeps its own, what stands side by side in a file (and is often alike) comes from far away, and nothing is drawn by
    chance. On few texts one exchange says little; several shares say more. Raises ``ValueError`` where all texts show
    the same, and for a share that is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"pictures are exchanged by a share of {share:g} of their number: it must lie between 0 and 1")
    kinds = list(dict.fromkeys(pictures))
    if len(kinds) < 2:
        raise ValueError("pictures cannot be exchanged: all texts show the same")
    shift = max(1, int(share * len(kinds)))
    other = dict(zip(kinds, kinds[shift:] + kinds[:shift]))
    return [other[shown] for shown in pictures]
