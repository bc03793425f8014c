"""`imglish finetune RECIPE.yaml [key=value ...]`"""

from __future__ import annotations

from collections.abc import Sequence

from imglish.cli.train import run

DESCRIPTION = """\
Fine-tune a model for a task by a recipe: `model.init` names what to start from (an exported model, a released
checkpoint, hf:OWNER/NAME), `task.name` the task, which may put a head on it.

  imglish finetune recipes/daquar-vqa.yaml model.init=runs/flickr8k-albef/model
  torchrun --nproc-per-node 8 -m imglish finetune recipes/vqav2-albef.yaml data.images=coco

Everything else is as in imglish train: the same command continues a run that was stopped.
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 finished, 1 the run failed, 2 wrong settings, 75 stopped and can be continued."""
    return run("imglish finetune", DESCRIPTION, argv)
