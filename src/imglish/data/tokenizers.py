"""Tokenizers: WordPiece (BERT's vocabularies, or trained on one's own captions), CLIP's byte-level BPE, and unigram
vocabularies of sentencepiece (XLM-R, BEiT-3).

All settings live in the standard ``tokenizer.json`` of the ``tokenizers`` library: which tokens surround a text is in
its post-processor, the longest length in its truncation. So a saved tokenizer needs no second file.
"""

from __future__ import annotations

import gzip
import html
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from imglish.data.sentencepiece import SentencePieceError, xlm_roberta

PAD, UNK, CLS, SEP, MASK = WORDPIECE_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BOS, EOS = CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
ROLES: dict[str, dict[str, tuple[str, ...]]] = {  # what a token is for -> its names, the first that there is
    "bert": {"pad": (PAD,), "unk": (UNK,), "cls": (CLS,), "sep": (SEP,), "mask": (MASK,), "bos": (CLS,), "eos": (SEP,)},
    "clip": {"unk": (EOS,), "bos": (BOS,), "eos": (EOS,)},
    "sentences": {
        "pad": ("<pad>", "</s>"),
        "unk": ("<unk>",),
        "cls": ("<s>",),
        "sep": ("</s>",),
        "mask": ("<mask>",),
        "bos": ("<s>",),
        "eos": ("</s>",),
    },
}
CLIP_MERGES = 49152 - 256 - 2  # of the published file; later lines are not part of the vocabulary
CLIP_LENGTH = 77
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # of CLIP
_CJK = r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
_CJK_GAP = re.compile(rf"(?<={_CJK}) (?={_CJK})")


_PUNCTUATION = tokenizers.Regex(f"[{re.escape(string.punctuation)}]")
CLEANING: dict[
    str, list[normalizers.Normalizer]
] = {  # names of open_clip -> what they do to a text; broken encodings are left as they are
    "lower": [normalizers.Lowercase()],
    "canonicalize": [
        normalizers.Replace("_", " "),
        normalizers.Replace(_PUNCTUATION, ""),
        normalizers.Lowercase(),
        normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
        normalizers.Strip(),
    ],
}


class TokenizerError(ValueError):
    """A file that is no tokenizer, or a token that this tokenizer does not have."""


class Tokenizer:
    """Texts to token ids and back; wraps a ``tokenizers.Tokenizer``. Can be pickled for loader workers."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_padding()
        self.inner = inner
        self.is_clip = inner.token_to_id(BOS) is not None and isinstance(inner.model, models.BPE)
        self.kind = "clip" if self.is_clip else "sentences" if isinstance(inner.model, models.Unigram) else "bert"

    # --- making one ---------------------------------------------------------------------------------------------

    @staticmethod
    def load(
        path: str | Path, max_length: int | None = None, append_sep: bool = True, lowercase: bool | None = None
    ) -> Tokenizer:
        """A ``tokenizer.json``, a BERT ``vocab.txt``, CLIP's ``bpe_simple_vocab_16e6.txt.gz``, or a sentencepiece
        vocabulary (``.spm``, ``.model``) that is numbered as XLM-R's and BEiT-3's.

        max_length: longest sequence with special tokens (default: what the file says, else 512, CLIP 77).
        append_sep: for a ``vocab.txt``, whether [SEP] closes a text; official ALBEF has none. lowercase: for a
        ``vocab.txt``, see :meth:`bert`.
        """
        path = Path(path)
        if path.name.endswith(".gz"):
            return Tokenizer.clip(path, max_length or CLIP_LENGTH)
        if path.suffix == ".txt":
            return Tokenizer.bert(path, max_length or 512, append_sep, lowercase)
        if path.suffix in (".spm", ".model"):
            try:
                return Tokenizer(xlm_roberta(path, max_length or 512, append_sep))
            except SentencePieceError as error:
                raise TokenizerError(str(error)) from error
        try:
            loaded = Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path}: not a tokenizer.json: {error}") from error
        if loaded.kind == "bert" and isinstance(loaded.inner.model, models.BPE):
            raise TokenizerError(f"{path}: a vocabulary of byte pairs that is not CLIP's; such ones are not read")
        return loaded if max_length is None else loaded.with_max_length(max_length)

    @staticmethod
    def bert(
        vocabulary: str | Path, max_length: int = 512, append_sep: bool = True, lowercase: bool | None = None
    ) -> Tokenizer:
        """From a BERT ``vocab.txt``; lowercase: texts are lower-cased, by default if the vocabulary has no capitals."""
        words = Path(vocabulary).read_text(encoding="utf-8").split("\n")
        words = words[:-1] if words and not words[-1] else words
        missing = [token for token in WORDPIECE_SPECIALS if token not in words]
        if missing:
            raise TokenizerError(f"{vocabulary}: no BERT vocabulary, {' '.join(missing)} missing")
        capitals = any(word != word.lower() for word in words if not word.startswith("["))
        model = models.WordPiece({word: number for number, word in enumerate(words)}, unk_token=UNK)
        return Tokenizer(_wordpiece(model, not capitals if lowercase is None else lowercase, max_length, append_sep))

    @staticmethod
    def train_wordpiece(
        texts: Iterable[str],
        vocab_size: int,
        *,
        max_length: int = 64,
        append_sep: bool = False,
        lowercase: bool = True,
        min_frequency: int = 2,
    ) -> Tokenizer:
        """Train a WordPiece vocabulary of up to ``vocab_size`` tokens; each Chinese character is a word of its own."""
        inner = _wordpiece(models.WordPiece({}, unk_token=UNK), lowercase, max_length, append_sep=False)
        texts = list(texts)
        alphabet, continuing = _letters(inner, texts, limit=max(vocab_size // 2, 64))
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            # Numbered beforehand: the library would number them in the order of a randomly seeded hash table, and
            # that order decides ties between merges.
            special_tokens=[*WORDPIECE_SPECIALS, *continuing],
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        trained = models.WordPiece(inner.get_vocab(with_added_tokens=True), unk_token=UNK)
        return Tokenizer(_wordpiece(trained, lowercase, max_length, append_sep))

    @staticmethod
    def clip(merges: str | Path, max_length: int = CLIP_LENGTH) -> Tokenizer:
        """CLIP's byte-pair encoding from its published merges file (gzip)."""
        try:
            lines = gzip.decompress(Path(merges).read_bytes()).decode("utf-8").split("\n")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{merges}: not CLIP's merges file: {error}") from error
        pairs = [tuple(line.split()) for line in lines[1 : CLIP_MERGES + 1]]
        if len(pairs) != CLIP_MERGES or any(len(pair) != 2 for pair in pairs):
            raise TokenizerError(f"{merges}: expected {CLIP_MERGES} merges of two parts each")
        return Tokenizer(_clip_bpe([(pair[0], pair[1]) for pair in pairs], max_length))

    def with_max_length(self, max_length: int) -> Tokenizer:
        """The same tokenizer with another longest length (special tokens count)."""
        copy = tokenizers.Tokenizer.from_str(self.inner.to_str())
        copy.enable_truncation(max_length)
        return Tokenizer(copy)

    def cleaning(self, how: str) -> Tokenizer:
        """The same tokenizer that first does to a text what ``CLEANING`` says."""
        copy = tokenizers.Tokenizer.from_str(self.inner.to_str())
        before: list[normalizers.Normalizer] = [copy.normalizer] if copy.normalizer is not None else []
        copy.normalizer = normalizers.Sequence([*CLEANING[how], *before])
        return Tokenizer(copy)

    def closed(self, closing: bool) -> Tokenizer:
        """The same tokenizer whose texts end with the closing token, or do not. Raises :class:`TokenizerError` where
        that is not BERT's: other vocabularies say themselves what stands around a text."""
        if self.append_sep == closing:
            return self
        if self.token("cls") != CLS:
            raise TokenizerError(
                f"its texts end {'without' if closing else 'with'} {self.token('eos') or 'a closing token'}"
            )
        copy = tokenizers.Tokenizer.from_str(self.inner.to_str())
        copy.post_processor = _around(copy, closing)
        return Tokenizer(copy)

    def with_special(self, tokens: Sequence[str]) -> Tokenizer:
        """The same tokenizer with further special tokens behind its vocabulary, in this order, which no text gives.

        Those that it has are left alone. Raises :class:`TokenizerError` unless ``tokens`` are its last ones then.
        """
        copy = tokenizers.Tokenizer.from_str(self.inner.to_str())
        copy.add_special_tokens(list(tokens))
        made = Tokenizer(copy)
        places = [made.id_of(token) for token in tokens]
        if places != list(range(made.vocab_size - len(tokens), made.vocab_size)):
            raise TokenizerError(f"{' '.join(tokens)} have to be the last tokens of the vocabulary, they are {places}")
        return made

    def filled_to(self, vocab_size: int) -> Tokenizer:
        """The same tokenizer with tokens ``<unused0>``, ... that no text gives, up to ``vocab_size``: for models that
        have more rows than their tokenizer has tokens (BEiT-3)."""
        copy = tokenizers.Tokenizer.from_str(self.inner.to_str())
        copy.add_special_tokens([f"<unused{number}>" for number in range(vocab_size - self.vocab_size)])
        return Tokenizer(copy)

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``, which :meth:`load` (and the ``tokenizers`` library) reads back."""
        Path(path).write_text(self.inner.to_str(pretty=True), encoding="utf-8")

    # --- texts and ids ------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with its special tokens, at most ``max_length``; a closing token survives the cut."""
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one text")
        plain = [_clip_clean(text) for text in texts] if self.is_clip else list(texts)
        if len(plain) < 16:  # too few to be worth waking a pool of threads
            return [self.inner.encode(text).ids for text in plain]
        return [encoding.ids for encoding in self.inner.encode_batch_fast(plain)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids without special tokens, normalised as the tokenizer sees it (lower case, accents)."""
        text: str = self.inner.decode([int(i) for i in ids], skip_special_tokens=True)
        return _CJK_GAP.sub("", text).strip()

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entries themselves, for display."""
        return [self.inner.id_to_token(int(i)) or UNK for i in ids]

    def word_starts(self, ids: Sequence[int]) -> list[bool]:
        """For each token, whether a word begins there; special tokens stand for themselves."""
        given = np.asarray(ids, dtype=np.int64)
        if self.kind == "sentences":
            return [bool(b) for b in self._begins[given] | self.is_special[given]]
        if not self.is_clip:
            return [bool(b) for b in ~self._continues[given]]
        ends = self._ends_word[given]
        starts = np.concatenate([[True], ends[:-1]])[: len(given)] | self.is_special[given]
        return [bool(b) for b in starts]

    # --- the vocabulary -----------------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        return int(self.inner.get_vocab_size(with_added_tokens=True))

    @property
    def max_length(self) -> int:
        """Longest sequence that :meth:`encode` gives, special tokens included."""
        truncation = self.inner.truncation
        return int(truncation["max_length"]) if truncation else 512

    @cached_property
    def append_sep(self) -> bool:
        """Whether a closing token ([SEP], </s>, or CLIP's end token) follows a text."""
        ids, closing = self.inner.encode("").ids, self.token("eos")
        return bool(ids) and closing is not None and ids[-1] == self.inner.token_to_id(closing)

    def token(self, role: str) -> str | None:
        """The token that is for ``role`` (pad, unk, cls, sep, mask, bos, eos), None where there is none."""
        names = ROLES[self.kind].get(role, ())
        return next((name for name in names if self.inner.token_to_id(name) is not None), None)

    def _id_for(self, role: str) -> int:
        return self.id_of(self.token(role) or next(iter(ROLES[self.kind].get(role, ROLES["bert"][role]))))

    @property
    def pad_id(self) -> int:
        """[PAD]; CLIP has none and fills up with 0."""
        return 0 if self.is_clip else self._id_for("pad")

    @property
    def cls_id(self) -> int:
        return self._id_for("cls")

    @property
    def sep_id(self) -> int:
        return self._id_for("sep")

    @property
    def mask_id(self) -> int:
        return self._id_for("mask")

    @property
    def bos_id(self) -> int:
        """The token that opens a text: CLIP's start token, else [CLS] or <s>."""
        return self._id_for("bos")

    @property
    def eos_id(self) -> int:
        """The token that closes a text: CLIP's end token, else [SEP] or </s>."""
        return self._id_for("eos")

    def id_of(self, token: str) -> int:
        """Raises :class:`TokenizerError` where the vocabulary lacks ``token``."""
        number = self.inner.token_to_id(token)
        if number is None:
            raise TokenizerError(f"this tokenizer has no {token} token")
        return int(number)

    @cached_property
    def is_special(self) -> np.ndarray:
        """bool ``(vocab_size,)``: tokens that are no text, and never masked or drawn."""
        special = np.zeros(self.vocab_size, dtype=bool)
        special[[i for i, token in self.inner.get_added_tokens_decoder().items() if token.special]] = True
        return special

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """int64: the ids of text tokens, from which MLM draws its random replacements."""
        return np.flatnonzero(~self.is_special)

    @cached_property
    def _continues(self) -> np.ndarray:
        return self._where(lambda token: token.startswith("##"))

    @cached_property
    def _begins(self) -> np.ndarray:
        return self._where(lambda token: token.startswith("▁"))

    @cached_property
    def _ends_word(self) -> np.ndarray:
        return self._where(lambda token: token.endswith("</w>")) | self.is_special

    def _where(self, test: Callable[[str], bool]) -> np.ndarray:
        flags = np.zeros(self.vocab_size, dtype=bool)
        flags[[i for token, i in self.inner.get_vocab(with_added_tokens=True).items() if test(token)]] = True
        return flags


def _wordpiece(model: models.WordPiece, lowercase: bool, max_length: int, append_sep: bool) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)  # puts spaces around Chinese characters
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=True)
    if inner.token_to_id(CLS) is not None:
        inner.add_special_tokens(list(WORDPIECE_SPECIALS))
        inner.post_processor = _around(inner, append_sep)
        inner.enable_truncation(max_length)
    return inner


def _around(inner: tokenizers.Tokenizer, closing: bool) -> processors.TemplateProcessing:
    """What BERT puts around a text."""
    around = [(token, inner.token_to_id(token)) for token in (CLS, SEP)]
    return processors.TemplateProcessing(single=f"{CLS} $A {SEP}" if closing else f"{CLS} $A", special_tokens=around)


def _letters(inner: tokenizers.Tokenizer, texts: Sequence[str], limit: int) -> tuple[list[str], list[str]]:
    """The ``limit`` most frequent letters, sorted, and those of them that occur within words as ``##x``."""
    counts: Counter[str] = Counter()
    within: set[str] = set()
    for text in texts:
        for word, _ in inner.pre_tokenizer.pre_tokenize_str(inner.normalizer.normalize_str(text)):
            counts.update(word)
            within.update(word[1:])
    kept = sorted(sorted(counts, key=lambda letter: (-counts[letter], letter))[:limit])
    return kept, [f"##{letter}" for letter in kept if letter in within]


def _clip_bpe(merges: list[tuple[str, str]], max_length: int) -> tokenizers.Tokenizer:
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), *CLIP_SPECIALS]
    vocabulary = {word: number for number, word in enumerate(words)}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=EOS, fuse_unk=False)
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    inner.add_special_tokens(list(CLIP_SPECIALS))
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(token, vocabulary[token]) for token in CLIP_SPECIALS]
    )
    inner.enable_truncation(max_length)
    return inner


def _byte_letters() -> list[str]:
    """The printable letter of each byte in the order of CLIP's vocabulary: printable bytes first, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sum(1 for byte in range(256) if byte not in printable)
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(others)]


def _clip_clean(text: str) -> str:
    """CLIP's clean-up: repaired encoding, HTML entities (twice escaped too), single spaces, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip().lower()
