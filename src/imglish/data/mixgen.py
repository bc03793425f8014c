"""MixGen (Hao et al. 2022): new pairs of which the picture is a blend of two and the text says both.

Every ``every``-th pair of a batch becomes a mixture with the pair that follows it, which stays as it is. The texts are
joined where samples become a batch; the pictures are blended on the device (:meth:`imglish.data.batch.Batch.blended`).
Which pairs these are depends on their place in the batch alone, so as long as ``every`` divides what each process has
of a batch, the mixtures are the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from imglish.data.dataset import Sample
from imglish.data.tokenizers import Tokenizer

Masked = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True)
class MixGen:
    """opening, closing: how many tokens stand before and behind every text; max_length: tokens of a joined text."""

    every: int
    max_length: int
    opening: int
    closing: int

    def __post_init__(self) -> None:
        if self.every < 2:
            raise ValueError(f"every {self.every}th pair cannot be a mixture with the next one: 2 is the least")

    @staticmethod
    def of(every: int, tokenizer: Tokenizer, prompt: str = "") -> MixGen:
        """For the texts that ``tokenizer`` makes of captions behind ``prompt``, which a joined text has once."""
        closing = int(tokenizer.append_sep)
        return MixGen(every, tokenizer.max_length, len(tokenizer.encode([prompt])[0]) - closing, closing)

    def join(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with every ``every``-th text joined with the next one. The image id of a mixture is negative:
        it is neither of its two pictures, and captions of those alone are no positives of it."""
        joined = list(samples)
        for place in range(0, len(samples) - 1, self.every):
            one, two = samples[place], samples[place + 1]
            masked = None
            if one.masked is not None and two.masked is not None:
                masked = self._masked(one.masked, two.masked)
            joined[place] = replace(
                one,
                key=f"{one.key} + {two.key}",
                ids=self._ids(one.ids, two.ids),
                image_id=-2 - one.image_id,
                masked=masked,
                swapped=self._ids(one.swapped, two.ids) if one.swapped is not None else None,
            )
        return joined

    def _ids(self, one: list[int], two: list[int]) -> list[int]:
        body = len(one) - self.closing
        end = one[body:]
        return (one[:body] + two[self.opening : len(two) - self.closing])[: self.max_length - len(end)] + end

    def _masked(self, one: Masked, two: Masked) -> Masked:
        ids = self._ids(one[0], two[0])
        shift = len(one[0]) - self.closing - self.opening
        places = [*zip(one[1], one[2]), *((position + shift, label) for position, label in zip(two[1], two[2]))]
        kept = [(position, label) for position, label in places if position < len(ids) - self.closing]
        return ids, [position for position, _ in kept], [label for _, label in kept]
