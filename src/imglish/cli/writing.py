"""Options of how captions are written, common to the commands that write some."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imglish.generation.config import GenerationConfig


def add_options(parser: argparse.ArgumentParser, many: bool) -> None:
    """Add them to ``parser``; many: also how many captions a picture gets."""
    group = parser.add_argument_group("how captions are written")
    add = group.add_argument
    add("--prompt", help="text that captions begin with (default: as the model was trained)")
    add("--beams", type=int, help="beam search with so many beams, 1: greedy (default: 3, unless sampling)")
    add("--top-p", type=float, help="sample from the likeliest tokens that hold this probability together")
    add("--top-k", type=int, help="sample from so many likeliest tokens")
    add("--temperature", type=float, help="of sampling; below 1 is more careful")
    add("--seed", type=int, default=0, help="of sampling; each picture has random numbers of its own")
    if many:
        add("--n", type=int, default=1, help="captions a picture: samples, or the best of the beams (default: 1)")
    add("--min-length", type=int, default=5, help="tokens of a caption at least, opening and prompt count (default: 5)")
    add("--max-length", type=int, default=30, help="at most, closing token included (default: 30)")
    add("--length-penalty", type=float, default=1.0, help="of beams: more than 1 favours longer captions")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: tokens that occur already are less likely")
    add("--no-repeat-ngram", type=int, default=0, metavar="N", help="no sequence of N tokens twice in a caption")


def generation_config(arguments: argparse.Namespace) -> GenerationConfig:
    """What :func:`add_options` was given; contradictions raise ``ValueError``."""
    from imglish.generation.config import GenerationConfig

    drawn = {name: getattr(arguments, name) for name in ("top_p", "top_k", "temperature")}
    drawn = {name: value for name, value in drawn.items() if value is not None}
    n = getattr(arguments, "n", 1)
    beams = arguments.beams or (1 if drawn else max(3, n))
    return GenerationConfig(
        beams=beams,
        sample=bool(drawn),
        n=n,
        min_length=arguments.min_length,
        max_length=arguments.max_length,
        repetition_penalty=arguments.repetition_penalty,
        no_repeat_ngram=arguments.no_repeat_ngram,
        length_penalty=arguments.length_penalty,
        seed=arguments.seed,
        **drawn,
    )
