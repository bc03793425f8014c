"""A run in a process of its own: `python -m tests.training.runner OUTPUT FAMILY STEPS`."""

from __future__ import annotations

import sys

from imglish.training.config import Recipe
from imglish.training.trainer import train
from tests.training.support import recipe, records


def main(output: str, family: str, steps: str) -> int:
    result = train(long_recipe(output, family, int(steps)), records())
    return 75 if result.stopped else 0


def long_recipe(output: str, family: str, steps: int) -> Recipe:
    return recipe(
        output,
        family,
        schedule={"steps": steps, "warmup_steps": 5},
        checkpoint={"every_steps": 3, "keep": 2},
        average=0.99,
        log={"every": 1},
    )


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
