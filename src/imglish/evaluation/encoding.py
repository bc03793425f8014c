"""Every picture and every caption through its tower exactly once, in blocks shared among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from imglish.data.aspect import AspectTransform
from imglish.data.batch import TextBatch
from imglish.data.images import ImageTransform, decode
from imglish.data.patches import Patches
from imglish.data.pictures import Picture, Pictures, picture_of, stack
from imglish.data.records import Record
from imglish.evaluation.sharing import blocks, mine, share
from imglish.evaluation.tokens import TokenStore
from imglish.models.capabilities import EncodedTexts, image_encoder, text_encoder
from imglish.nn.segments import Segments
from imglish.objectives.gather import rank

Item = TypeVar("Item")


class Encodes(Protocol):
    """The one thing that evaluation asks of a tokenizer."""

    def encode(self, texts: list[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class Cleaned:
    """A tokenizer behind the clean-up of texts that a model was trained with."""

    tokenizer: Encodes
    clean: Callable[[str], str]

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer.encode([self.clean(text) for text in texts])


@dataclass(frozen=True)
class Machine:
    """Where and how an evaluation computes.

    image_block, text_block: pictures and captions a block; precision: "float32" or "bfloat16" (autocast);
    token_dtype: how image tokens are kept until they are reranked; token_memory: bytes of them held in memory, the
    rest goes to a temporary folder; decoders: threads that read pictures; progress: show a bar on rank 0.
    """

    image_block: int = 64
    text_block: int = 256
    pair_block: int = 512
    precision: str = "float32"
    token_dtype: str = "float32"
    token_memory: int = 8 * 2**30
    decoders: int = 4
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("image_block", "text_block", "pair_block", "decoders"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it has to be at least 1")
        for name in ("precision", "token_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose float32 or bfloat16")

    def store(self) -> TokenStore:
        return TokenStore(getattr(torch, self.token_dtype), self.token_memory)

    def arithmetic(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def bar(self, total: int, what: str, unit: str) -> tqdm[Any]:
        """A progress bar with rate and time left; silent on other ranks."""
        return tqdm(total=total, desc=what, unit=unit, disable=not self.progress or rank() > 0, smoothing=0.1)


DEFAULT_MACHINE = Machine()


def device_of(model: nn.Module) -> torch.device:
    """The device that the parameters are on."""
    return next(model.parameters()).device


def picture_loader(transform: ImageTransform | AspectTransform) -> Callable[[Record], Tensor | Patches]:
    """A function that decodes a record's picture in full and gives it as uint8 ``(3, size, size)`` or patches."""

    def load(record: Record) -> Tensor | Patches:
        return picture_of(transform(decode(record.image, name=record.key)), transform)

    return load


def encode_pictures(
    model: nn.Module,
    pictures: Sequence[Item],
    load: Callable[[Item], Picture],
    machine: Machine,
    store: TokenStore | None = None,
) -> Tensor:
    """Features ``(I, E)`` float32 of all pictures on the model's device, the same on all ranks (E = 0 for a model
    without towers).

    load: a picture as ``(3, H, W)``, patches or regions, called in threads; store: takes the tokens of this rank's
    blocks.
    """
    encode = image_encoder(model, "retrieval")
    device = device_of(model)
    parts = blocks(len(pictures), machine.image_block)
    own: dict[int, Tensor] = {}
    with torch.no_grad(), machine.bar(len(mine(len(parts))), "pictures", "block") as bar:
        for block, images in _loaded(pictures, parts, load, machine.decoders):
            with machine.arithmetic(device):
                encoded = encode(images.to(device, non_blocking=True))
            own[block] = encoded.features.float()
            if store is not None:
                if encoded.tokens is None:
                    raise TypeError(f"{type(model).__name__} gave no tokens to rerank with")
                store.put(block, encoded.tokens)
            bar.update()
    return torch.cat([share(own.pop(block, None), block, device) for block in range(len(parts))])


def _loaded(
    items: Sequence[Item], parts: list[range], load: Callable[[Item], Picture], threads: int
) -> Iterator[tuple[int, Pictures]]:
    """This rank's blocks as batches of pictures; the next block is read while one is being used."""
    with ThreadPoolExecutor(threads) as pool:

        def begin(block: int) -> tuple[int, list[Future[Picture]]]:
            return block, [pool.submit(load, items[i]) for i in parts[block]]

        waiting = None
        for block in mine(len(parts)):
            coming = begin(block)
            if waiting is not None:
                yield waiting[0], stack([future.result() for future in waiting[1]])
            waiting = coming
        if waiting is not None:
            yield waiting[0], stack([future.result() for future in waiting[1]])


def encode_captions(
    model: nn.Module, captions: Sequence[str], tokenizer: Encodes, machine: Machine, keep_rows: bool
) -> EncodedTexts:
    """Features ``(T, E)`` float32 of all captions on the model's device, the same on all ranks; ``keep_rows``: with
    their packed states ``(rows, D)`` for a fusion tower, kept as ``machine.token_dtype``."""
    encode = text_encoder(model, "retrieval")
    device = device_of(model)
    tokens = tokenizer.encode(list(captions))
    parts = blocks(len(captions), machine.text_block)
    own: dict[int, EncodedTexts] = {}
    with torch.no_grad(), machine.bar(len(mine(len(parts))), "captions", "block") as bar:
        for block in mine(len(parts)):
            batch = TextBatch.of([tokens[i] for i in parts[block]]).to(device)
            with machine.arithmetic(device):
                own[block] = encode(batch)
            bar.update()
    features, rows = [], []
    dtype = getattr(torch, machine.token_dtype)
    for block in range(len(parts)):
        part = own.pop(block, None)
        features.append(share(part.features.float() if part else None, block, device))
        if keep_rows:
            if part is not None and part.rows is None:
                raise TypeError(f"{type(model).__name__} gave no rows to match with")
            rows.append(share(part.rows.to(dtype) if part and part.rows is not None else None, block, device))
    return EncodedTexts(
        torch.cat(features), Segments.of(len(ids) for ids in tokens), torch.cat(rows) if keep_rows else None
    )
