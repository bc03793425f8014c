"""BLIP's whole loop as one recipe: train on noisy pairs, fine-tune captioner and filter on a small clean set, caption,
score and filter, and train again from scratch on what is kept (Li et al. 2022, section 3.3).

    output: runs/scenes-bootstrap
    shared: {...}                                     # of all trainings
    stages:
      noisy:     {model: {name: blip-tiny}, data: {train: web.jsonl}, ...}
      captioner: {model: {init: noisy, itc: false, itm: false}, data: {train: clean.jsonl}, ...}
      filter:    {model: {init: noisy, lm: false}, data: {train: clean.jsonl}, ...}
      captions:  {caption: {model: captioner, data: {path: web.jsonl}}}
      scores:    {score: {model: filter, of: captions}}
      kept:      {filter: {of: scores, rules: {min_itm: 0.5}, beside: [{path: clean.jsonl}]}}
      again:     {model: {name: blip-tiny}, data: {train: kept}, ...}

A stage is a training (:mod:`imglish.training.stages`) or, where it says ``caption``, ``score`` or ``filter``, a job
(:mod:`imglish.bootstrapping.jobs`). Names of earlier stages stand for what these made. Stopped anywhere, the same call
goes on there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from imglish.bootstrapping.jobs import JOBS, CaptionJob, FilterJob, Job, ScoreJob
from imglish.bootstrapping.keeping import SOURCE
from imglish.bootstrapping.stage import STAGE
from imglish.data.errors import DataError
from imglish.data.sources.config import SourceConfig
from imglish.objectives.gather import rank, world_size
from imglish.training.config import ComputeRecipe
from imglish.training.ranks import pick_device, process_group
from imglish.training.settings import SettingsError, fill, read_mapping
from imglish.training.stages import Frame, announce, frame_of, train_stage
from imglish.training.stages import Stage as Training
from imglish.training.trainer import Result, check

FROM_KEPT = ("images", "split", "source")  # settings of data that a keep-list says by itself


@dataclass(frozen=True)
class JobStage:
    """A job of a loop with its folder; needs: names of the stages whose results it uses."""

    name: str
    job: Job
    out: Path
    needs: tuple[str, ...]

    @property
    def made(self) -> Path:
        """What other stages use of it."""
        return self.out / SOURCE if isinstance(self.job, FilterJob) else self.out

    def begun(self) -> bool:
        return (self.made if isinstance(self.job, FilterJob) else self.out / STAGE).exists()


Step = Training | JobStage


def read_loop(path: str | Path, overrides: Sequence[str] = ()) -> list[Step]:
    """The stages of a recipe file, with ``key=value`` overrides (``stages.kept.filter.rules.min_itm=0.7``)."""
    return loop_from(read_mapping(Path(path), overrides))


def loop_from(data: Mapping[str, Any]) -> list[Step]:
    """Stages from nested mappings (YAML); mistakes raise :class:`SettingsError` naming the key and the fix."""
    frame = frame_of(data)
    steps: dict[str, Step] = {}
    for name, settings in frame.stages.items():
        kinds = [kind for kind in JOBS if kind in settings]
        steps[name] = _job(frame, name, kinds[0], steps) if kinds else _training(frame, name, steps)
    return list(steps.values())


def _training(frame: Frame, name: str, earlier: Mapping[str, Step]) -> Training:
    trainings = {key: step for key, step in earlier.items() if isinstance(step, Training)}
    data = frame.stages[name].get("data")
    wanted = data.get("train") if isinstance(data, Mapping) else None
    if wanted is None:
        wanted = (frame.shared.get("data") or {}).get("train")
    if wanted not in frame.names:
        return frame.stage(name, trainings)
    key = f"stages.{name}.data"
    kept = _earlier(frame, str(wanted), earlier, f"{key}.train")
    if not (isinstance(kept, JobStage) and isinstance(kept.job, FilterJob)):
        raise SettingsError(f"{key}.train", f"the stage {wanted!r} does not filter, so there is nothing to train on")
    own = dict(data or {})
    if given := sorted(set(own) & set(FROM_KEPT)):
        raise SettingsError(f"{key}.{given[0]}", f"what {wanted!r} keeps says this by itself; leave it out")
    common = {name: value for name, value in (frame.shared.get("data") or {}).items() if name not in FROM_KEPT}
    frame = replace(
        frame,
        shared={**frame.shared, "data": common},
        stages={**frame.stages, name: {**frame.stages[name], "data": {**own, "train": str(kept.made)}}},
    )
    made = frame.stage(name, trainings)
    return replace(made, needs=(*made.needs, kept.name))


def _job(frame: Frame, name: str, kind: str, earlier: Mapping[str, Step]) -> JobStage:
    key, settings = f"stages.{name}", frame.stages[name]
    if others := sorted(set(settings) - {kind}):
        raise SettingsError(f"{key}.{others[0]}", f"a stage that says {kind!r} says nothing beside it")
    if not isinstance(settings[kind], Mapping):
        raise SettingsError(f"{key}.{kind}", f"{settings[kind]!r} is not a group of settings")
    data = dict(settings[kind])
    needs = []
    for group, wanted in (("model", Training), ("ranker", Training), ("of", JobStage)):
        used = data.get(group)
        if not isinstance(used, str) or (group != "of" and used not in frame.names):
            continue  # a model of its own
        step = _earlier(frame, used, earlier, f"{key}.{kind}.{group}")
        if not isinstance(step, wanted):
            raise SettingsError(f"{key}.{kind}.{group}", f"{used!r} is not the kind of stage that is needed here")
        data[group] = str(step.model if isinstance(step, Training) else step.made)
        needs.append(step.name)
    try:
        base: Any = JOBS[kind]()
        if isinstance(data.get("data"), Mapping) and isinstance(base, ScoreJob):
            base = replace(base, data=SourceConfig(path=""))
        job: Job = fill(base, data, f"{key}.{kind}")
    except DataError as error:
        raise SettingsError(f"{key}.{kind}", str(error)) from error
    _complete(job, f"{key}.{kind}", {step: made for step, made in earlier.items() if step in needs})
    return JobStage(name, job, frame.folder(name), tuple(needs))


def _complete(job: Job, key: str, needs: Mapping[str, Step]) -> None:
    """Whether a job has all that it needs, of the right kind."""
    if not isinstance(job, FilterJob) and not job.model:
        raise SettingsError(f"{key}.model", "name a stage that trains one, or the folder of a model")
    if isinstance(job, CaptionJob) and not job.data.path:
        raise SettingsError(f"{key}.data", "give the pictures: data: {path: ...}")
    if isinstance(job, ScoreJob) and (job.of is None) == (job.data is None or not job.data.path):
        raise SettingsError(
            f"{key}.of", "give either a stage that writes captions (of) or a source (data: {path: ...})"
        )
    if isinstance(job, FilterJob) and not job.of:
        raise SettingsError(f"{key}.of", "name the stage that scores")
    before: Any = {CaptionJob: None, ScoreJob: CaptionJob, FilterJob: ScoreJob}[type(job)]
    for name, step in needs.items():
        if isinstance(step, JobStage) and not isinstance(step.job, before):
            raise SettingsError(f"{key}.of", f"the stage {name!r} does not {_DOES[before]}")


_DOES = {CaptionJob: "write captions", ScoreJob: "score"}


def _earlier(frame: Frame, name: str, earlier: Mapping[str, Step], key: str) -> Step:
    if name not in earlier:
        why = "does not come before this one" if frame.names.get(name) is not None else "is not in this recipe"
        raise SettingsError(key, f"the stage {name!r} {why}")
    return earlier[name]


def run_loop(steps: Sequence[Step]) -> Iterator[Result]:
    """Do all that is not done yet, in order; gives the result of each training as it ends.

    Captioning and scoring use the device of the first training. A signal stops a training with a checkpoint: the last
    result then says ``stopped``, and the same call continues. Jobs go on with the shards that are missing. Under
    ``torchrun`` every process calls this. A stage that was finished before while one that it needs was not is refused:
    it was made from something else. Raises what the stages raise.
    """
    compute = next((step.recipe.compute for step in steps if isinstance(step, Training)), ComputeRecipe())
    chosen = pick_device(compute.device)
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    fresh: set[str] = set()
    with process_group(chosen):
        for number, step in enumerate(steps, 1):
            old = step.finished() if isinstance(step, Training) else step.begun()
            if old and (changed := sorted(fresh & set(step.needs))):
                folder = step.recipe.output if isinstance(step, Training) else step.out
                raise SettingsError(
                    f"stages.{step.name}",
                    f"{folder} was made before {' and '.join(changed)}; remove the folder to make it anew",
                )
            if isinstance(step, Training):
                announce(number, len(steps), step.name, "finished before" if old else f"in {step.recipe.output}")
                if not old:
                    fresh.add(step.name)
                    yield (result := train_stage(step, last=number == len(steps)))
                    if result.stopped is not None:
                        return
                continue
            announce(number, len(steps), step.name, f"in {step.out}")
            if not old:
                fresh.add(step.name)
            said = step.job.run(step.out, chosen)
            if world_size() > 1:
                dist.barrier()  # what the first process wrote alone is there for all
            if rank() == 0:
                print(said or "finished before", flush=True)


def check_loop(steps: Sequence[Step]) -> list[str]:
    """What the stages would do, in lines of text. Trainings whose data and models are there are checked as a whole."""
    lines = []
    there = {step.name: step.finished() if isinstance(step, Training) else step.begun() for step in steps}
    for step in steps:
        missing = [name for name in step.needs if not there[name]]
        lines.append(f"{step.name}:")
        if missing:
            lines.append(f"  settings are valid; the rest can be checked when {' and '.join(missing)} is there")
        elif isinstance(step, Training):
            lines += [f"  {line}" for line in check(step.recipe)]
        else:
            lines.append("  settings are valid")
    return lines
