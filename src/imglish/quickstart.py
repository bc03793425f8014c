"""The quickstart: train a small ALBEF on drawn scenes, ask it who wears what, and write one report.

The question is what the fusion tower adds to the towers. So three things are measured on the same pictures: the towers
of ALBEF, its fusion tower, and a rival: the same towers with the same data, pairs and known wrong captions, trained by
contrast alone (the wrong captions are negatives of its contrast, as they are negatives of ALBEF's matching).
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from imglish.api import Model
from imglish.checkpoints import native
from imglish.data.images import ImageTransform, decode
from imglish.data.loader import training_batches
from imglish.data.records import Record
from imglish.data.scenes import SceneBenchmark, SceneConfig, SceneSource, Split
from imglish.evaluation.binding import BindingResult, Quadruple, evaluate_binding
from imglish.evaluation.encoding import Machine, picture_loader
from imglish.evaluation.retrieval import RetrievalConfig, RetrievalResult, evaluate_retrieval
from imglish.quickstart_report import MEASURED, write
from imglish.training.checkpoint import ResumeError
from imglish.training.config import Recipe, recipe_from
from imglish.training.journal import LOG, read_events
from imglish.training.setup import gather_materials, new_model, pair_dataset
from imglish.training.step import Stepper, StepSettings
from imglish.training.trainer import Result, train

SPLITS: tuple[Split, ...] = ("seen", "heldout")
RERANK = 32
MAIN, RIVAL = "main", "rival"
OUTPUT = "rival.txt"  # of the rival's process
STOPPED = 75  # its status when a signal stopped it


# What learns within minutes. A joint embedding of 8 dimensions is what makes the towers' question hard. 2,400 steps are
# too few for a slow teacher with a queue (the contrast oscillates), and for matching on hard negatives alone (it stays
# at the entropy of its classes): a fifth of the drawn negatives is hard, and every picture has its known wrong caption.
# From positions as small as the published models' start with, colours are learned long before places.
SMALL: dict[str, Any] = {
    "embed_dim": 8,
    "max_length": 72,
    "heads": 2,
    "vision": {"patch": 12, "heads": 2},
    "teacher": {"queue_size": 0, "momentum": 0.95},
    "hard_negatives": 0.2,
    "embedding_std": 0.2,
}


@dataclass(frozen=True)
class QuickstartConfig:
    """steps: of each training; minutes: in place of steps, as many as fit into this time for both trainings on this
    machine; batch: pairs a step; model: settings of the configuration ``albef-tiny``; threads: of each training (a
    second one does not make matrices of this size faster); together: train both at the same time, in two processes
    (None: where there are two cores)."""

    out: Path = Path("quickstart-out")
    seed: int = 0
    steps: int = 2400
    minutes: float | None = None
    batch: int = 32
    lr: float = 2e-3
    threads: int = 1
    together: bool | None = None
    scenes: SceneConfig = field(default_factory=lambda: SceneConfig(omission=0.65, small_objects=0.1, pairs=120))
    model: dict[str, Any] = field(default_factory=lambda: dict(SMALL))
    progress: bool = True

    def __post_init__(self) -> None:
        if self.steps < 10:
            raise ValueError(f"steps is {self.steps}: fewer than 10 train nothing")
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}: it has to be at least 1")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes is {self.minutes}: it has to be above 0")

    @staticmethod
    def tiny(out: Path, seed: int = 0) -> QuickstartConfig:
        """Seconds, for tests of the machinery: it learns next to nothing."""
        scenes = SceneConfig(scenes=200, pairs=4, omission=0.5, small_objects=0.3)
        return QuickstartConfig(out, seed, steps=12, batch=16, together=False, scenes=scenes, progress=False)

    @property
    def at_once(self) -> bool:
        return self.together if self.together is not None else len(os.sched_getaffinity(0)) > 1

    def recipe(self, name: str, steps: int) -> Recipe:
        """Of the training ``name``: ``main``, ALBEF with all its objectives, or ``rival``, its towers by contrast."""
        model: dict[str, Any] = {"name": "albef-tiny", **self.model}
        if name == RIVAL:
            model |= {"itm": False, "mlm": False, "itc_swapped": True}
        return recipe_from(
            {
                "model": model,
                "output": str(self.out / name),
                "seed": self.seed,
                "data": {"crop": None, "flip": False, "cache": True, "workers": 1, "swapped": True, "masking": 0.3},
                "tokenizer": {"vocab_size": 400},
                "batch": {"size": self.batch},
                "optimiser": {"lr": self.lr, "temperature_lr": 1e-4, "weight_decay": 0.02},
                "schedule": {"steps": steps, "warmup_steps": min(50, steps // 4)},
                "compute": {"device": "cpu", "threads": self.threads},
                "checkpoint": {"every_minutes": 1.0, "every_steps": None, "keep": 1},
                "log": {"every": max(1, steps // 100)},
            }
        )


@dataclass(frozen=True)
class Measured:
    """What one model came to on one split: quadruples by towers and by fusion, retrieval among all pictures."""

    binding: BindingResult
    retrieval: RetrievalResult


@dataclass(frozen=True)
class Searched:
    """A query and what each ranking put first: numbers of pictures, best first, and which of them fit."""

    text: str
    language: str
    split: Split
    relevant: frozenset[int]
    found: dict[str, list[int]]


@dataclass(frozen=True)
class Outcome:
    """Everything that the report shows. measured: by training and split; searched: all queries; seconds: by part (both
    trainings may have run at the same time), and ``in all``."""

    config: QuickstartConfig
    benchmarks: dict[Split, SceneBenchmark]
    runs: dict[str, Result]
    measured: dict[tuple[str, Split], Measured]
    searched: list[Searched]
    seconds: dict[str, float]
    parameters: int
    report: Path


def run(config: QuickstartConfig) -> Outcome:
    """Draw, train twice, measure, write ``report.html`` and ``measured.json`` to ``config.out``.

    A quickstart that was stopped continues where it was; a finished one starts anew.
    """
    began = time.perf_counter()
    torch.set_num_threads(config.threads)
    _clear_finished(config.out)
    source = SceneSource(config.scenes)
    records = source.training()
    benchmarks = {split: source.evaluation(split) for split in SPLITS}
    steps = config.steps if config.minutes is None else affordable_steps(config, records)
    seconds = {"drawing": time.perf_counter() - began}

    runs = _train_both(config, steps, records)
    seconds |= {f"training {name}": run.events[-1]["seconds"] for name, run in runs.items()}

    started = time.perf_counter()
    models = {name: Model(native.load(config.out / name / "model"), "cpu") for name in runs}
    measured = {
        (name, split): _measure(model, benchmark, config.progress)
        for name, model in models.items()
        for split, benchmark in benchmarks.items()
    }
    searched = [found for split in SPLITS for found in _search(models, benchmarks[split], split)]
    seconds |= {"measuring": time.perf_counter() - started, "in all": time.perf_counter() - began}

    parameters = sum(p.numel() for p in models[MAIN].network.parameters())
    outcome = Outcome(config, benchmarks, runs, measured, searched, seconds, parameters, config.out / "report.html")
    write(outcome)
    return outcome


class Stopped(RuntimeError):  # noqa: N818 (it is no error)
    """The quickstart was interrupted by a signal and can be continued."""


class TrainingFailed(RuntimeError):  # noqa: N818 (it says what happened)
    """The rival's process ended with an error; the message names its output."""


def _train_both(config: QuickstartConfig, steps: int, records: Sequence[Record]) -> dict[str, Result]:
    """Both trainings, at the same time where the config says so; raises :class:`Stopped` after a signal."""
    rival = None
    if config.at_once:
        rival = multiprocessing.get_context("spawn").Process(target=_train_rival, args=(config, steps))
        rival.start()
    try:
        runs = {MAIN: _train(config.recipe(MAIN, steps), records)}
        if rival is None and runs[MAIN].stopped is None:
            runs[RIVAL] = _train(config.recipe(RIVAL, steps), records)
    except BaseException:
        if rival is not None:
            rival.terminate()
        raise
    if rival is not None:
        if runs[MAIN].stopped is not None:
            rival.terminate()  # it writes a checkpoint and ends
        rival.join()
        runs[RIVAL] = _of_rival(config, rival.exitcode)
    for run in runs.values():
        if run.stopped is not None:
            raise Stopped(f"stopped by {run.stopped}; the same command continues")
    return runs


def _train_rival(config: QuickstartConfig, steps: int) -> None:
    """In a process of its own: what it says goes to ``rival.txt``, so that the terminal shows one progress bar."""
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / OUTPUT).open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
        result = _train(config.recipe(RIVAL, steps), SceneSource(config.scenes).training())
        sys.exit(STOPPED if result.stopped is not None else 0)


def _of_rival(config: QuickstartConfig, status: int | None) -> Result:
    """What the rival's process left on the disk."""
    folder = config.out / RIVAL
    events = read_events(folder / LOG)
    if status == STOPPED:
        return Result(events[-1]["step"], folder, None, {}, "a signal", events)
    if status != 0:
        raise TrainingFailed(f"the training of the rival ended with status {status}: see {config.out / OUTPUT}")
    return Result(events[-1]["step"], folder, folder / "model", {}, None, events)


def _train(recipe: Recipe, records: Sequence[Record]) -> Result:
    """A training from the start; or its continuation, if it was stopped midway with the same settings."""
    try:
        return train(recipe, records, [])
    except ResumeError:
        _remove(Path(recipe.output))
        return train(recipe, records, [])


def _clear_finished(out: Path) -> None:
    """Delete the trainings of a quickstart that came to its end; one that was stopped keeps them, to continue."""
    if (out / MEASURED).exists():
        for name in (MAIN, RIVAL):
            _remove(out / name)
        (out / MEASURED).unlink()
    for name in (MAIN, RIVAL):
        if (out / name).exists() and not (out / name / LOG).is_file():
            raise FileExistsError(f"{out / name} exists and is no training of the quickstart: choose another --out")


def _remove(folder: Path) -> None:
    """Delete the folder of an earlier training; nothing that does not look like one."""
    if (folder / LOG).is_file():
        shutil.rmtree(folder)


def affordable_steps(config: QuickstartConfig, records: Sequence[Record], probe: int = 8) -> int:
    """How many steps of both trainings fit into ``config.minutes``: a few steps of each are timed here."""
    assert config.minutes is not None
    each = []
    for name in (MAIN, RIVAL):
        recipe = config.recipe(name, 1000)
        materials = gather_materials(recipe, records[: 4 * config.batch], [], None)
        model = new_model(materials, recipe.seed)
        make_teacher: Any = model.make_teacher
        stepper = Stepper(model, make_teacher(), StepSettings(1, recipe.seed, False))
        batches = training_batches(pair_dataset(recipe, materials), config.batch)
        first = [next(batches)[0] for _ in range(2)]
        stepper(first[0], 0)
        began = time.perf_counter()
        for step in range(probe):
            stepper(first[step % 2], step)
        each.append((time.perf_counter() - began) / probe)
    cost = 1.2 * max(each) if config.at_once else 1.1 * sum(each)  # the rest is for optimiser, data and each other
    return max(10, int(60 * config.minutes / cost))


def _measure(model: Model, benchmark: SceneBenchmark, progress: bool) -> Measured:
    machine = Machine(image_block=128, pair_block=1024, progress=progress)
    load = picture_loader(ImageTransform(model.config.image.size))
    quadruples = [Quadruple(q.pictures, q.captions) for q in benchmark.quadruples]
    binding = evaluate_binding(model.network, model.tokenizer, quadruples, load, machine)
    rerank = RERANK if model.config.itm else 0
    retrieval = evaluate_retrieval(
        model.network, model.tokenizer, benchmark.records, RetrievalConfig(rerank=rerank, machine=machine), load
    )
    return Measured(binding, retrieval)


def _search(models: dict[str, Model], benchmark: SceneBenchmark, split: Split) -> list[Searched]:
    """All queries of a split by the towers, by the towers with the fusion's reranking, and by the rival's towers."""
    pictures = [decode(record.image, name=record.key) for record in benchmark.records]
    galleries = {name: model.gallery(pictures, keep_tokens=name == MAIN) for name, model in models.items()}
    rankings = {"towers": (MAIN, 0), "reranked": (MAIN, RERANK), "rival": (RIVAL, 0)}
    return [
        Searched(
            text,
            language,
            split,
            frozenset(query.relevant),
            {
                label: [found.index for found in models[name].rank(text, galleries[name], RERANK, rerank)]
                for label, (name, rerank) in rankings.items()
            },
        )
        for query in benchmark.queries
        for language, text in query.texts.items()
    ]
