"""`imglish bootstrap RECIPE.yaml [key=value ...]`: train, caption, score, filter and train again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from imglish.cli.train import STOPPED, say

DESCRIPTION = """\
BLIP's loop as one recipe: train on noisy pairs, fine-tune captioner and filter on a small clean set, caption, score and
filter, and train again from scratch on what is kept.

  imglish bootstrap recipes/scenes-bootstrap.yaml
  imglish bootstrap recipes/scenes-bootstrap.yaml stages.kept.filter.rules.min_itm=0.7 output=runs/other
  torchrun --nproc-per-node 8 -m imglish bootstrap recipes/blip-bootstrap.yaml

Stopped at any moment, the same command goes on where it was (docs/bootstrap.md).
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 finished, 1 a stage failed, 2 wrong settings, 75 stopped and can be continued."""
    parser = argparse.ArgumentParser(
        "imglish bootstrap", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file of stages; docs/bootstrap.md explains them")
    overrides = "settings that replace those of the recipe"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=overrides)
    parser.add_argument("--check", action="store_true", help="check the recipe; do nothing")
    arguments = parser.parse_intermixed_args(argv)

    from imglish.bootstrapping.loop import check_loop, read_loop, run_loop
    from imglish.checkpoints.native import CheckpointError
    from imglish.data.errors import DataError
    from imglish.data.images import ImageError
    from imglish.models.capabilities import MissingCapabilityError
    from imglish.training.alarms import LossNotFinite
    from imglish.training.checkpoint import ResumeError
    from imglish.training.settings import SettingsError

    try:
        steps = read_loop(arguments.recipe, arguments.overrides)
        if arguments.check:
            print("\n".join(check_loop(steps)))
            return 0
        for result in run_loop(steps):
            if status := say(result):
                return status
    except (SettingsError, ResumeError, MissingCapabilityError) as error:
        print(f"imglish bootstrap: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, LossNotFinite, ImageError, DataError, OSError) as error:
        print(f"imglish bootstrap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the shards that are missing", file=sys.stderr)
        return STOPPED
    return 0
