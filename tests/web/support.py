"""An index in memory with a tiny model: what the server needs, without LanceDB."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

import imglish
from imglish.checkpoints import native
from imglish.data.tokenizers import Tokenizer
from imglish.models import registry
from imglish.search import Index
from imglish.search.manifest import Manifest, describe
from imglish.search.originals import place_of
from imglish.search.store import CARD, Hit, Row, Store, StoreInfo

TEXTS = ["a red hat", "two blue shoes and a bag", "黑色上衣", "a hat"]
SCRIPT = '<img src=x onerror="document.title=`taken`"><script>document.title=`taken`</script>'


@dataclass
class MemoryStore:
    """Just enough of a store; the filter is understood by ``key starts`` alone."""

    rows: dict[str, Row] = field(default_factory=dict)
    url: str = "secret/place/photos.index"
    version: int = 1
    searches: list[int] = field(default_factory=list)

    @property
    def dimension(self) -> int:
        return len(next(iter(self.rows.values())).vector)

    def search(self, vectors: np.ndarray, k: int, where: Any = None, exact: bool = False) -> list[list[Hit]]:
        self.searches.append(len(vectors))
        rows = [row for row in self.rows.values() if where is None or row.key.startswith(where.value)]
        found = []
        for vector in vectors:
            hits = [Hit(row.key, float(row.vector.astype("float32") @ vector)) for row in rows]
            found.append(sorted(hits, key=lambda hit: (-hit.score, hit.key))[:k])
        return found

    def get(self, keys: Collection[str], columns: Sequence[str] = CARD, vectors: bool = False) -> dict[str, Row]:
        return {key: self.rows[key] for key in keys if key in self.rows}

    def count(self, where: Any = None) -> int:
        return sum(where is None or key.startswith(where.value) for key in self.rows)

    def info(self) -> StoreInfo:
        return StoreInfo(self.url, "memory", self.version, len(self.rows), self.dimension, None, "exact")

    def close(self) -> None:
        pass


def tiny_model(folder: Path) -> imglish.Model:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train_wordpiece(TEXTS, 80, max_length=16)
    model = registry.build(replace(registry.named("albef-tiny"), vocab_size=tokenizer.vocab_size))
    return imglish.load(native.export(folder / "model", model, tokenizer, {"step": 7}))


def jpeg(image: Image.Image, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **more)
    return buffer.getvalue()


def drawing(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 255, (3, 4, 3), dtype=np.uint8))
    return small.resize(((240, 180), (180, 240), (320, 160))[number % 3], Image.Resampling.BICUBIC)


def make_index(folder: Path, model: imglish.Model, many: int = 24) -> Index:
    """Pictures in ``folder``, whose first has a script as caption and whose second has lost its file; beside the folder
    lies ``secret.jpg``, which is in no index."""
    (folder / "photos" / "in").mkdir(parents=True)
    drawing(999).save(folder / "secret.jpg")
    rows = {}
    for i in range(many):
        path, image = folder / "photos" / "in" / f"{i}.jpg", drawing(i)
        image.save(path, exif=_with_place())
        key = f"in/{i}.jpg" if i else "in/<b onmouseover=alert(1)>&'\".jpg"
        vector = model.encode_images([image])[0].numpy().astype("float16")
        small = image.copy()
        small.thumbnail((128, 128))
        captions = (SCRIPT,) if i == 0 else (f"a drawing, number {i}", "第二个说明") if i % 2 else ()
        rows[key] = Row(
            key, vector, place=place_of(path), captions=captions, date="2021-06-01T10:00:00", tags=("drawing",),
            width=image.width, height=image.height, thumbnail=jpeg(small),
        )  # fmt: skip
    (folder / "photos" / "in" / "1.jpg").unlink()
    store = MemoryStore(rows)
    manifest: Manifest = describe(model, "model")
    return Index(cast(Store, store), manifest, model)


def _with_place() -> Image.Exif:
    exif = Image.Exif()
    exif[0x010E] = "home address"
    return exif


@contextmanager
def closing(app: Any) -> Any:
    """The application's test client, its thread ended afterwards."""
    from starlette.testclient import TestClient

    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client
