"""One training step of every small model of the family, on real pairs, in one process: time, work, memory.

    python -m benchmarks.family
    python -m benchmarks.family --recipes flickr8k-albef flickr8k-blip --batch 32 --repeats 9

A step is what training by the recipe repeats: forward and backward passes, clipping, optimiser, momentum teacher. The
batch is the first one of the recipe's data, decoded before the clock starts, so the time is that of the model alone.
FLOPs are those of the forward and backward passes (two a multiply-add); memory is what the step holds on top of
weights and moments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import arguments, machine, measure, megabytes, table
from imglish.data.errors import Errors
from imglish.data.loader import Position
from imglish.training.config import Recipe, read_recipe
from imglish.training.cost import flop_counter
from imglish.training.optim import build_optimiser, clip_gradients
from imglish.training.setup import make_teacher
from imglish.training.step import Stepper, StepSettings
from imglish.training.work import PairWork

RECIPES = Path(__file__).parents[1] / "recipes"
FAMILY = ("clip", "vsepp", "albef", "blip", "vilt", "coca", "vlmo", "beit3-contrastive")


def step_of(recipe: Recipe, device: str) -> tuple[Callable[[], None], int, float]:
    """A training step on one batch; how many parameters the model has; FLOPs a pair."""
    work = PairWork(recipe)
    model = work.new_model().to(device).train()
    teacher = make_teacher(model, work.materials)
    if teacher is not None:
        teacher.at(1.0)
    settings = StepSettings(recipe.batch.accumulate, recipe.seed, recipe.compute.precision == "bf16")
    stepper, optimiser = Stepper(model, teacher, settings), build_optimiser(model, recipe.optimiser)
    batch, _ = next(work.batches(Position(), 0, Errors()))

    def step() -> None:
        stepper(batch, 0)
        clip_gradients(model.parameters(), recipe.optimiser.clip_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if teacher is not None:
            teacher.update(model)

    with flop_counter() as counter:
        step()
    return step, sum(p.numel() for p in model.parameters()), counter.get_total_flops() / len(batch)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=[f"flickr8k-{name}" for name in FAMILY], help="of recipes/")
    parser.add_argument("--batch", type=int, default=64, help="pairs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipes = [read_recipe(RECIPES / f"{name}.yaml", [f"batch.size={options.batch}"]) for name in options.recipes]
    recipes = [replace(recipe, data=replace(recipe.data, cache=False)) for recipe in recipes]
    made = {str(recipe.model["name"]): step_of(recipe, options.device) for recipe in recipes}
    print(f"Steps of {options.batch} pairs, precision of the recipes; {machine(options.device)}\n")
    found = measure({name: step for name, (step, _, _) in made.items()}, options.repeats, options.device)
    rows = [
        [
            name,
            f"{parameters / 1e6:.1f} M",
            f"{1000 * found[name].seconds / options.batch:.1f} s",
            f"{options.batch / found[name].seconds:.0f}",
            f"{flops / 1e9:.2f}",
            f"{flops * options.batch / found[name].seconds / 1e9:.0f}",
            megabytes(found[name].peak),
        ]
        for name, (_, parameters, flops) in made.items()
    ]
    headers = ["model", "parameters", "for 1,000 pairs", "pairs/s", "GFLOP/pair", "GFLOP/s", "peak memory"]
    print(table(headers, rows))


if __name__ == "__main__":
    main()
