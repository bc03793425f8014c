"""Tokenizers of released checkpoints: their files, and what the settings beside them say of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imglish.checkpoints.native import CheckpointError, read_settings
from imglish.checkpoints.source import Format, Source
from imglish.data.tokenizers import Tokenizer, TokenizerError

TOKENIZER_SETTINGS = "tokenizer_config.json"
TOKENIZERS = ("tokenizer.json", "vocab.txt", "bpe_simple_vocab_16e6.txt.gz", "beit3.spm")


def tokenizer_of(source: Source, form: Format, config: Any, given: str | Path | None) -> tuple[Tokenizer, int | None]:
    """The tokenizer of a model: the file ``given``, or the first that lies beside the weights; and the number of the
    token that fills a text up, where the model of ``config`` reads it and the files say which it is.

    Raises :class:`CheckpointError` where there is none, or one that is not the model's.
    """
    beside = [source.folder / name for name in TOKENIZERS if (source.folder / name).is_file()]
    file = Path(given) if given is not None else beside[0] if beside else None
    if file is None:
        raise CheckpointError(
            f"{source.path}: no tokenizer lies beside it ({', '.join(TOKENIZERS)}); name its file (tokenizer=...): "
            "BERT's vocab.txt for ALBEF, BLIP and ViLT, bpe_simple_vocab_16e6.txt.gz for CLIP and CoCa, beit3.spm for "
            "BEiT-3"
        )
    try:
        words = Tokenizer.load(file, max_length=config.max_length, append_sep=form.closing, lowercase=_lowercase(file))
        words = words.closed(form.closing).with_special(form.special)
    except (OSError, TokenizerError) as error:
        said = str(error)
        raise CheckpointError(said if said.startswith(str(file)) else f"{file}: {said}") from error
    try:
        steps = None if form.clean is None else form.clean(source)
        end = None if form.end is None else form.end(source)
    except ValueError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    words = words if steps is None else words.cleaning(steps)
    if words.kind == "sentences" and words.vocab_size < config.vocab_size:
        words = words.filled_to(config.vocab_size)
    if words.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{file} has {words.vocab_size} tokens, the model {config.vocab_size}: it is not the tokenizer of "
            f"{source.path}"
        )
    if end not in (None, words.eos_id):
        raise CheckpointError(
            f"{file} ends texts with token {words.eos_id}, the settings of {source.path} with {end}: it is not its "
            "tokenizer"
        )
    return words, _fill(file, words) if getattr(getattr(config, "text", None), "padded", False) else None


def _fill(file: Path, words: Tokenizer) -> int | None:
    """The token that fills a text up: what transformers' settings beside the tokenizer say, else that of SigLIP, whose
    texts are filled up with their closing token."""
    settings = file.parent / TOKENIZER_SETTINGS
    named = read_settings(settings).get("pad_token") if settings.is_file() else None
    named = named.get("content") if isinstance(named, dict) else named
    if named is None:
        return words.eos_id if words.kind == "sentences" else None
    try:
        return words.id_of(str(named))
    except TokenizerError as error:
        raise CheckpointError(f"{settings}: pad_token {named!r}: {error}") from error


def _lowercase(file: Path) -> bool | None:
    """Whether texts are lower-cased for a ``vocab.txt``, where transformers' settings beside it say so."""
    settings = file.parent / TOKENIZER_SETTINGS
    if file.suffix != ".txt" or not settings.is_file():
        return None
    given = read_settings(settings)
    lower: bool = given.get("do_lower_case", True)
    if given.get("strip_accents") not in (None, lower) or not given.get("tokenize_chinese_chars", True):
        raise CheckpointError(
            f"{settings}: strip_accents {given.get('strip_accents')} and tokenize_chinese_chars "
            f"{given.get('tokenize_chinese_chars', True)} are not supported with do_lower_case {lower}"
        )
    return lower
