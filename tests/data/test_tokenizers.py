from __future__ import annotations

import gzip
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from imglish.data.tokenizers import Tokenizer, TokenizerError
from tests.data.samples import CAPTIONS, tokenizer


def test_english_and_chinese_round_trips() -> None:
    for text in CAPTIONS:
        ids = tokenizer().encode([text])[0]
        assert tokenizer().decode(ids) == text


def test_chinese_is_read_character_by_character() -> None:
    ids = tokenizer().encode(["黑色上衣，白色裤子"])[0]
    assert tokenizer().tokens(ids) == ["[CLS]", *"黑色上衣", "[UNK]", *"白色裤子"]


def test_special_tokens_and_truncation() -> None:
    plain = tokenizer()
    closed = Tokenizer.train_wordpiece(CAPTIONS * 3, 60, max_length=5, append_sep=True)
    long = "dog " * 50
    assert plain.encode([""])[0] == [plain.cls_id]
    assert not plain.append_sep
    assert len(plain.encode([long])[0]) == plain.max_length == 40
    ids = closed.encode([long])[0]
    assert len(ids) == 5
    assert (ids[0], ids[-1]) == (closed.cls_id, closed.sep_id)
    assert closed.append_sep
    assert closed.with_max_length(9).max_length == 9
    assert len({plain.pad_id, plain.cls_id, plain.sep_id, plain.mask_id}) == 4
    assert plain.vocab_size <= 60
    assert len(plain.ordinary_ids) == plain.vocab_size - 5


def test_one_text_is_not_taken_for_a_list() -> None:
    with pytest.raises(TypeError, match="list of texts"):
        tokenizer().encode("text")


def test_saving_keeps_all_settings(tmp_path: Path) -> None:
    made = Tokenizer.train_wordpiece(CAPTIONS * 3, 60, max_length=7, append_sep=True, lowercase=False)
    made.save(tmp_path / "tokenizer.json")
    for copy in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(made))):
        assert copy.encode(list(CAPTIONS)) == made.encode(list(CAPTIONS))
        assert (copy.max_length, copy.append_sep, copy.vocab_size) == (7, True, made.vocab_size)
        assert copy.is_special.tolist() == made.is_special.tolist()
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"broken\.json"):
        Tokenizer.load(tmp_path / "broken.json")


def test_word_starts_follow_the_words() -> None:
    ids = tokenizer().encode(["snowstorm dog, 白色"])[0]
    words = "".join("|" + t if s else t for t, s in zip(tokenizer().tokens(ids), tokenizer().word_starts(ids)))
    assert words.replace("##", "") == "|[CLS]|snowstorm|dog|[UNK]|白|色"
    assert tokenizer().word_starts([]) == []


def test_training_gives_the_same_vocabulary_in_another_process() -> None:
    """The library numbers letters in the order of a randomly seeded hash table, unless they are given beforehand."""
    code = (
        "from imglish.data.tokenizers import Tokenizer; from tests.data.samples import CAPTIONS;"
        "print(Tokenizer.train_wordpiece(CAPTIONS * 3, 60).tokens(range(60)))"
    )
    root = Path(__file__).resolve().parents[2]
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=root).stdout for _ in "12"
    }
    assert len(runs) == 1


def test_bert_vocabulary_equals_transformers(tmp_path: Path) -> None:
    peer = pytest.importorskip("transformers")
    path = tmp_path / "vocab.txt"
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "snow",
        "##storm",
        "##s",
        "dog",
        "a",
        ",",
        "cafe",
        "黑",
        "色",
    ]
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    texts = ["A snowstorm, dogs", "Café 黑色", "unknown snow[MASK]dog", ""]
    assert Tokenizer.load(path).encode(texts) == peer.BertTokenizer(str(path))(texts)["input_ids"]
    assert Tokenizer.load(path, append_sep=False).encode(["a dog"]) == [[2, 9, 8]]
    path.write_text("\n".join(tokens[1:]), encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"\[PAD\] missing"):
        Tokenizer.load(path)


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """CLIP's tokenizer with four merges instead of 48,894."""
    monkeypatch.setattr("imglish.data.tokenizers.CLIP_MERGES", 4)
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress(b"#version\nd o\ndo g</w>\ns n\nsn o\nbeyond use\n"))
    return Tokenizer.load(path, max_length=8)


def test_clip_reads_words_to_their_end(clip: Tokenizer) -> None:
    ids = clip.encode(["Dog &amp; SNOW é"])[0]
    assert clip.tokens(ids) == [
        "<|startoftext|>", "dog</w>", "&</w>", "sno", "w</w>", "Ã", "©</w>", "<|endoftext|>"
    ]  # fmt: skip
    assert clip.word_starts(ids) == [True, True, True, True, False, True, False, True]
    assert clip.decode(ids) == "dog & snow é"
    assert clip.encode(["dog " * 20])[0][-1] == clip.eos_id
    assert len(clip.encode(["dog " * 20])[0]) == 8
    assert (clip.bos_id, clip.pad_id, clip.append_sep) == (516, 0, True)


def test_clip_saved_and_loaded_cleans_as_before(clip: Tokenizer, tmp_path: Path) -> None:
    clip.save(tmp_path / "tokenizer.json")
    text = ["DOG  &lt;b&gt; dog"]
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(text) == clip.encode(text)
    with pytest.raises(TokenizerError, match=r"no \[MASK\]"):
        _ = clip.mask_id


def test_a_wrong_merges_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "merges.gz"
    path.write_bytes(b"not gzip")
    with pytest.raises(TokenizerError, match=r"merges\.gz"):
        Tokenizer.load(path)
