"""What a model that writes captions keeps between two tokens: see :class:`imglish.models.capabilities.Captions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from imglish.models.capabilities import ImageMemory
from imglish.nn.attention import Memory
from imglish.nn.cache import SequenceCache
from imglish.nn.segments import Segments, upload_index

KEPT = 0.75  # pictures without sequences stay in the memory until fewer than this share are alive


@dataclass(frozen=True)
class CaptionForm:
    """How the captions of a model are laid out as tokens.

    start: the id that opens a caption where the model has one of its own (BLIP's [DEC]), None: the tokenizer's opening
    token; prompt: the text that its captions begin with as trained ("a picture of "), not part of what is returned;
    longest: tokens that a sequence may have with opening token and prompt (how many positions there are). A caption
    ends with the tokenizer's closing token ([SEP], ``<|endoftext|>``).
    """

    start: int | None = None
    prompt: str = ""
    longest: int = 512


@dataclass
class CaptionState:
    """N unfinished sequences about B pictures.

    memory: what the layers keep of the pictures, projected once; texts: how many consecutive sequences look at each
    picture (beams, samples); cache: self-attention keys and values of the sequences.
    """

    memory: ImageMemory
    texts: Segments
    cache: SequenceCache

    @staticmethod
    def begin(memory: ImageMemory, layers: int, room: int) -> CaptionState:
        """One empty sequence a picture; layers: how many self-attention layers the decoder has."""
        pictures = memory.segments.count
        return CaptionState(memory, Segments.equal(pictures, 1), SequenceCache(layers, pictures, room))

    @property
    def device(self) -> torch.device:
        return self.memory.layers[0][0].device

    def memories(self) -> tuple[Memory, ...]:
        """What each cross-attention layer is given: all sequences of a picture look at the same keys and values."""
        seen = []
        for keys, values in self.memory.layers:
            seen.append(Memory(keys, values, self.memory.segments, self.texts))
        return tuple(seen)

    def select(self, order: Sequence[int]) -> None:
        """Sequence i becomes what sequence ``order[i]`` was: beams are reordered and multiplied, finished ones dropped.

        Sequences of a picture stay beside each other and pictures in their order (``ValueError`` otherwise). Keys and
        values of pictures are not copied for that, except now and then to let go of those that are finished.
        """
        owner = np.repeat(np.arange(self.texts.count), self.texts.lengths)[np.asarray(order, dtype=np.int64)]
        if (np.diff(owner) < 0).any():
            raise ValueError("sequences have to keep the order of their pictures")
        counts = np.bincount(owner, minlength=self.texts.count)
        alive = np.flatnonzero(counts)
        if 0 < len(alive) < KEPT * len(counts):
            rows = upload_index(self.memory.segments.rows_of(alive), self.device)
            layers = tuple(tuple(part[rows] for part in layer) for layer in self.memory.layers)
            self.memory = ImageMemory(layers, self.memory.segments.select(alive))
            counts = counts[alive]
        self.texts = Segments.of(counts)
        self.cache.select(order, self.device)
