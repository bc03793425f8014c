"""Unigram vocabularies of sentencepiece (``.spm``, ``.model``), read without its library, numbered as XLM-R does.

The file is a protocol buffer: pieces with scores, how the vocabulary was trained, and how texts are normalised. BEiT-3
puts ``<s> <pad> </s> <unk>`` in front of the pieces and ``<mask>`` behind them, as XLM-R. Ids equal those of the
library but for one thing that the ``tokenizers`` library does in its own way: characters of three bytes that the
normalisation joins with the next one (half-width katakana with a sound mark).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
_UNIGRAM = 1
_ORDINARY = 1


class SentencePieceError(ValueError):
    """A file that is no sentencepiece vocabulary of the kind that is read here."""


def xlm_roberta(path: str | Path, max_length: int, closing: bool = True) -> tokenizers.Tokenizer:
    """The tokenizer of a sentencepiece file. closing: texts end with ``</s>``.

    Raises :class:`SentencePieceError` for other files, and for vocabularies of byte pairs.
    """
    try:
        pieces, charsmap, model = _read(Path(path).read_bytes())
    except (IndexError, struct.error, UnicodeDecodeError, AssertionError) as error:
        raise SentencePieceError(f"{path}: no sentencepiece vocabulary") from error
    if model != _UNIGRAM:
        raise SentencePieceError(f"{path}: a vocabulary of byte pairs; only unigram vocabularies are read")
    if len(pieces) < 4 or [piece for piece, _, _ in pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        raise SentencePieceError(f"{path}: its first pieces are not <unk>, <s> and </s>")
    lowest = min(score for _, score, kind in pieces if kind == _ORDINARY)
    vocabulary = [(token, 0.0) for token in SPECIALS] + [(piece, score) for piece, score, _ in pieces[3:]]
    vocabulary.append((MASK, lowest))
    inner = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=SPECIALS.index("<unk>"), byte_fallback=False))
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    spaces = [normalizers.Replace(tokenizers.Regex(" +"), " "), normalizers.Replace(tokenizers.Regex("^ | $"), "")]
    inner.normalizer = normalizers.Sequence([*steps, *spaces])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    inner.add_special_tokens([*SPECIALS, MASK])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if closing else "<s> $A", special_tokens=[("<s>", 0), ("</s>", SPECIALS.index("</s>"))]
    )
    inner.enable_truncation(max_length)
    return inner


def _read(data: bytes) -> tuple[list[tuple[str, float, int]], bytes, int]:
    """Pieces (text, score, kind), the compiled map of characters, and the kind of vocabulary."""
    pieces: list[tuple[str, float, int]] = []
    charsmap, kind_of_model = b"", _UNIGRAM
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            text, score, kind = piece.get(1, b""), piece.get(2, b"\0\0\0\0"), piece.get(3, _ORDINARY)
            assert isinstance(text, bytes)
            assert isinstance(score, bytes)
            assert isinstance(kind, int)
            pieces.append((text.decode("utf-8"), struct.unpack("<f", score)[0], kind))
        elif field == 2 and isinstance(value, bytes):
            kind_of_model = dict(_fields(value)).get(3, _UNIGRAM)  # type: ignore[assignment]
        elif field == 3 and isinstance(value, bytes):
            charsmap = dict(_fields(value)).get(2, b"")  # type: ignore[assignment]
    return pieces, charsmap, kind_of_model


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of the fields of a protocol buffer message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise IndexError(kind)
        if at + length > len(data):
            raise IndexError(at)
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError(at)
