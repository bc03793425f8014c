"""Tiny models that have learned nothing, and pictures with captions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imglish.checkpoints import native
from imglish.data.tokenizers import Tokenizer
from imglish.models import registry

WORDS = ["a red hat", "two blue shoes on a chair", "a dog in the snow", "a bag and a house"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models that write and match, compare only, or match without towers."""
    folder = tmp_path_factory.mktemp("models")
    plain = Tokenizer.train_wordpiece(WORDS, 90, max_length=16, append_sep=True)
    for name in ("blip-tiny", "clip-tiny", "vilt-tiny"):
        torch.manual_seed(0)
        config = registry.named(name)
        tokenizer = plain.with_special(config.special_tokens) if hasattr(config, "special_tokens") else plain
        model = registry.build(dataclasses.replace(config, vocab_size=tokenizer.vocab_size))
        native.export(folder / name, model, tokenizer)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures with two captions each, one of which is no picture."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(7):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        noise = ["", "wrong"] if i % 2 else ["", ""]
        captions = [WORDS[i % 4], WORDS[(i + 1) % 4]]
        lines.append(json.dumps({"image": f"{i}.png", "captions": captions, "noise": noise}))
    (folder / "images" / "3.png").write_bytes(b"\x89PNG nothing")
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder / "captions.jsonl"
