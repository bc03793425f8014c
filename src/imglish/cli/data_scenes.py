"""`imglish data scenes OUT`: drawn pictures of dressed people, with captions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Draw scenes of people in coloured garments and write pictures and captions to a folder. Nothing is downloaded.

  imglish data scenes scenes --scenes 20000 --size 96
  imglish data scenes noisy --people 1-3 --things 0-2 --wrong 0.2 --partial 0.1 --irrelevant 0.2 --languages en
  imglish train RECIPE data.train=scenes/captions.jsonl data.split=train validation.data=scenes/captions.jsonl \\
    validation.split=seen

Training captions often leave things out; beside each stands a "swapped" one with a colour in the wrong place. The
splits "seen" and "heldout" are for evaluation: their captions are complete, every picture is followed by its
distractor, and what "heldout" shows (colour pairs of top and trousers) training never shows or says. quadruples.jsonl
asks who wears what, queries.jsonl holds searches. The field "noise" says what is wrong with each caption, nothing for a
true one.
"""


def _limits(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def _words(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _pairs(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(pair.split("/")) for pair in _words(text))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "imglish data scenes", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    add("--scenes", type=int, default=2000, help="training pictures (default: 2000)")
    add("--pairs", type=int, default=200, help="pictures with a distractor in each evaluation split (default: 200)")
    add("--size", type=int, default=96, help="side of the pictures in pixels (default: 96)")
    add("--seed", type=int, default=0)
    add("--captions", type=int, default=2, help="of each training picture in each language (default: 2)")
    add("--languages", type=_words, default=("en", "zh"), metavar="en,zh")
    add("--people", type=_limits, default=(2, 2), metavar="2-2", help="fewest and most in a picture, 1 to 4")
    add("--things", type=_limits, default=(0, 0), metavar="0-0", help="balls, boxes and balloons, 0 to 3")
    add("--small-objects", type=float, default=0.4, help="chance of each of hat, shoes and bag (default: 0.4)")
    add("--omission", type=float, default=0.4, help="chance that a caption leaves out a garment (default: 0.4)")
    add("--colours", type=_words, metavar="red,blue,...", help="of eight, fewer are easier (default: all)")
    add("--held-out", type=_pairs, metavar="red/blue,...", help="colour pairs that training never shows")
    for kind, what in (
        ("wrong", "a colour is said of something else"),
        ("partial", "one single thing is named"),
        ("irrelevant", "another picture is described, or none"),
    ):
        add(f"--{kind}", type=float, default=0.0, metavar="RATE", help=f"share of training captions where {what}")
    return parser


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 1 the disk failed, 2 wrong arguments."""
    arguments = _parser().parse_args(argv)

    from tqdm import tqdm

    from imglish.data.scene_folder import write_scenes
    from imglish.data.scene_noise import CaptionNoise
    from imglish.data.scenes import SceneConfig

    given = {key: value for key, value in vars(arguments).items() if value is not None}
    out, noise = given.pop("out"), {kind: given.pop(kind) for kind in ("wrong", "partial", "irrelevant")}
    if arguments.colours is not None and arguments.held_out is None:
        kept = [pair for pair in SceneConfig().held_out if set(pair) <= set(arguments.colours)]
        given["held_out"] = tuple(kept)
    settings: dict[str, Any] = given
    try:
        config = SceneConfig(**settings, noise=CaptionNoise(**noise))
        counts = write_scenes(config, out, lambda numbers: tqdm(numbers, unit="pictures", disable=None))
    except (ValueError, FileExistsError) as error:
        print(f"imglish data scenes: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"imglish data scenes: {error}", file=sys.stderr)
        return 1
    print(f"{', '.join(f'{count:,} {what}' for what, count in counts.items())} in {out}")
    return 0
