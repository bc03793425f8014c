"""What a training step receives: pictures, packed texts and the random choices already made for each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imglish.data.pictures import Pictures
from imglish.nn.segments import Segments


@dataclass(frozen=True)
class TextBatch:
    """N token sequences as packed rows: ``ids`` int64 ``(T,)`` with the lengths in ``segments``."""

    ids: Tensor
    segments: Segments

    @staticmethod
    def of(sequences: Sequence[Sequence[int]]) -> TextBatch:
        """Pack lists of token ids. An empty list of sequences or an empty sequence is allowed."""
        flat = [token for sequence in sequences for token in sequence]
        return TextBatch(torch.tensor(flat, dtype=torch.int64), Segments.of(len(s) for s in sequences))

    def __len__(self) -> int:
        return self.segments.count

    def map(self, move: Callable[[Tensor], Tensor]) -> TextBatch:
        return TextBatch(move(self.ids), self.segments)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TextBatch:
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class MaskedTexts:
    """The texts of a batch with tokens masked for MLM, row for row beside :class:`TextBatch`.

    ids: int64 ``(T,)``; rows: int64 ``(M,)`` row numbers whose token is to be predicted, ascending;
    labels: int64 ``(M,)`` the original tokens; counts: how many of the M lie in each text (host).
    """

    ids: Tensor
    rows: Tensor
    labels: Tensor
    counts: tuple[int, ...]

    def map(self, move: Callable[[Tensor], Tensor]) -> MaskedTexts:
        return replace(self, ids=move(self.ids), rows=move(self.rows), labels=move(self.labels))


@dataclass(frozen=True)
class PatchMasks:
    """Which patches of B pictures are to be predicted: rows int64 ``(M,)``, numbers among the B * ``patches`` patches
    of all pictures, ascending; counts: how many of the M lie in each picture (host)."""

    rows: Tensor
    counts: tuple[int, ...]
    patches: int

    def map(self, move: Callable[[Tensor], Tensor]) -> PatchMasks:
        return PatchMasks(move(self.rows), self.counts, self.patches)


@dataclass(frozen=True)
class Unpaired:
    """Pictures ``(U, 3, H, W)`` and texts that do not belong together, each with its masks (BEiT-3, section 2.2)."""

    images: Tensor
    patches: PatchMasks
    texts: TextBatch
    masked: MaskedTexts

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of pictures and of texts."""
        return self.images.shape[0], len(self.texts)

    def map(self, move: Callable[[Tensor], Tensor]) -> Unpaired:
        return Unpaired(move(self.images), self.patches.map(move), self.texts.map(move), self.masked.map(move))


@dataclass(frozen=True)
class Batch:
    """B pictures, each with its caption or its ``captions`` captions.

    images: ``(B, 3, H, W)`` uint8 in 0..255 (normalised by the model on its device) or floating and normalised, or
    pictures of several sizes, or regions (see :data:`imglish.data.pictures.Pictures`; models that take squares alone
    read ``squares``); texts: B * captions of them, those of a picture one behind the other; image_ids: int64
    ``(B,)``, equal for captions of one picture, which are never negatives of one another; draws: float32 ``(B, 2)``
    uniform in [0, 1), the random numbers that choose the hard negative picture and the hard negative text of each
    pair; swapped: optionally one wrong caption per picture, a negative that the data knows; patches: to be predicted;
    unpaired: pictures and texts beside the pairs; keys: names of the samples for messages; mixed: every so-many-th
    picture is yet to be blended with the next one (MixGen), 0 for none; whole: where this is
    one of several equal parts of a batch, that batch, as it came (on the host in training).
    """

    images: Pictures
    texts: TextBatch
    image_ids: Tensor
    draws: Tensor
    masked: MaskedTexts | None = None
    swapped: TextBatch | None = None
    patches: PatchMasks | None = None
    unpaired: Unpaired | None = None
    keys: tuple[str, ...] = ()
    captions: int = 1
    mixed: int = 0
    whole: Batch | None = None

    def mean(self, count: Callable[[Batch], float]) -> float:
        """``count`` of this batch; of one of several parts, its mean over them. Losses over words or patches divide by
        it, so that those of the parts have the whole's as their mean."""
        whole = self if self.whole is None else self.whole
        return count(whole) * len(self) / len(whole)

    @property
    def masked_words(self) -> int:
        """How many tokens of the texts are masked."""
        return 0 if self.masked is None else sum(self.masked.counts)

    @property
    def masked_patches(self) -> int:
        """How many patches of the pictures are masked."""
        return 0 if self.patches is None else sum(self.patches.counts)

    @property
    def masked_alone(self) -> tuple[int, int]:
        """How many patches of the pictures alone and tokens of the texts alone are masked."""
        alone = self.unpaired
        return (0, 0) if alone is None else (sum(alone.patches.counts), sum(alone.masked.counts))

    @property
    def has_images(self) -> bool:
        """False in a batch of texts alone, whose pictures are ``(B, 3, 0, 0)``."""
        return not (isinstance(self.images, Tensor) and self.images.shape[-1] == 0)

    @property
    def squares(self) -> Tensor:
        """The pictures ``(B, 3, H, W)``; a TypeError where they have several sizes or are regions."""
        if not isinstance(self.images, Tensor):
            raise TypeError(f"this model takes pictures of one size, not a {type(self.images).__name__}")
        return self.images

    def __len__(self) -> int:
        return len(self.images)

    def map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            images=move(self.images) if isinstance(self.images, Tensor) else self.images.map(move),
            texts=self.texts.map(move),
            image_ids=move(self.image_ids),
            draws=move(self.draws),
            masked=self.masked.map(move) if self.masked is not None else None,
            swapped=self.swapped.map(move) if self.swapped is not None else None,
            patches=self.patches.map(move) if self.patches is not None else None,
            unpaired=self.unpaired.map(move) if self.unpaired is not None else None,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def blended(self) -> Batch:
        """The batch with its MixGen pictures made, on the device where it lies: means of two, rounded up."""
        if not self.mixed:
            return self
        one, two = self.squares[: -1 : self.mixed], self.squares[1 :: self.mixed]
        images = self.squares.clone()
        images[: -1 : self.mixed] = ((one.to(torch.int16) + two + 1) // 2).to(torch.uint8)
        return replace(self, images=images, mixed=0)

    def pin_memory(self) -> Batch:
        """Called by ``DataLoader(pin_memory=True)``, so that copies to a GPU need not block."""
        return self.map(lambda x: x.pin_memory())
