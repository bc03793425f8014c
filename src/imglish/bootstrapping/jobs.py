"""What a bootstrapping recipe does between trainings: it captions, scores and filters, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from imglish.api import load
from imglish.bootstrapping import captioning, keeping, scoring
from imglish.bootstrapping.filtering import FilterConfig, Scores, decide
from imglish.bootstrapping.quality import read_truth
from imglish.bootstrapping.report import page
from imglish.bootstrapping.scoring import Scorer
from imglish.bootstrapping.stage import Done, Stage, absolute
from imglish.data.errors import DataError
from imglish.data.shards import ShardConfig
from imglish.data.sources import SourceConfig
from imglish.data.sources.config import from_mapping
from imglish.generation.config import GenerationConfig
from imglish.objectives.gather import rank, world_size

Precision = Literal["float32", "bfloat16"]
PUBLISHED = FilterConfig()
CAPFILT = GenerationConfig(sample=True, top_p=0.9, min_length=5, max_length=20)  # BLIP, section 3.3


@dataclass(frozen=True)
class CaptionJob:
    """Captions for the pictures of ``data`` by ``model``: one nucleus sample each, unless ``writing`` says otherwise.
    per_shard: pictures of a shard, where the data have none; batch: pictures at a time."""

    model: str = ""
    data: SourceConfig = field(default_factory=lambda: SourceConfig(path=""))
    writing: GenerationConfig = CAPFILT
    prompt: str | None = None
    per_shard: int = 2000
    batch: int = 16
    precision: Precision = "float32"

    def run(self, out: Path, device: torch.device) -> str:
        """Do what is missing; gives what was done, in words, empty where nothing was missing."""
        model = load(self.model, device)
        about = captioning.settings(model, self.model, self.writing, self.prompt, self.precision)
        stage = Stage.begin(out, captioning.KIND, about, self.data, self.per_shard)
        work = captioning.captioner(model, self.writing, self.prompt, block=self.batch, precision=self.precision)
        done = _complete(stage, stage.run(work, rank=rank(), world=world_size()))
        found = captioning.summary(stage)
        said = f"{found.captions} captions of {found.pictures} pictures, {found.shared:.1%} of them any picture has"
        return f"{said}; {found.unreadable} pictures could not be read" if done.shards else ""


@dataclass(frozen=True)
class ScoreJob:
    """Scores by ``model``, and by ``ranker`` where there is one, of the captions that the job ``of`` wrote and those of
    its source; or, in place of it, of the captions of ``data`` alone. batch, pairs: at a time."""

    model: str = ""
    of: str | None = None
    data: SourceConfig | None = None
    ranker: str | None = None
    per_shard: int = 2000
    batch: int = 16
    pairs: int = 256
    precision: Precision = "float32"

    def run(self, out: Path, device: torch.device) -> str:
        """Do what is missing; gives what was done, in words, empty where nothing was missing."""
        captions = scoring.captions_stage(Path(self.of)) if self.of is not None else None
        source = captions.source if captions is not None else self.data
        assert source is not None  # one of the two, as the recipe was read
        model, ranker = load(self.model, device), None if self.ranker is None else load(self.ranker, device)
        scorers = [
            Scorer(one, block=self.batch, pairs=self.pairs, precision=self.precision)
            for one in (model, ranker)
            if one is not None
        ]
        about = scoring.settings(model, self.model, ranker, self.ranker or "", captions, self.precision)
        shards = captions.shards if captions is not None else None
        stage = Stage.begin(out, scoring.KIND, about, source, self.per_shard, shards)
        work = scoring.scorer(scorers[0], scorers[1] if ranker is not None else None, captions)
        done = _complete(stage, stage.run(work, rank=rank(), world=world_size()))
        return f"{done.rows} texts scored" if done.shards else ""


@dataclass(frozen=True)
class FilterJob:
    """The rules of ``imglish filter`` on the scores of the job ``of``. beside: sources that are trained on together
    with what is kept, such as the clean pairs; truth: file that says which captions are noise, for the report."""

    of: str = ""
    rules: FilterConfig = PUBLISHED
    beside: tuple[dict[str, Any], ...] = ()
    truth: str | None = None

    def run(self, out: Path, device: torch.device) -> str:
        """Choose; gives what was kept, in words, empty where the choice was there. The first process works alone."""
        if rank() != 0:
            return ""
        stage = Stage.open(Path(self.of))
        beside = [_plain(entry) for entry in self.beside]
        if keeping.is_written(out, keeping.about(stage, self.rules, beside)):
            return ""
        scores = Scores.of(stage)
        decisions = decide(scores, self.rules)
        shards = None
        if decisions.kept.any():
            if not keeping.pictures_are_files(scores):
                shards = "shards"
                keeping.write_shards(out / shards, stage, scores, decisions.kept, ShardConfig(side=None))
            truth = read_truth(self.truth) if self.truth is not None else None
            page(stage, scores, decisions, self.rules, truth).save(out / "report.html")
        keeping.write(out, stage, scores, decisions, self.rules, beside=beside, shards=shards)
        return f"{int(decisions.kept.sum())} of {len(scores)} texts are kept; report in {out / 'report.html'}"


Job = CaptionJob | ScoreJob | FilterJob
JOBS: dict[str, type[CaptionJob] | type[ScoreJob] | type[FilterJob]] = {
    "caption": CaptionJob,
    "score": ScoreJob,
    "filter": FilterJob,
}


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """A source as :func:`from_mapping` takes it, with paths that mean the same from any folder."""
    source = absolute(from_mapping(entry, "beside"))
    changes = {name: getattr(source, name) for name in ("path", "images", "index") if getattr(source, name) is not None}
    return dict(entry) | changes


def _complete(stage: Stage, done: Done) -> Done:
    """What comes next needs all shards. Raises :class:`DataError` where some could not be read."""
    if done.failed:
        first: Sequence[str] = [f"{name}: {why}" for name, why in list(done.failed.items())[:3]]
        raise DataError(
            f"{len(done.failed)} of {len(stage.shards)} shards of {stage.source.path} failed ({'; '.join(first)}); "
            "the same command tries them again"
        )
    return done
