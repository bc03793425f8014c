"""AdamW with proper groups, the learning rate of a step, and gradient clipping without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from imglish.models.depths import depths
from imglish.models.heads import TaskModel
from imglish.nn.relative import RelativeBias
from imglish.training.config import OptimiserRecipe, ScheduleRecipe
from imglish.training.settings import SettingsError


def train_only(model: nn.Module, patterns: Sequence[str]) -> int:
    """Freeze every parameter whose name fits none of ``patterns`` (``blocks.*.ffn.text.*``); returns how many numbers
    are still trained. A pattern that fits no parameter is an error."""
    named = dict(model.named_parameters())
    if idle := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in named)]:
        raise SettingsError(
            "optimiser.only", f"no parameter is called {idle[0]!r}; there is, for example, {min(named)}"
        )
    for name, parameter in named.items():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
    return sum(p.numel() for p in named.values() if p.requires_grad)


def parameter_groups(model: nn.Module, recipe: OptimiserRecipe) -> list[dict[str, object]]:
    """Trainable parameters in three groups: with weight decay, without, and temperatures.

    Without: biases, those by relative position too, norms and everything else of at most one dimension (class tokens
    stored flat, LayerScale); embedding tables and position tables too unless ``decay_embeddings``. Temperatures (0-D)
    are not decayed and have a rate of their own. A shared parameter appears once. ``scale``: factor of the group's
    learning rate; with ``layer_decay`` the groups are divided further, by layer.
    """
    tables = {
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if isinstance(module, nn.Embedding)
    }
    biases = {id(module.table) for module in model.modules() if isinstance(module, RelativeBias)}
    rates = layer_rates(model, recipe.layer_decay) if recipe.layer_decay is not None else {}
    if recipe.head_factor != 1.0:
        if not isinstance(model, TaskModel):
            raise SettingsError("optimiser.head_factor", "only the head of a task has a rate of its own; leave it out")
        rates |= dict.fromkeys(model.head_parameters(), recipe.head_factor)
    temperature = (recipe.temperature_lr or recipe.lr) / recipe.lr
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}  # of (place in this docstring's order, scale)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() == 0:
            groups.setdefault((2, temperature), []).append(parameter)
            continue
        table = id(parameter) in tables or "position" in name.rpartition(".")[2]
        flat = parameter.dim() < 2 or parameter.numel() == max(parameter.shape)
        keep = flat or id(parameter) in biases or (table and not recipe.decay_embeddings)
        groups.setdefault((int(keep), rates.get(name, 1.0)), []).append(parameter)
    decays = (recipe.weight_decay, 0.0, 0.0)
    return [
        {"params": those, "weight_decay": decays[place], "scale": scale}
        for (place, scale), those in sorted(groups.items(), key=lambda group: group[0])
    ]


def layer_rates(model: nn.Module, decay: float) -> dict[str, float]:
    """Factor of the learning rate for each parameter by its layer: heads and final norms 1, the last layer ``decay``,
    the one below it its square, and so on; embeddings lie below the first layer (:func:`imglish.models.depths.depths`).
    Towers count from their own tops. A model without layers raises :class:`SettingsError`.
    """
    levels = depths(model)
    if not any(levels.values()):
        raise SettingsError("optimiser.layer_decay", "this model has no stack of layers; leave the setting out")
    return {name: decay**level for name, level in levels.items()}


def build_optimiser(model: nn.Module, recipe: OptimiserRecipe) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`, fused: one kernel on CUDA, and three to six times faster on CPUs too."""
    groups = parameter_groups(model, recipe)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


def optimiser_state(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Moments and step counts by parameter name, so that they do not depend on the order or number of groups."""
    return {name: dict(optimiser.state[p]) for name, p in model.named_parameters() if p in optimiser.state}


def load_optimiser_state(
    model: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]]
) -> None:
    """Put back what :func:`optimiser_state` gave; a parameter that the model does not have is an error."""
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(state) - set(parameters)):
        raise ValueError(f"the optimiser state names parameters that the model does not have: {unknown[:5]}")
    for name, entries in state.items():
        device = parameters[name].device
        optimiser.state[parameters[name]] = {key: value.to(device, copy=True) for key, value in entries.items()}


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleRecipe) -> float:
    """Of step number ``step`` (from 0) in a run of ``steps``: linear warm-up that has left ``lr_start`` in the first
    step, then half a cosine or a line that ends at ``lr_min`` in the last one."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return schedule.lr_start + (peak - schedule.lr_start) * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    left = 1 - progress if schedule.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.lr_min + (peak - schedule.lr_min) * left


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every group ``lr`` times its own scale."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["scale"]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """The gradient's norm, 0-D on the device; if it is above ``max_norm`` all gradients are scaled down to it."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise RuntimeError("no parameter received a gradient: is every objective of the model switched off?")
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
