"""Unigram vocabularies of sentencepiece against the library itself, and against XLM-R's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imglish.data.tokenizers import Tokenizer, TokenizerError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL = SHARED / "vocab" / "kosmos2_sentencepiece_64k.model"
TRICKY = [
    "",
    " ",
    "  two  spaces\tand\na line\r\nbreak ",
    "一只狗在雪地里奔跑。",
    "中文 and English，混合！",
    "🐕‍🦺 👩‍👩‍👧‍👦 🇨🇳 emoji🙂🙂",
    "café CAFÉ naïve ﬁnd ½ ① Ａｄｖ ㌀ ｶ",
    "e\u0301 \u200b zero\u200dwidth \ufeff bom \u00a0 nbsp \u3000 ideographic",
    "control \x00\x01\x07\x1b\x7f\x85\x91 end",
    "<s> </s> <unk> <mask> <pad> ▁▁ literal",
    "a" * 300,
    "don't... 3.14% $5 #tag @you http://x.y/z?q=1",
    "Ünïcödé ßtraße Ελληνικά русский العربية हिन्दी 한국어 日本語",
]


def sentences() -> list[str]:
    """A few thousand real captions in two languages, and the tricky ones."""
    found = list(TRICKY)
    for path in sorted((SHARED / "flickr8k").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines()[:800]:
            found += texts_in(json.loads(line))
    return found


def texts_in(value: object) -> list[str]:
    """All texts of a record, whatever its fields are called."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts_in(item)]
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    return [value] if isinstance(value, str) else []


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    if not MODEL.is_file():
        pytest.skip("the vocabulary kosmos2_sentencepiece_64k.model is not in shared/data/vocab")
    return Tokenizer.load(MODEL, max_length=4096)


def test_the_same_ids_as_sentencepiece(tokenizer: Tokenizer) -> None:
    library = pytest.importorskip("sentencepiece")
    reference = library.SentencePieceProcessor(model_file=str(MODEL))
    texts = [text for text in sentences() if not any(token in text for token in ("<s>", "</s>", "<mask>", "<pad>"))]
    assert len(texts) > 2000
    differing = []
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        pieces = [number + 1 if number else 3 for number in reference.encode(text)]  # <unk> is 3, others one up
        if ids != [0, *pieces, 2]:
            differing.append((text, ids, pieces))
    assert not differing, differing[:5]


def test_numbers_and_roles_are_those_of_beit3(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 64002
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 1, 2, 64001)
    assert tokenizer.append_sep
    assert tokenizer.word_starts(tokenizer.encode(["a snowboarder jumps"])[0])[:2] == [True, True]
    assert tokenizer.decode(tokenizer.encode(["a dog in the snow"])[0]) == "a dog in the snow"
    full = tokenizer.filled_to(64010)
    assert full.vocab_size == 64010
    assert full.encode(["a dog"]) == tokenizer.encode(["a dog"])
    assert full.mask_id == 64001
    assert len(tokenizer.with_max_length(4).encode(["a dog in the snow"])[0]) == 4


def test_it_is_kept_in_a_tokenizer_json(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.encode(TRICKY) == tokenizer.encode(TRICKY)
    assert (again.kind, again.mask_id) == ("sentences", 64001)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for data in (b"", b"\xff\xff\xff\xff", b"\x0a\x03abc", b"not a protocol buffer at all"):
        (tmp_path / "odd.spm").write_bytes(data)
        with pytest.raises(TokenizerError, match=r"odd\.spm"):
            Tokenizer.load(tmp_path / "odd.spm")
