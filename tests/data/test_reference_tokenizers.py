"""WordPiece and CLIP's byte pairs from the files beside checkpoints, against the tokenizers of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from imglish.data.tokenizers import Tokenizer
from tests.data.test_sentencepiece import SHARED, sentences

transformers = pytest.importorskip("transformers")
VOCAB = SHARED / "vocab"


def needed(name: str) -> Path:
    path = VOCAB / name
    if not path.is_file():
        pytest.skip(f"{name} is not in shared/data/vocab")
    return path


@pytest.mark.parametrize(
    ("name", "lower"), [("bert-base-uncased-vocab.txt", True), ("bert-base-cased-vocab.txt", False)]
)
def test_wordpiece(name: str, lower: bool) -> None:
    path = needed(name)
    ours = Tokenizer.load(path, max_length=4096)
    theirs = transformers.BertTokenizer(str(path), do_lower_case=lower)
    texts = [text for text in sentences() if "[" not in text]
    expected = theirs(texts, truncation=True, max_length=4096)["input_ids"]
    found = ours.encode(texts)
    differing = [(t, a, b) for t, a, b in zip(texts, found, expected, strict=True) if a != b]
    assert not differing, differing[:3]
    assert len(texts) > 2000


def test_clip_from_its_merges_and_from_a_tokenizer_json(tmp_path: Path) -> None:
    """The file of the tokenizers library that lies beside CLIP on the hub gives the ids of the merges file."""
    ours = Tokenizer.load(needed("bpe_simple_vocab_16e6.txt.gz"))
    ours.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    texts = sentences()[:1500]
    assert again.encode(texts) == ours.encode(texts)
    assert again.is_clip
    assert {ids[0] for ids in ours.encode(texts)} == {49406}
