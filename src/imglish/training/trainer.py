"""A training run from a recipe to an exported model, read from top to bottom."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import nn

from imglish import atomic
from imglish.checkpoints.native import export, load_weights
from imglish.data.batch import Batch
from imglish.data.errors import FILE as ERRORS
from imglish.data.errors import Errors
from imglish.data.loader import Position
from imglish.data.records import Record
from imglish.models.heads import ASSIGNMENT
from imglish.objectives.gather import rank, world_size
from imglish.training.alarms import FiniteWatch, LearningWatch, LossNotFinite
from imglish.training.average import WeightAverage
from imglish.training.checkpoint import CheckpointFolder, SaveClock, require_same
from imglish.training.config import Plan, Recipe, plan
from imglish.training.cost import flop_counter, peak_memory
from imglish.training.finetuning import TaskWork
from imglish.training.interval import Interval
from imglish.training.journal import Journal
from imglish.training.optim import (
    build_optimiser,
    clip_gradients,
    learning_rate,
    load_optimiser_state,
    optimiser_state,
    set_learning_rate,
    train_only,
)
from imglish.training.ranks import Agreement, pick_device, process_group
from imglish.training.settings import SettingsError
from imglish.training.setup import Materials, compile_towers, make_teacher
from imglish.training.signals import Interrupted, StopSignal
from imglish.training.step import Stepper, StepSettings
from imglish.training.work import AssignmentWork, PairWork, Work

GRADIENT = "gradient norm"


@dataclass(frozen=True)
class Result:
    """step: steps done; output: folder of the run; model: folder of the exported model, None when the run was stopped
    before its end; best: step and findings of the best validation, empty without one; stopped: name of the signal that
    stopped the run; events: everything that was logged (on the first process); signal: name of a signal that came,
    perhaps too late to stop the run."""

    step: int
    output: Path
    model: Path | None
    best: dict[str, Any]
    stopped: str | None
    events: list[dict[str, Any]] = field(repr=False)
    signal: str | None = None


def train(
    recipe: Recipe, records: Sequence[Record] | None = None, validation: Sequence[Record] | None = None
) -> Result:
    """Train by ``recipe``, or continue where its output folder says that a run was stopped.

    records, validation: training and held-out pairs, in place of the files that the recipe names. Under ``torchrun``
    every process calls this. SIGTERM and SIGINT end the run after a step, with a checkpoint. Raises
    :class:`imglish.training.settings.SettingsError` before any work, :class:`imglish.training.alarms.LossNotFinite`,
    :class:`imglish.training.checkpoint.ResumeError` and :class:`imglish.checkpoints.native.CheckpointError`.
    """
    device = pick_device(recipe.compute.device)
    if recipe.compute.threads is not None:
        torch.set_num_threads(recipe.compute.threads)
    with process_group(device), StopSignal() as stop:
        run = Run(recipe, device, stop, records, validation)
        gc.collect()
        gc.freeze()  # records and weights stay to the end: the collector need not visit them during the run
        try:
            return run.go()
        finally:
            gc.unfreeze()
            run.close()


def check(recipe: Recipe) -> list[str]:
    """What ``recipe`` would do, in lines of text, without training: the data are read, the model is built."""
    _require_output(Path(recipe.output))
    work = work_of(recipe)
    found = plan(recipe, work.items, queue_size=_queue_size(recipe, work.materials.config))
    model = work.new_model()
    work.check(model)
    parameters = sum(p.numel() for p in model.parameters())
    words = work.materials.words
    tokens = "" if words is None else f", {words.vocab_size} tokens"
    return [
        f"{parameters / 1e6:.1f} M parameters{tokens}",
        work.told(),
        f"{found.steps} steps, {found.steps_per_epoch} an epoch, validation every {found.validate_every}",
        "the recipe can run",
    ]


def _require_output(folder: Path) -> None:
    try:
        atomic.require_writable(folder)
    except OSError as error:
        raise SettingsError("output", str(error)) from error


def _queue_size(recipe: Recipe, config: Any) -> int:
    """Of the momentum queue; 0 for models without a teacher, and for tasks, whose teacher has none."""
    return 0 if recipe.task.name is not None else int(getattr(getattr(config, "teacher", None), "queue_size", 0))


def work_of(
    recipe: Recipe,
    records: Sequence[Record] | None = None,
    validation: Sequence[Record] | None = None,
    resumed: dict[str, Any] | None = None,
    errors_file: Path | None = None,
) -> Work:
    """What the recipe trains on: a task with a head of its own, or pairs (see :func:`train`)."""
    if recipe.task.name is None:
        return PairWork(recipe, records, validation, resumed, errors_file)
    if recipe.task.name == ASSIGNMENT:
        return AssignmentWork(recipe, records, validation, resumed, errors_file)
    return TaskWork(recipe, resumed, errors_file)


class Run:
    """State of a run and what happens in it."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        stop: StopSignal,
        records: Sequence[Record] | None,
        validation: Sequence[Record] | None,
    ) -> None:
        self.recipe, self.device, self.stop = recipe, device, stop
        self._began = time.perf_counter()
        self.folder = Path(recipe.output)

        # ---- what was here before, and what there is to work with ----
        _require_output(self.folder)
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", recipe.checkpoint.keep)
        resumed = self.checkpoints.load(self._newest_step())
        errors_file = self.folder / (ERRORS if rank() == 0 else f"errors-{rank()}.csv")
        self.errors = Errors(recipe.data.source.max_errors, errors_file)
        first = errors_file if rank() == 0 else None  # all processes read the same data
        self.work: Work = work_of(recipe, records, validation, resumed, first)
        self.materials: Materials = self.work.materials
        self.digest = self.materials.digest
        if resumed is not None:
            require_same(resumed, recipe.to_dict(), self.digest, self.checkpoints.folder)
        queue = _queue_size(recipe, self.materials.config)
        self.plan: Plan = plan(recipe, self.work.items, world_size(), queue)

        # ---- model, teacher, average, optimiser ----
        self.model: nn.Module = self.work.new_model().to(device).train()
        if recipe.optimiser.only is not None:
            train_only(self.model, recipe.optimiser.only)
        self.work.check(self.model)
        self.teacher = make_teacher(self.model, self.materials)
        self.clamp: Callable[[], None] = getattr(self.model, "clamp_", lambda: None)  # temperatures, after each step
        self.average = None if recipe.average is None else WeightAverage(self.model, recipe.average)
        if recipe.compute.compile and not sum(map(compile_towers, self._networks())):
            raise SettingsError("compute.compile", "this model has no vision Transformer to compile; set it to false")
        self.position = Position()
        settings = StepSettings(recipe.batch.accumulate, recipe.seed, recipe.compute.precision == "bf16")
        probe = next(self._batches(workers=0))[0] if world_size() > 1 else None
        self.stepper = Stepper(self.model, self.teacher, settings, probe)
        self.optimiser = build_optimiser(self.model, recipe.optimiser)

        # ---- where the run stands ----
        self._held = ExitStack()
        if rank() == 0:  # two runs in one folder would write over each other's checkpoints
            try:
                self._held.enter_context(atomic.alone(self.folder))
            except BlockingIOError as error:
                raise SettingsError("output", f"another run works in {self.folder}; choose another folder") from error
        self.step = 0
        self.validated = 0
        self.saved: int | None = None
        self.best: dict[str, Any] = {}
        self.seconds = 0.0
        self.journal = Journal(self.folder, rank() == 0, recipe.log.tensorboard)
        if resumed is not None:
            self._restore(resumed)
        self.journal.rewind(self.step)
        self.resumed = resumed is not None

        # ---- what looks after it ----
        self.clock = SaveClock(recipe.checkpoint)
        self.agreement = Agreement()
        self.agreed_stop = self.agreed_save = False
        self.finite = FiniteWatch()
        patience = max(200, self.plan.steps // 10)
        raised = [event["kind"] for event in self.journal.events if event["event"] == "alarm"]
        self.learning = LearningWatch(recipe.schedule.warmup_steps, patience, raised)
        self.interval = Interval()

    # ---- the run ----------------------------------------------------------------------------------------------------

    def go(self) -> Result:
        """All remaining steps, then the exported model and the report."""
        self._announce()
        batches = self._batches(self.recipe.data.workers)
        self.interval = Interval()
        try:
            while True:
                self._validate_if_due()  # here also after a resume, when the run was stopped before it
                self._save_if_due()
                if self.step >= self.plan.steps or self.agreed_stop:
                    break
                self._train_step(batches)
                self._log_if_due()
        except LossNotFinite as error:
            self.journal.write("error", self.step, text=str(error))
            raise
        if self.step < self.plan.steps:
            return Result(self.step, self.folder, None, self.best, self.stop.came or "a signal", self.journal.events)
        exported = self.folder / "model"
        findings = self.work.finish(self._evaluated())
        if rank() == 0:
            from imglish.training.summary import write_report  # matplotlib takes half a second, so only at the end

            self._export(exported)
            if not any(event["event"] == "end" for event in self.journal.events):
                self.journal.write("end", self.step, seconds=self._elapsed(), best=self.best)
            write_report(self.folder, self.recipe, self.model, self.plan, self.journal.events, findings)
        return Result(self.step, self.folder, exported, self.best, None, self.journal.events, self.stop.came)

    def _train_step(self, batches: Iterator[tuple[Batch, Position]]) -> None:
        began = time.perf_counter()
        batch, self.position = next(batches)
        self.interval.waited += time.perf_counter() - began

        epoch = self.plan.epochs(self.step)
        if self.teacher is not None:
            self.teacher.at(epoch)
        lr = learning_rate(self.step, self.plan.steps, self.recipe.optimiser.lr, self.recipe.schedule)
        set_learning_rate(self.optimiser, lr)

        losses = self.stepper(batch, self.step) if self.step else self._first_step(batch)
        norm = clip_gradients(self.model.parameters(), self.recipe.optimiser.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.clamp()
        if self.teacher is not None:
            self.teacher.update(self.model)
        if self.average is not None:
            self.average.update(self.model)

        self.step += 1
        names = (*losses, GRADIENT)
        values = torch.stack([value.float() for value in (*losses.values(), norm)])
        self.interval.add(names, values, batch)
        self.finite.push(names, values, self.step, epoch, batch.keys)
        self.journal.advance(self.recipe.batch.size)
        due = rank() == 0 and self.clock.due_by_time()
        stop, save = self.agreement.say(int(self.stop.came is not None), int(due))
        self.agreed_stop, self.agreed_save = bool(stop), bool(save)

    def _first_step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses of the first batch, and a line with the FLOPs of its forward and backward passes."""
        if self.recipe.compute.compile:
            return self.stepper(batch, 0)
        with flop_counter() as counter:
            losses = self.stepper(batch, 0)
        self.journal.write("work", 1, flops_per_pair=counter.get_total_flops() / len(batch))
        return losses

    # ---- telling ----------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        if rank() == 0:
            text = yaml.safe_dump(self.recipe.to_dict(), sort_keys=False, allow_unicode=True)
            atomic.write_file(self.folder / "recipe.yaml", lambda file: file.write(text.encode()))
        parameters = sum(p.numel() for p in self.model.parameters())
        where = f"{world_size()} x {self.device.type}, {self.recipe.compute.precision}"
        name = self.recipe.model.get("name", self.recipe.model.get("init"))
        if self.resumed:
            self.journal.say(f"continuing {self.folder} at step {self.step} of {self.plan.steps}")
        else:
            self.journal.write("start", 0, model=str(name), parameters=parameters, pairs=self.work.items, where=where)
        self.journal.say(
            f"{name}: {parameters / 1e6:.1f} M parameters on {where}; {self.work.items} pairs, "
            f"{self.plan.steps} steps of {self.recipe.batch.size}, {self.plan.steps_per_epoch} an epoch"
        )
        if self.stepper.idle:
            self.journal.say(f"no loss reaches these parameters, they stay as they are: {', '.join(self.stepper.idle)}")
        size = self.recipe.batch.size
        self.journal.start_bar(self.plan.steps * size, self.step * size)

    def _log_if_due(self) -> None:
        """Means since the last line: the only place where the host waits for the device."""
        if self.step % self.recipe.log.every and self.step != self.plan.steps:
            return
        interval, self.interval = self.interval, Interval()
        means = interval.means()
        seconds = time.perf_counter() - interval.began
        metrics = {name.removeprefix("metric/"): means.pop(name) for name in list(means) if name.startswith("metric/")}
        norm = means.pop(GRADIENT)
        entry: dict[str, Any] = {
            "epoch": round(self.plan.epochs(self.step), 4),
            "lr": self.optimiser.param_groups[0]["lr"],
            "losses": means,
            "metrics": metrics,
            "gradient_norm": norm,
            "pairs_per_second": interval.steps * self.recipe.batch.size / seconds,
            "waiting_for_data": interval.waited / seconds,
            "seconds": self._elapsed(),
        }
        if len(self.errors):
            entry["unreadable"] = dict(self.errors.counts)
        entry["memory_gib"] = peak_memory(self.device)
        self.journal.write("step", self.step, **entry)
        self.journal.show(means)
        pairs = getattr(self.model, "itm_pairs", (1, 2))  # matching and other ones a picture: ALBEF's, or its own
        chance = interval.chance(self.recipe.batch.size, self.teacher, pairs)
        for alarm in self.learning.look(self.step, means, chance, metrics):
            self.journal.write("alarm", self.step, kind=alarm.kind, text=alarm.text)
            self.journal.say(f"ALARM at step {self.step}: {alarm.text}")

    # ---- validating and saving --------------------------------------------------------------------------------------

    def _validate_if_due(self) -> None:
        due = self.plan.validates(self.step) and self.validated != self.step and not self.agreed_stop
        if not self.work.validates or not due:
            return
        began = time.perf_counter()
        try:
            with self.stop.breakable(world_size() == 1):
                found = self.work.validate(self._evaluated(), self.teacher, self.errors)
        except Interrupted:
            self.agreed_stop = True
            return
        self.validated = self.step
        entry = {**found.entry, **found.beside}
        self.journal.write("validation", self.step, epoch=self.plan.epochs(self.step), **entry)
        better = found.better(self.best)
        self.journal.say(f"step {self.step}: {found.text}{', the best so far' * better}")
        if better:
            self.best = found.as_best(self.step)
            if rank() == 0:
                self._export(self.folder / "best")
        self.interval.began += time.perf_counter() - began  # rates speak of training alone

    def _save_if_due(self) -> None:
        ends = self.step in (0, self.plan.steps) or self.agreed_stop or self.agreed_save
        if self.saved == self.step or not (ends or self.clock.due_by_steps(self.step)):
            return
        self.finite.check()  # nothing is saved that came after a loss which is not finite
        began = time.perf_counter()
        if rank() == 0:
            self.checkpoints.save(self.step, self._state())
        self.saved = self.step
        self.clock.saved()
        self.interval.began += time.perf_counter() - began

    def _state(self) -> dict[str, Any]:
        return {
            "position": [self.position.epoch, self.position.sample],
            "model": self.model.state_dict(),
            "optimiser": optimiser_state(self.model, self.optimiser),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "best": self.best,
            "validated": self.validated,
            "seconds": self._elapsed(),
            "recipe": self.recipe.to_dict(),
            "data": self.digest,
            "tokenizer": None if self.materials.words is None else self.materials.words.inner.to_str(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = self.saved = state["step"]
        self.position = Position(*state["position"])
        load_weights(self.model, state["model"], f"the checkpoint of step {self.step}")
        load_optimiser_state(self.model, self.optimiser, state["optimiser"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.best, self.validated, self.seconds = state["best"], state["validated"], state["seconds"]

    def _newest_step(self) -> int | None:
        """The checkpoint that the first process sees, so that all of them continue from the same one."""
        steps = self.checkpoints.steps()
        newest = torch.tensor(steps[-1] if steps else -1)
        if world_size() > 1:
            dist.broadcast(newest, src=0)
        return int(newest) if int(newest) >= 0 else None

    # ---- small things -----------------------------------------------------------------------------------------------

    def _batches(self, workers: int) -> Iterator[tuple[Any, Position]]:
        return self.work.batches(self.position, workers, self.errors)

    def _networks(self) -> list[nn.Module]:
        """The model and its copies."""
        copies = (getattr(companion, "model", None) for companion in (self.teacher, self.average))
        return [self.model, *(copy for copy in copies if copy is not None)]

    def _evaluated(self) -> nn.Module:
        return self.model if self.average is None else self.average.model

    def _export(self, path: Path) -> None:
        materials = self.materials
        export(path, self._evaluated(), materials.words, self._provenance(), materials.score_rule)

    def _provenance(self) -> dict[str, Any]:
        recipe = self.recipe.to_dict()
        return {"step": self.step, "epochs": self.plan.epochs(self.step), "recipe": recipe, "best": self.best}

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._began

    def close(self) -> None:
        """Release bar and folder, and wait for messages under way between processes."""
        self.journal.close()
        self.agreement.finish()
        self._held.close()
