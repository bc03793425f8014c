"""`imglish train RECIPE.yaml [key=value ...]`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imglish.training.trainer import Result

STOPPED = 75  # "temporary failure, try again": the run was stopped and the same command continues it

DESCRIPTION = """\
Train a model by a recipe. When the recipe's output folder holds a checkpoint, the run continues from it exactly.

  imglish train recipes/flickr8k-albef.yaml optimiser.lr=1e-4 model.teacher.alpha=0.2
  torchrun --nproc-per-node 8 -m imglish train recipes/flickr8k-albef.yaml
  imglish train recipes/vlmo-staged.yaml stages.pairs.optimiser.lr=1e-4

SIGTERM and Ctrl-C finish the step, write a checkpoint and end with status 75; the same command continues.
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 finished, 1 the run failed, 2 wrong settings, 75 stopped and can be continued."""
    return run("imglish train", DESCRIPTION, argv)


def run(command: str, description: str, argv: Sequence[str]) -> int:
    """What `imglish train` and `imglish finetune` do."""
    parser = argparse.ArgumentParser(
        command, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file of settings; docs/train.md explains them")
    overrides = "settings that replace those of the recipe"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=overrides)
    parser.add_argument("--check", action="store_true", help="check recipe, data and disk; do not train")
    arguments = parser.parse_intermixed_args(argv)

    import yaml

    from imglish.checkpoints.native import CheckpointError
    from imglish.data.errors import DataError
    from imglish.data.images import ImageError
    from imglish.training.alarms import LossNotFinite
    from imglish.training.checkpoint import ResumeError
    from imglish.training.config import read_recipe
    from imglish.training.settings import SettingsError
    from imglish.training.stages import check_stages, is_pipeline, read_stages, train_stages
    from imglish.training.trainer import check, train

    try:
        if is_pipeline(arguments.recipe):
            stages = read_stages(arguments.recipe, arguments.overrides)
            if arguments.check:
                print("\n".join(check_stages(stages)))
                return 0
            for result in train_stages(stages):
                status = say(result)
                if status:
                    return status
            return 0
        recipe = read_recipe(arguments.recipe, arguments.overrides)
        if arguments.check:
            print(yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))
            print("\n".join(check(recipe)))
            return 0
        result = train(recipe)
    except (SettingsError, ResumeError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, LossNotFinite, ImageError, DataError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    return say(result)


def say(result: Result) -> int:
    """Tell how a run ended; returns the status."""
    if result.stopped is not None:
        where = result.output / "checkpoints"
        print(
            f"stopped by {result.stopped} after step {result.step}, checkpoint in {where}. "
            "The same command continues from there.",
            file=sys.stderr,
        )
        return STOPPED
    if result.events:  # only the first process keeps the log
        print(f"model: {result.model}\nlog: {result.output / 'log.jsonl'}\nreport: {result.output / 'report.html'}")
    return 0
