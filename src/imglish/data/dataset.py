"""Training samples: one picture, one caption and every random choice for them, from (seed, epoch, sample) alone."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imglish.data.aspect import AspectTransform
from imglish.data.augment import AugmentPolicy
from imglish.data.batch import Batch, MaskedTexts, TextBatch, Unpaired
from imglish.data.epochs import EpochItems
from imglish.data.errors import Problem
from imglish.data.images import Detail, ImageError, ImageTransform, decode_sized
from imglish.data.masking import MaskConfig, mask_tokens
from imglish.data.patch_masks import PatchMaskConfig, pack_patch_masks
from imglish.data.pictures import Picture, stack
from imglish.data.records import Record
from imglish.data.regions import RegionFile
from imglish.data.sources.base import caption_counts, parts
from imglish.data.text import CaptionStyle, clean_caption, mentions_side
from imglish.data.tokenizers import Tokenizer

UNREADABLE_IN_A_ROW = 100  # pictures tried in search of a readable one


class Purpose(IntEnum):
    """What a random stream is for; one stream each, so that one option does not shift the choices of another."""

    ORDER = 0
    CAPTION = 1
    IMAGE = 2
    MASK = 3
    DRAW = 4
    PATCHES = 5
    AUGMENT = 6


def stream(seed: int, epoch: int, sample: int, purpose: Purpose) -> np.random.Generator:
    """The random numbers of one sample for one purpose: the same in any process, worker or rank."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    counter = np.array([0, 0, sample, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


Masked = tuple[list[int], list[int], list[int]]
"""A text for MLM: its ids with the masks, the positions to be predicted, the tokens there."""


@dataclass(frozen=True)
class Sample:
    """pixels: uint8 ``(size, size, 3)``, or patches or regions; ids: of the caption; draws: two uniform numbers;
    masked: ids, positions, labels of the MLM; more, more_masked: of further captions of the picture, equally many in
    all samples; patches: bool ``(rows, columns)``, True where a patch is to be predicted; unreadable: the pictures in
    whose place this one stands."""

    key: str
    pixels: Picture
    ids: list[int]
    image_id: int
    draws: np.ndarray
    masked: Masked | None
    swapped: list[int] | None
    more: tuple[list[int], ...] = ()
    more_masked: tuple[Masked, ...] = ()
    patches: np.ndarray | None = None
    unreadable: tuple[Problem, ...] = ()


class PairDataset:
    """Image-caption pairs of records, ready to be put in batches.

    captions: ``"one"`` makes an item of every picture, with a random caption of its own each epoch; a number makes an
    item of every picture with so many of its captions at once (a picture that has fewer repeats some); ``"all"`` makes
    an item of every caption. transform: None gives texts alone, with pictures of no pixel. tokenizer: None gives
    pictures alone, with texts of no token. clean: clean-up of captions
    before the tokenizer. prompt: text that every caption begins with. mlm: also mask the texts. mim: also mask the
    pictures, of ``patch`` pixels a patch. swapped: also give the wrong captions that the records hold. cache: keep
    pictures in memory after the first decoding, at ``transform.cache_size`` (shared by forked workers). detail: of
    decoding JPEGs, see :func:`images.decode_sized`. augment: RandAugment of the transformed pictures. regions: give
    these, by the records' keys, in place of the pictures, which are then not read.
    """

    def __init__(
        self,
        records: Sequence[Record],
        transform: ImageTransform | AspectTransform | None,
        tokenizer: Tokenizer | None,
        *,
        captions: Literal["one", "all"] | int = "one",
        clean: CaptionStyle = "none",
        max_words: int = 30,
        prompt: str = "",
        mlm: MaskConfig | None = None,
        mim: PatchMaskConfig | None = None,
        patch: int | None = None,
        swapped: bool = False,
        cache: bool = False,
        detail: Detail = "good",
        augment: AugmentPolicy | None = None,
        regions: RegionFile | None = None,
    ) -> None:
        if not records:
            raise ValueError("a data set without records")
        if swapped and (lacking := next((record.key for record in records if not record.swapped), None)):
            raise ValueError(f"swapped captions are wanted, but {lacking} has none")
        if tokenizer is None and (swapped or mlm is not None):
            raise ValueError("masked and swapped texts need a tokenizer")
        if mlm is not None and tokenizer is not None:
            tokenizer.id_of("[MASK]")
        self.captions = captions if isinstance(captions, int) else 1
        if self.captions > 1 and swapped:
            raise ValueError("swapped texts go with one caption a picture: set captions to one or all")
        counts = caption_counts(records)
        if tokenizer is not None and not counts.all():
            raise ValueError(f"{records[int(counts.argmin())].key} has no caption")
        most = int(counts.max())
        if tokenizer is not None and not 1 <= self.captions <= most:
            raise ValueError(f"{self.captions} captions a picture are wanted, the records have up to {most}")
        self.records = records
        self.transform = transform
        self.tokenizer = tokenizer
        self.clean: CaptionStyle = clean
        self.max_words = max_words
        self.prompt = prompt
        self.mlm = mlm
        self.mim = mim
        if transform is not None and regions is not None:
            raise ValueError("pictures need a transform, regions have none")
        if mim is not None and (patch is None or transform is None):
            raise ValueError("masked pictures need the size of a patch, and pixels")
        self.grid = (0, 0) if transform is None or patch is None else (transform.size // patch, transform.size // patch)
        self.swapped = swapped
        self.detail: Detail = detail
        self.augment = augment
        self.regions = regions
        self.cache = PictureCache(len(records), transform.cache_size) if cache and transform is not None else None
        self._starts = np.concatenate([[0], np.cumsum(counts)]) if captions == "all" else None  # items of each record
        self._epoch = EpochItems.of(parts(records), self._starts)

    def __len__(self) -> int:
        """Items in an epoch: pictures, or captions with ``captions="all"``; in a mixture as its weights say."""
        return len(self._epoch)

    def _place(self, seed: int, epoch: int, item: int) -> tuple[int, int | None]:
        """Numbers of the record and, where each caption is an item, of the caption."""
        number = self._epoch.item(seed, epoch, item)
        if self._starts is None:
            return number, None
        record = int(np.searchsorted(self._starts, number, side="right")) - 1
        return record, number - int(self._starts[record])

    def sample(self, seed: int, epoch: int, item: int) -> Sample:
        """The item as it is in ``epoch``. An unreadable picture gives way to the next readable item, and is named.

        Raises :class:`ImageError` when too many in a row cannot be read.
        """
        unreadable: list[Problem] = []
        for step in range(min(UNREADABLE_IN_A_ROW, len(self))):
            number, caption = self._place(seed, epoch, (item + step) % len(self))
            record = self.records[number]
            try:
                pixels = self.pixels(number, (seed, epoch, item))
            except ImageError as error:
                unreadable.append(Problem(record.key, error.reason, str(error)))
                continue
            return self._with_text(record, caption, pixels, (seed, epoch, item), tuple(unreadable))
        last = unreadable[-1].message
        raise ImageError(f"{len(unreadable)} pictures in a row cannot be read; the last: {last}")

    def _with_text(
        self,
        record: Record,
        caption: int | None,
        pixels: Picture,
        where: tuple[int, int, int],
        unreadable: tuple[Problem, ...],
    ) -> Sample:
        draws = stream(*where, Purpose.DRAW).random(2, dtype=np.float32)
        patches = self.mim.draw(self.grid, stream(*where, Purpose.PATCHES)) if self.mim is not None else None
        if self.tokenizer is None:
            return Sample(
                record.key, pixels, [], record.image_id, draws, None, None, patches=patches, unreadable=unreadable
            )
        rng, count = stream(*where, Purpose.CAPTION), len(record.captions)
        if caption is not None:
            chosen = [caption]
        elif self.captions == 1:
            chosen = [int(rng.integers(count))]
        else:
            chosen = np.resize(rng.permutation(count), self.captions).tolist()
        texts = [record.captions[c] for c in chosen] + ([record.swapped[chosen[0]]] if self.swapped else [])
        ids = self.tokenizer.encode([self.prompt + clean_caption(text, self.max_words, self.clean) for text in texts])
        swapped = ids.pop() if self.swapped else None
        masked: list[Masked] = []
        if self.mlm is not None:
            rng, how = stream(*where, Purpose.MASK), self.mlm
            masked = [mask_tokens(text, rng, self.tokenizer, how.probability, how.whole_word, how.end) for text in ids]
        return Sample(
            record.key,
            pixels,
            ids[0],
            record.image_id,
            draws,
            masked[0] if masked else None,
            swapped,
            tuple(ids[1:]),
            tuple(masked[1:]),
            patches,
            unreadable,
        )

    def pixels(self, number: int, where: tuple[int, int, int], may_flip: bool | None = None) -> Picture:
        """What the model is given of the picture of record ``number``; where: seed, epoch and item, which decide its
        random choices; may_flip: default, unless a caption names a side."""
        record = self.records[number]
        if self.regions is not None:
            return self.regions[record.key]
        transform = self.transform
        if transform is None:
            return np.zeros((0, 0, 3), dtype=np.uint8)
        picture, original = self._picture(number, transform, where)
        rng = stream(*where, Purpose.IMAGE)
        if may_flip is None:
            may_flip = not any(map(mentions_side, record.captions)) if transform.flip else False
        pixels = transform(picture, rng, may_flip=may_flip, original=original)
        if self.augment is not None:
            pixels = self.augment(pixels, stream(*where, Purpose.AUGMENT))
        return transform.cut(pixels, rng) if isinstance(transform, AspectTransform) else pixels

    def _picture(
        self, number: int, transform: ImageTransform | AspectTransform, where: tuple[int, int, int]
    ) -> tuple[Image.Image, tuple[int, int]]:
        """The picture, squashed for the cache or decoded at the size that this epoch's crop needs, and its own (width,
        height)."""
        record = self.records[number]
        if self.cache is None:

            def needed(width: int, height: int) -> tuple[float, float]:
                return transform.least(width, height, stream(*where, Purpose.IMAGE))

            return decode_sized(record.image, needed, detail=self.detail, name=record.key)
        if (kept := self.cache.get(number)) is None:
            side = transform.cache_size
            picture, size = decode_sized(record.image, side, detail=self.detail, name=record.key)
            self.cache.put(number, transform.squashed(picture), size)
            kept = self.cache.get(number)
        assert kept is not None
        return kept


class PictureCache:
    """Decoded pictures in memory: uint8 ``(count, side, side, 3)`` with their original sizes.

    The memory is anonymous and shared, so forked workers fill and read one cache. Spawned workers begin with an
    empty one of their own. Raises ``ValueError`` if it would need more than half of the machine's memory.
    """

    def __init__(self, count: int, side: int) -> None:
        self.count, self.side = count, side
        needed = count * (side * side * 3 + 8)
        if needed > _memory() / 2:
            raise ValueError(f"keeping {count:,} pictures in memory takes {needed / 2**30:.1f} GiB: set cache=false")
        self._allocate()

    def _allocate(self) -> None:
        shape = (self.count, self.side, self.side, 3)
        self.pixels = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), dtype=np.uint8).reshape(shape)
        self.sizes = np.frombuffer(mmap.mmap(-1, self.count * 8), dtype=np.int32).reshape(self.count, 2)

    def get(self, number: int) -> tuple[Image.Image, tuple[int, int]] | None:
        """The squashed picture and its own (width, height); None if it has not been put."""
        width, height = (int(n) for n in self.sizes[number])
        return (Image.fromarray(self.pixels[number]), (width, height)) if width else None

    def put(self, number: int, pixels: np.ndarray, size: tuple[int, int]) -> None:
        """Keep a picture; uint8 ``(side, side, 3)``, and its own (width, height)."""
        self.pixels[number] = pixels
        self.sizes[number, 1] = size[1]
        self.sizes[number, 0] = size[0]  # last: a picture with a width is complete

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "side": self.side}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._allocate()


def _memory() -> int:
    """Bytes of physical memory, or a guess where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 * 2**30


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack pictures ``(B, 3, H, W)`` uint8 (or pack their patches or regions) and pack texts row behind row."""
    swapped = [sample.swapped for sample in samples if sample.swapped is not None]
    return Batch(
        images=stack([sample.pixels for sample in samples]),
        texts=TextBatch.of([ids for sample in samples for ids in (sample.ids, *sample.more)]),
        image_ids=torch.tensor([sample.image_id for sample in samples], dtype=torch.int64),
        draws=torch.from_numpy(np.stack([sample.draws for sample in samples])),
        masked=_packed(samples),
        swapped=TextBatch.of(swapped) if swapped else None,
        patches=pack_patch_masks([sample.patches for sample in samples if sample.patches is not None]),
        keys=tuple(sample.key for sample in samples),
        captions=1 + len(samples[0].more),
    )


def collate_unpaired(pictures: Sequence[Sample], texts: Sequence[Sample]) -> Unpaired:
    """Pictures with masked patches and texts with masked tokens that do not belong together."""
    masks = pack_patch_masks([sample.patches for sample in pictures if sample.patches is not None])
    masked = _packed(texts)
    if masks is None or masked is None:
        raise ValueError("pictures and texts beside the pairs need masks of both")
    images = stack([sample.pixels for sample in pictures])
    assert isinstance(images, Tensor)
    return Unpaired(
        images=images,
        patches=masks,
        texts=TextBatch.of([sample.ids for sample in texts]),
        masked=masked,
    )


def _packed(samples: Sequence[Sample]) -> MaskedTexts | None:
    texts = [text for s in samples if s.masked is not None for text in (s.masked, *s.more_masked)]
    return pack_masked(texts)


def pack_masked(texts: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]]) -> MaskedTexts | None:
    """Masked texts (ids, positions, labels) as packed rows; None for no texts. Nothing masked gives no rows."""
    if not texts:
        return None
    lengths = [len(ids) for ids, _, _ in texts]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    rows = [int(start) + p for start, (_, positions, _) in zip(starts, texts) for p in positions]
    return MaskedTexts(
        ids=torch.tensor([i for ids, _, _ in texts for i in ids], dtype=torch.int64),
        rows=torch.tensor(rows, dtype=torch.int64),
        labels=torch.tensor([i for _, _, labels in texts for i in labels], dtype=torch.int64),
        counts=tuple(len(positions) for _, positions, _ in texts),
    )
