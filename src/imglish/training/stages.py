"""Several trainings one after the other, each beginning with the model of an earlier one, as one recipe.

    output: runs/flickr8k-vlmo-staged
    shared: {batch: {size: 64}}                       # what all stages have, as far as they do not say otherwise
    stages:
      images: {model: {name: beit-small}, ...}        # every stage is a recipe of its own
      texts: {model: {name: vlmo-small, start: images}, ...}
      pairs: {model: {name: vlmo-small, start: texts}, ...}

``model.start``, ``model.init`` and ``targets`` may name an earlier stage, whose model is then meant. A stage that is
null is left out (``stages.images=null stages.texts.model.start=runs/beit/model``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from imglish.checkpoints.native import is_export
from imglish.objectives.gather import rank, world_size
from imglish.training.config import Recipe, recipe_from
from imglish.training.ranks import pick_device, process_group
from imglish.training.settings import SettingsError, read_mapping
from imglish.training.trainer import Result, check, train

KEYS = {"output", "shared", "stages"}
ELSEWHERE = ("caption", "score", "filter")  # what a stage of `imglish bootstrap` says that is no training
REFERENCES = (("model", "start"), ("model", "init"), ("targets",))


@dataclass(frozen=True)
class Stage:
    """name: as other stages refer to it; recipe: complete, in a folder of its own below the pipeline's output; needs:
    names of the stages whose models it uses."""

    name: str
    recipe: Recipe
    needs: tuple[str, ...]

    @property
    def model(self) -> Path:
        """Folder of the model that the stage gives."""
        return Path(self.recipe.output) / "model"

    def finished(self) -> bool:
        """Whether the stage has run to its end by these very settings; SettingsError where it did so by others."""
        if not is_export(self.model):
            return False
        done = yaml.safe_load((self.model.parent / "recipe.yaml").read_text(encoding="utf-8"))
        wanted = yaml.safe_load(yaml.safe_dump(self.recipe.to_dict()))
        if done != wanted:
            changed = sorted(key for key in {*done, *wanted} if done.get(key) != wanted.get(key))
            raise SettingsError(
                f"stages.{self.name}",
                f"{self.model.parent} holds this stage, finished with other settings of {', '.join(changed)}; "
                "remove the folder to train it anew, with all stages behind it, or choose another output",
            )
        return True


def is_pipeline(path: str | Path) -> bool:
    """Whether a YAML file is a recipe of stages."""
    return "stages" in read_mapping(Path(path))


def read_stages(path: str | Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of a recipe file, with ``key=value`` overrides (``shared.batch.size=32``, ``stages.pairs.seed=1``)."""
    return stages_from(read_mapping(Path(path), overrides))


def stages_from(data: Mapping[str, Any]) -> list[Stage]:
    """Stages from nested mappings (YAML); mistakes raise :class:`SettingsError` naming the key and the fix."""
    frame = frame_of(data)
    found: list[Stage] = []
    for name in frame.stages:
        found.append(frame.stage(name, {stage.name: stage for stage in found}))
    return found


@dataclass(frozen=True)
class Frame:
    """A recipe of stages as it was read. stages: settings by name, without those that are left out; names: all names;
    shared: settings of all trainings; output: folder of the whole."""

    stages: dict[str, dict[str, Any]]
    names: Mapping[str, Any]
    shared: Mapping[str, Any]
    output: Path

    def folder(self, name: str) -> Path:
        return self.output / f"{list(self.stages).index(name) + 1}-{name}"

    def stage(self, name: str, earlier: Mapping[str, Stage]) -> Stage:
        """The training called ``name``, which may use the models of ``earlier`` ones."""
        for job in ELSEWHERE:
            if job in self.stages[name]:
                raise SettingsError(f"stages.{name}.{job}", "is no training; `imglish bootstrap` runs such recipes")
        merged = _merged(self.shared, self.stages[name]) | {"output": str(self.folder(name))}
        try:
            needs = _resolve(merged, earlier, self.names)
            return Stage(name, recipe_from(merged), needs)
        except SettingsError as error:
            raise SettingsError(f"stages.{name}.{error.key}", str(error).removeprefix(f"{error.key}: ")) from error


def frame_of(data: Mapping[str, Any]) -> Frame:
    """What a recipe of stages holds, before the stages are read. Raises :class:`SettingsError`."""
    if unknown := sorted(set(data) - KEYS):
        raise SettingsError(unknown[0], f"a recipe of stages has {', '.join(sorted(KEYS))}; settings belong into those")
    stages, shared, output = data.get("stages"), data.get("shared") or {}, data.get("output")
    if not isinstance(stages, Mapping) or not any(settings is not None for settings in stages.values()):
        raise SettingsError("stages", "name at least one stage: stages: {pairs: {model: ...}}")
    if not isinstance(output, str):
        raise SettingsError("output", "a folder is needed, each stage gets one in it")
    if not isinstance(shared, Mapping):
        raise SettingsError("shared", f"{shared!r} is not a group of settings")
    wanted: dict[str, dict[str, Any]] = {}
    for name, settings in stages.items():
        if settings is not None and not isinstance(settings, Mapping):
            raise SettingsError(f"stages.{name}", f"{settings!r} is not a group of settings")
        if {"output"} & (set(settings or {}) | set(shared)):
            raise SettingsError(f"stages.{name}.output", "every stage has its folder in the output of the whole recipe")
        if settings is not None:
            wanted[str(name)] = dict(settings)
    return Frame(wanted, stages, shared, Path(output))


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, group by group."""
    made = copy.deepcopy(dict(base))
    for key, value in over.items():
        inner = made.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        made[key] = _merged(inner, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return made


def _resolve(settings: dict[str, Any], earlier: Mapping[str, Stage], names: Mapping[str, Any]) -> tuple[str, ...]:
    """Put folders of models in place of the names of earlier stages; returns these names."""
    needs = []
    for *groups, last in REFERENCES:
        place: Any = settings
        for group in groups:
            place = place.get(group, {}) if isinstance(place, dict) else {}
        name = place.get(last) if isinstance(place, dict) else None
        if isinstance(name, str) and name in earlier:
            place[last] = str(earlier[name].model)
            needs.append(name)
        elif isinstance(name, str) and name in names:
            why = "does not come before this one" if names[name] is not None else "is left out: give a model's folder"
            raise SettingsError(".".join([*groups, last]), f"the stage {name!r} {why}")
    return tuple(needs)


def train_stages(stages: Sequence[Stage]) -> Iterator[Result]:
    """Train all stages that are not finished yet, in order; gives the result of each as it ends.

    A signal stops the stage that runs, with a checkpoint, and the stages behind it: the last result then says
    ``stopped``, and the same call continues. Under ``torchrun`` every process calls this.
    """
    with process_group(pick_device(stages[0].recipe.compute.device)):
        for number, stage in enumerate(stages, 1):
            finished = stage.finished()
            announce(number, len(stages), stage.name, "finished before" if finished else f"in {stage.recipe.output}")
            if finished:
                continue
            yield (result := train_stage(stage, last=number == len(stages)))
            if result.stopped is not None:
                return


def announce(number: int, count: int, name: str, state: str) -> None:
    """Say which stage it is, once all processes have looked what its folder holds and before any changes it."""
    if world_size() > 1:
        dist.barrier()
    if rank() == 0:
        print(f"stage {number} of {count}, {name}: {state}", flush=True)


def train_stage(stage: Stage, last: bool) -> Result:
    """Train one stage. A signal that came too late to stop it counts as ``stopped`` where others come behind it."""
    result = train(stage.recipe)
    late = torch.tensor(result.signal is not None, dtype=torch.int64)
    if world_size() > 1:  # after this the first process has exported what the next stage begins with, too
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
    if late and not last:
        result = replace(result, stopped=result.stopped or result.signal or "a signal")
    return result


def check_stages(stages: Sequence[Stage]) -> list[str]:
    """What the stages would do, in lines of text. Data and models are read where they are there already: a stage that
    begins with one that has not been trained is checked for its settings only."""
    lines = []
    trained = {stage.name: is_export(stage.model) for stage in stages}
    for stage in stages:
        lines.append(f"{stage.name}:")
        if missing := [name for name in stage.needs if not trained[name]]:
            lines.append(f"  settings are valid; the rest can be checked when {' and '.join(missing)} is trained")
        else:
            lines += [f"  {line}" for line in check(stage.recipe)]
    return lines
