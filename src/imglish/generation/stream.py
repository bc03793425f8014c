"""Captions of many pictures, block after block: the next block is read while one is written about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from imglish.data.images import ImageError
from imglish.data.pictures import Picture, stack
from imglish.generation.config import GenerationConfig
from imglish.generation.engine import Caption, Vocabulary, caption
from imglish.models.capabilities import Captions, image_encoder, require

Item = TypeVar("Item")


@dataclass(frozen=True)
class Captioned(Generic[Item]):
    """captions: as many as asked for; none where the picture could not be read, which ``problem`` then says."""

    item: Item
    captions: tuple[Caption, ...]
    problem: ImageError | None = None


def captions_of(
    model: nn.Module,
    tokenizer: Vocabulary,
    items: Sequence[Item],
    load: Callable[[Item], Picture],
    key: Callable[[Item], str],
    config: GenerationConfig,
    *,
    prompt: str | None = None,
    block: int = 16,
    threads: int = 4,
    arithmetic: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[Captioned[Item]]:
    """Captions of ``items``, in their order, as soon as their block is done; the model in ``eval()`` mode.

    load: the picture of an item in the form that the model takes, called in ``threads``; its :class:`ImageError` is
    passed on with the item. key: its name, on which sampling depends; block: pictures at a time; prompt: see
    :func:`imglish.generation.engine.caption`; arithmetic: a context such as autocast. Raises
    ``MissingCapabilityError`` for a model that writes nothing.
    """
    require(model, Captions, "captioning")
    assert isinstance(model, Captions)
    encode = image_encoder(model, "captioning")
    device = next(model.parameters()).device
    for some, pictures in read_ahead(items, load, block, threads):
        readable = [picture for picture in pictures if not isinstance(picture, ImageError)]
        written: Iterator[list[Caption]] = iter(())
        if readable:
            keys = [key(item) for item, picture in zip(some, pictures) if not isinstance(picture, ImageError)]
            with torch.no_grad(), arithmetic():
                encoded = encode(stack(readable).to(device))
                written = iter(caption(model, tokenizer, encoded, config, keys, prompt))
        for item, picture in zip(some, pictures):
            if isinstance(picture, ImageError):
                yield Captioned(item, (), picture)
            else:
                yield Captioned(item, tuple(next(written)))


def read_ahead(
    items: Sequence[Item], load: Callable[[Item], Picture], block: int, threads: int
) -> Iterator[tuple[Sequence[Item], list[Picture | ImageError]]]:
    """Blocks of items with their pictures, or why there is none."""

    def tried(item: Item) -> Picture | ImageError:
        try:
            return load(item)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        waiting: tuple[Sequence[Item], list[Future[Picture | ImageError]]] | None = None
        for low in range(0, len(items) + block, block):
            some = items[low : low + block]
            coming = (some, [pool.submit(tried, item) for item in some])
            if waiting is not None:
                yield waiting[0], [future.result() for future in waiting[1]]
            waiting = coming
