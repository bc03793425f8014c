"""A small model, pictures of plain shapes, and rows, for the tests of searching."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from imglish.api import Model
from imglish.checkpoints import native
from imglish.data.tokenizers import Tokenizer
from imglish.models import registry
from imglish.search.store import Row

TEXTS = ["a red dog in the snow", "a green shirt on grass", "a small blue cat", "a big dog", "the cat on a red shirt"]


def export_model(folder: Path, family: str = "albef", seed: int = 0) -> Path:
    """A tiny model with random weights, exported to ``folder``."""
    torch.manual_seed(seed)
    words = Tokenizer.train_wordpiece(TEXTS, 60)
    model = registry.build(replace(registry.named(f"{family}-tiny"), vocab_size=words.vocab_size))
    return native.export(folder, model.eval(), words)


def load_model(folder: Path) -> Model:
    return Model(native.load(folder), "cpu")


def picture(number: int, side: int = 48) -> Image.Image:
    """A picture that differs from those of other numbers."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)


def write_pictures(folder: Path, count: int, first: int = 0) -> list[str]:
    """PNGs in sub-folders; their names relative to ``folder``."""
    names = []
    for number in range(first, first + count):
        name = f"{'ab'[number % 2]}/{number:04d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)
        names.append(name)
    return names


def rows(low: int, high: int, width: int = 16) -> list[Row]:
    """Rows with everything that filters look at."""
    found = []
    for i in range(low, high):
        vector = np.random.default_rng(i).normal(size=width)
        found.append(
            Row(
                f"{'ab'[i % 2]}/it's {i}.jpg",
                (vector / np.linalg.norm(vector)).astype(np.float16),
                digest=f"{i:032x}",
                stamp=str(i),
                source="photos",
                captions=("A Red dog", "x") if i % 3 == 0 else (),
                date=f"2021-0{i % 9 + 1}-05T10:00:00" if i % 5 else "",
                tags=("one", "two") if i % 4 == 0 else (),
                width=100 + i,
                height=50,
                thumbnail=b"jpeg" * (i % 3),
            )
        )
    return found
