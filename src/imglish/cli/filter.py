"""`imglish filter SCORES`: choose pairs by their scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Choose pairs by the scores that `imglish score` wrote, in seconds and without a model. Nothing is deleted.

  imglish filter scores --out kept                                  # ITM of at least 0.5, web and synthetic texts
  imglish filter scores --no-min-itm --keep-fraction 0.3 --out kept
  imglish filter scores --texts synthetic --best 5:itc --best 1:ranker_itc --out kept
  imglish filter kept --why 1000268201.jpg                          # kept or dropped, and by which rule
  imglish train RECIPE data.train=kept/keep.yaml

Writes keep.jsonl, keep.yaml, the list as a source of data, and report.html.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "imglish filter", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("scores", type=Path, metavar="SCORES", help="folder of `imglish score`; with --why also of `imglish filter`")
    add("--out", type=Path, help="folder to write (default: only say how many would be kept)")
    add("--why", metavar="KEY", help="say what becomes of the texts of this picture, and write nothing")
    add("--min-itm", type=float, default=0.5, help="least matching probability (default: 0.5, as published)")
    add("--no-min-itm", dest="min_itm", action="store_const", const=None, help="no limit of it")
    add("--min-itc", type=float, help="least cosine of the towers")
    add("--texts", choices=("web", "synthetic", "both"), default="both")
    add("--min-words", type=int, default=1)
    add("--max-words", type=int)
    add("--only-language", action="append", default=[], metavar="English", help="of the text, as guessed; repeatable")
    add("--max-repeats", type=int, metavar="N", help="drop texts that more than N pictures have")
    add("--near", type=float, metavar="0.8", help="of texts of a picture that share so many words keep the best")
    add("--keep-fraction", type=float, metavar="0.3", help="of what is left, the best by --by")
    add("--by", choices=("itm", "itc", "ranker_itm", "ranker_itc"), default="itm", help="what is best (default: itm)")
    add("--best", action="append", default=[], metavar="N[:MEASURE]", help="at most N texts a picture; repeatable")
    add("--format", choices=("jsonl", "parquet"), default="jsonl", help="of the keep-list (default: jsonl)")
    add("--shards", type=Path, metavar="FOLDER", help="also write the kept pairs as tar shards")
    add("--truth", metavar="FILE", help="JSON lines that say which captions are noise, for the report")
    add("--no-report", action="store_true", help="without report.html")
    return parser


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 1 no row is kept or the disk is full, 2 wrong arguments."""
    arguments = _parser().parse_args(argv)

    from imglish.data.errors import DataError

    try:
        return _filter(arguments)
    except (DataError, ValueError) as error:
        print(f"imglish filter: {error}", file=sys.stderr)
        return 1 if str(error).startswith("no row is kept") else 2
    except OSError as error:
        print(f"imglish filter: {error}", file=sys.stderr)
        return 1


def _filter(arguments: argparse.Namespace) -> int:
    from imglish.bootstrapping import keeping
    from imglish.bootstrapping.filtering import FilterConfig, Scores, decide, parse_best, why
    from imglish.bootstrapping.stage import Stage
    from imglish.data.errors import printable
    from imglish.data.shards import ShardConfig

    names = ("min_itm", "min_itc", "texts", "min_words", "max_words", "max_repeats", "near", "keep_fraction", "by")
    config = FilterConfig(
        **{name: getattr(arguments, name) for name in names},
        languages=tuple(arguments.only_language),
        best=tuple(map(parse_best, arguments.best)),
    )
    folder = arguments.scores
    if (folder / keeping.SETTINGS).is_file():
        if arguments.why is None:
            raise ValueError(f"{folder} is what a filter wrote: give the folder of scores")
        folder, config = keeping.settings_of(folder)
    stage = Stage.open(folder)
    scores = Scores.of(stage)
    decisions = decide(scores, config)
    if arguments.why is not None:
        for line in why(scores, decisions, arguments.why):
            print("\t".join(printable(part) for part in line.split("\t")))
        return 0
    for reason, count in decisions.counts().items():
        print(f"{count:>10,}  {count / max(len(scores), 1):6.1%}  {reason}")
    if arguments.out is None and arguments.shards is None:
        return 0 if decisions.kept.any() else 1
    if arguments.out is not None:
        if arguments.out.resolve() == folder.resolve():
            raise ValueError("--out has to be another folder than that of the scores")
        data = keeping.write(arguments.out, stage, scores, decisions, config, arguments.format == "parquet")
        print(f"kept pairs in {data}")
        if not arguments.no_report:
            from imglish.bootstrapping.quality import read_truth
            from imglish.bootstrapping.report import page

            truth = read_truth(arguments.truth) if arguments.truth is not None else None
            made_page = page(stage, scores, decisions, config, truth).save(arguments.out / "report.html")
            print(f"report in {made_page}")
        if data.suffix != ".yaml" and arguments.shards is None:
            print("the pictures are not files of their own: to train on this list, write --shards FOLDER")
    if arguments.shards is not None:
        made = keeping.write_shards(arguments.shards, stage, scores, decisions.kept, ShardConfig(side=None))
        print(f"{made.written} pictures in {made.shards} shards in {arguments.shards}")
    return 0
