"""Small pictures and a small tokenizer for the tests of the data package."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from imglish.data.records import Record
from imglish.data.tokenizers import Tokenizer

CAPTIONS = (
    "a dog runs over the snow",
    "two dogs playing in the snowstorm",
    "a woman in a black top and white trousers",
    "一个女人穿黑色上衣、白色裤子",
)


@dataclass(frozen=True)
class Noise:
    """A picture of seeded noise, drawn on demand."""

    seed: int
    width: int = 40
    height: int = 30

    def __call__(self) -> Image.Image:
        pixels = np.random.default_rng(self.seed).integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


def records(count: int, captions: tuple[str, ...] = CAPTIONS) -> list[Record]:
    return [Record(f"picture-{i}", Noise(i), captions, image_id=i) for i in range(count)]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train_wordpiece(CAPTIONS * 3, 60, max_length=40)
