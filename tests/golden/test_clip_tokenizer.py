"""CLIP's tokenizer against the official ``clip.tokenize``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from imglish.data.tokenizers import Tokenizer
from tests.golden.support import REPOSITORY, Case, cases

FOLDERS = cases("clip-tokenizer")
MERGES = REPOSITORY.parent / "shared" / "data" / "vocab" / "bpe_simple_vocab_16e6.txt.gz"


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_clip_tokenizer(folder: Path) -> None:
    if not MERGES.is_file():
        pytest.skip("CLIP's merges file bpe_simple_vocab_16e6.txt.gz is not in shared/data/vocab")
    case = Case(folder)
    length = case.config["context_length"]
    tokenizer = Tokenizer.load(MERGES, max_length=length)
    for name, texts in (("tokens", case.config["texts"]), ("truncated", [case.config["truncate_text"]])):
        ids = torch.tensor([row + [tokenizer.pad_id] * (length - len(row)) for row in tokenizer.encode(texts)])
        assert torch.equal(ids, case.outputs[name]), name
