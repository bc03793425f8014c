"""`imglish score SOURCE`: how well captions fit their pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from imglish.cli.source_options import add_source_options, source_config
from imglish.cli.workers import add_worker_options, device_of, failures, on_ray, said, worker_of

DESCRIPTION = """\
Score the captions of a source, and those that `imglish caption` wrote: the matching probability (ITM) of the fusion
tower and the cosine (ITC) of the towers, one parquet file a shard.

  imglish score photos/captions.jsonl --model MODEL --out scores
  imglish score captions --model MODEL --ranker OTHER --out scores     # captions: a folder of `imglish caption`

Stopped, it goes on where it was. Any number of workers may share one --out (docs/bootstrap.md).
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 1 shards failed or the disk is full, 2 wrong arguments."""
    parser = argparse.ArgumentParser(
        "imglish score", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="data of any layout, or a folder that `imglish caption` wrote")
    add("--model", required=True, help="folder of an exported model, as filter")
    add("--ranker", metavar="MODEL", help="a second model whose scores are written beside")
    add("--out", type=Path, required=True, help="folder of the scores")
    add("--batch", type=int, default=16, help="pictures at a time (default: 16)")
    add("--pairs", type=int, default=256, help="pairs at a time in the fusion tower (default: 256)")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add_source_options(parser)
    add_worker_options(parser)
    arguments = parser.parse_args(argv)

    from imglish.checkpoints.native import CheckpointError
    from imglish.models.capabilities import MissingCapabilityError

    try:
        return _score(arguments) if arguments.ray is None else on_ray("score", argv, arguments.ray)
    except (CheckpointError, MissingCapabilityError, ValueError, TypeError) as error:
        print(f"imglish score: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"imglish score: {error}", file=sys.stderr)
        return 1


def _score(arguments: argparse.Namespace) -> int:
    from imglish.api import load
    from imglish.bootstrapping.scoring import KIND, Scorer, captions_stage, scorer, settings
    from imglish.bootstrapping.stage import STAGE, Stage

    rank, world = worker_of(arguments.worker)
    captions = captions_stage(Path(arguments.source)) if (Path(arguments.source) / STAGE).is_file() else None
    source = captions.source if captions is not None else source_config(arguments, arguments.source)
    device = device_of(arguments.device)
    how = {"block": arguments.batch, "pairs": arguments.pairs, "precision": arguments.precision}
    model = load(arguments.model, device)
    ranker = load(arguments.ranker, device) if arguments.ranker is not None else None
    first = Scorer(model, **how)
    second = Scorer(ranker, **how) if ranker is not None else None
    about = settings(model, arguments.model, ranker, arguments.ranker or "", captions, arguments.precision)
    stage = Stage.begin(arguments.out, KIND, about, source, arguments.per_shard, captions.shards if captions else None)
    done = stage.run(scorer(first, second, captions), rank=rank, world=world, lease=arguments.lease, said=said)
    speed = f", {done.rows / done.seconds:.1f} texts/s" if done.rows else ""
    print(f"{done.rows} texts scored in {done.shards} shards{speed}; in {arguments.out}")
    return failures("imglish score", stage, done)
