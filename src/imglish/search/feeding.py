"""What the fusion tower reads of the pictures that it reranks: kept tokens, thumbnails or originals."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from imglish.data.images import ImageError, decode
from imglish.data.pictures import Picture, picture_of, stack
from imglish.nn.segments import Ragged
from imglish.search.originals import read_original
from imglish.search.store import Row, Store
from imglish.search.tokens import unpack

if TYPE_CHECKING:
    from imglish.api import Model

Feed = Literal["auto", "tokens", "thumbnails", "originals"]
FEEDS: tuple[Feed, ...] = get_args(Feed)
DECODERS = 4
_COLUMNS: dict[Feed, tuple[str, ...]] = {
    "auto": ("thumbnail", "place"),
    "tokens": (),
    "thumbnails": ("thumbnail",),
    "originals": ("place",),
}


def feed(
    store: Store, keys: Sequence[str], model: Model, feed_from: Feed, lock: threading.Lock, tokens_kept: bool
) -> tuple[Tensor | Ragged | None, list[int], list[str]]:
    """Tokens on the model's device of those of the pictures ``keys`` that can be read, in their order; the places of
    these in ``keys``; and what is wrong with the others.

    tokens_kept: whether the index holds tokens; lock: held while the model computes.
    """
    if feed_from in ("auto", "tokens") and tokens_kept:
        rows = store.get(keys, ("key", "tokens"))
        readable = [i for i, key in enumerate(keys) if key in rows and rows[key].tokens]
        if feed_from == "tokens" or len(readable) == len(keys):
            problems = [
                f"{keys[i]}: the index holds no tokens of it" for i in sorted(set(range(len(keys))) - {*readable})
            ]
            kept = unpack([rows[keys[i]].tokens for i in readable]) if readable else None
            return _placed(kept, model), readable, problems
    loaded = pixels(store, keys, model, feed_from)
    readable = [i for i, picture in enumerate(loaded) if not isinstance(picture, ImageError)]
    problems = [str(picture) for picture in loaded if isinstance(picture, ImageError)]
    if not readable:
        return None, [], problems
    batch = stack([picture for picture in loaded if not isinstance(picture, ImageError)])
    network: Any = model.network
    with lock, torch.no_grad():
        return network.encode_images(batch.to(model.device)).tokens, readable, problems


def pixels(store: Store, keys: Sequence[str], model: Model, feed_from: Feed) -> list[Picture | ImageError]:
    """The pictures as the model's transform makes them, or why they cannot be read; ``feed_from`` is not "tokens"."""
    rows = store.get(keys, ("key", *_COLUMNS[feed_from]))
    transform = model.config.image.transform()

    def load(key: str) -> Picture | ImageError:
        try:
            return picture_of(transform(decode(_bytes(key, rows, feed_from), name=key)), transform)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(DECODERS) as pool:
        return list(pool.map(load, keys))


def _bytes(key: str, rows: dict[str, Row], feed_from: Feed) -> bytes:
    if key not in rows:
        raise ImageError(f"{key}: is not in the index any more", "missing")
    if feed_from != "originals" and rows[key].thumbnail:
        return rows[key].thumbnail
    if feed_from == "thumbnails":
        raise ImageError(f"{key}: the index holds no thumbnail of it", "missing")
    return read_original(rows[key].place, key)


def _placed(tokens: Tensor | Ragged | None, model: Model) -> Tensor | Ragged | None:
    dtype = next(model.network.parameters()).dtype
    place: Callable[[Tensor], Tensor] = lambda rows: rows.to(model.device, dtype)  # noqa: E731
    if tokens is None or isinstance(tokens, Tensor):
        return place(tokens) if tokens is not None else None
    return tokens.map(place)
