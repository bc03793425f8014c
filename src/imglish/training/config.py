"""A recipe: everything that a training run is told, as nested dataclasses. `docs/train.md` explains each setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from imglish.data.augment import PolicyName, policy
from imglish.data.images import Detail
from imglish.data.patch_masks import PatchMaskConfig
from imglish.data.sources import SourceOptions
from imglish.data.text import CaptionStyle
from imglish.evaluation.rerank import ScoreRule
from imglish.training.settings import SettingsError, fill, read_mapping

TaskName = Literal["vqa", "nlvr2", "entailment", "classification", "text_assignment"]


def _between(key: str, value: float, low: float, high: float, hint: str = "") -> None:
    if not low <= value <= high:
        raise SettingsError(key, f"{value} lies outside {low:g}..{high:g}{'; ' + hint if hint else ''}")


def _positive(key: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise SettingsError(key, f"{value} must be above 0")


@dataclass(frozen=True)
class AloneRecipe:
    """Pictures alone or texts alone beside the pairs, for masked data modelling (BEiT-3). train, images, split, source:
    as in :class:`DataRecipe`; per_pair: how many of them a batch has for each of its pairs."""

    train: str | None = None
    images: str | None = None
    split: str | None = None
    source: SourceOptions = field(default_factory=SourceOptions)
    per_pair: float = 1.0

    def __post_init__(self) -> None:
        _between("per_pair", self.per_pair, 0.001, 1000)


@dataclass(frozen=True)
class DataRecipe:
    """Where the pairs come from and how they are prepared.

    train: file, folder or URL of any layout (see `docs/data.md`), None when records are given in Python; images: folder
    that the names of pictures are relative to; split: take only records of this split; source: how the data are read:
    layout, fields, language, share of errors; captions: an epoch shows every picture once with "one" of its captions,
    or with that many of them at once (a number; the picture is encoded once for all of them), or "all" captions, one at
    a time; workers: processes that decode pictures (0: the training process itself); cache: keep decoded pictures in
    memory; crop: smallest area share of the random crop (None: the whole picture); flip: mirror half of the pictures
    whose captions name no side; decode: JPEGs in "full", at a reduced size that looks the same ("good"), or "fast";
    augment: RandAugment of a paper, at another ``magnitude`` than its own; mixgen: every so-many-th pair of a batch
    becomes a mixture with the next one (the paper: 4); clean: captions as the "albef" or the "blip" code cleans them,
    with at most ``max_words`` words, in validation too; masking, whole_word: of the MLM objective; swapped: use the
    wrong captions that the records hold as further ITM negatives; texts_only: train on the texts alone, no picture is
    read; patches: how pictures are masked for masked image modelling; regions: file with the regions of the pictures,
    for models that read these (docs/models.md); pictures_alone, texts_alone: data beside the pairs (give both or none);
    masking_alone: of these texts, which no picture helps.
    """

    train: str | None = None
    images: str | None = None
    split: str | None = None
    source: SourceOptions = field(default_factory=SourceOptions)
    captions: Literal["one", "all"] | int = "one"
    workers: int = 2
    cache: bool = False
    crop: float | None = 0.5
    flip: bool = True
    decode: Detail = "good"
    augment: PolicyName | None = None
    magnitude: float | None = None
    mixgen: int | None = None
    clean: CaptionStyle = "none"
    max_words: int = 30
    masking: float = 0.15
    whole_word: bool = False
    swapped: bool = False
    texts_only: bool = False
    patches: PatchMaskConfig = field(default_factory=PatchMaskConfig)
    pictures_alone: AloneRecipe = field(default_factory=AloneRecipe)
    texts_alone: AloneRecipe = field(default_factory=AloneRecipe)
    masking_alone: float = 0.15
    regions: str | None = None

    def __post_init__(self) -> None:
        _between("workers", self.workers, 0, 256)
        if isinstance(self.captions, int):
            _between("captions", self.captions, 1, 1000)
        if self.crop is not None:
            _between("crop", self.crop, 0.01, 1)
        _between("masking", self.masking, 0.01, 0.9)
        _between("masking_alone", self.masking_alone, 0.01, 0.9)
        if (self.pictures_alone.train is None) != (self.texts_alone.train is None):
            lacking = "pictures_alone" if self.pictures_alone.train is None else "texts_alone"
            raise SettingsError(f"{lacking}.train", "pictures alone and texts alone go together: name both or none")
        _between("max_words", self.max_words, 1, 100_000)
        if self.mixgen is not None:
            _between("mixgen", self.mixgen, 2, 1_000_000, "2 is every other pair, the paper has 4")
        if self.augment is not None:
            try:
                policy(self.augment, self.magnitude)
            except ValueError as error:
                raise SettingsError("magnitude", str(error)) from error
        elif self.magnitude is not None:
            raise SettingsError("magnitude", "nothing is augmented; set data.augment to albef, blip or vilt")


@dataclass(frozen=True)
class TokenizerRecipe:
    """load: tokenizer.json, BERT vocabulary or CLIP merges; without it a WordPiece of ``vocab_size`` is trained on the
    training captions. append_sep: end every text with [SEP] (BERT does; the published ALBEF does not)."""

    load: str | None = None
    vocab_size: int = 6000
    append_sep: bool = False

    def __post_init__(self) -> None:
        _between("vocab_size", self.vocab_size, 16, 1_000_000)


@dataclass(frozen=True)
class BatchRecipe:
    """size: pairs of one step, over all processes; accumulate: parts that each process divides its share into, to need
    less memory (contrastive losses still see the whole batch)."""

    size: int = 128
    accumulate: int = 1

    def __post_init__(self) -> None:
        _between("size", self.size, 2, 10_000_000, "contrastive losses need at least two pairs")
        _between("accumulate", self.accumulate, 1, self.size)


@dataclass(frozen=True)
class OptimiserRecipe:
    """AdamW. lr: highest learning rate; temperature_lr: that of temperatures and logit scales (None: the same), whose
    steps must stay small beside their value, a few hundredths in ALBEF; only: names of the parameters that are trained,
    with * for any part, all others stay as they are (None: all are trained); layer_decay: each layer learns at this
    share of the rate of the layer above it (BEiT; fine-tuning); head_factor: rate of the head that a task puts on, as a
    multiple of the others' (VQA of ViLT 10, of VLMo and BEiT-3 20); decay_embeddings: also decay embedding tables and
    positions (as published); clip_norm: largest norm of the gradient (None: not clipped)."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay_embeddings: bool = True
    clip_norm: float | None = 1.0
    temperature_lr: float | None = None
    only: tuple[str, ...] | None = None
    layer_decay: float | None = None
    head_factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr <= 0.1:
            raise SettingsError(
                "lr", f"{self.lr} cannot work with AdamW: usual are 1e-5 (fine-tuning) to 1e-3 (small models)"
            )
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise SettingsError("betas", f"{beta} must lie in 0..1, below 1")
        _positive("eps", self.eps)
        _positive("temperature_lr", self.temperature_lr)
        _between("weight_decay", self.weight_decay, 0, 1)
        _positive("clip_norm", self.clip_norm)
        _positive("head_factor", self.head_factor)
        if self.layer_decay is not None:
            _between("layer_decay", self.layer_decay, 0.01, 1)


@dataclass(frozen=True)
class ScheduleRecipe:
    """Length of the run in ``epochs`` or in ``steps`` (give one); linear warm-up from ``lr_start`` over
    ``warmup_steps``, then ``shape``, half a cosine or a line, down to ``lr_min``."""

    epochs: float | None = None
    steps: int | None = None
    warmup_steps: int = 100
    lr_min: float = 1e-6
    lr_start: float = 0.0
    shape: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            which = "neither is" if self.epochs is None else "both are"
            raise SettingsError("epochs", f"give the length of the run either as epochs or as steps; {which} set")
        _positive("epochs", self.epochs)
        _positive("steps", self.steps)
        _between("warmup_steps", self.warmup_steps, 0, 10_000_000)
        _between("lr_min", self.lr_min, 0, 0.1)
        _between("lr_start", self.lr_start, 0, 0.1)


@dataclass(frozen=True)
class ComputeRecipe:
    """device: cpu, cuda, cuda:1, ... (None: a GPU where there is one); precision: of matrix products under autocast,
    weights stay float32; compile: torch.compile of the vision Transformer, for GPUs; threads: of each process (None:
    torch's)."""

    device: str | None = None
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        _positive("threads", self.threads)


@dataclass(frozen=True)
class CheckpointRecipe:
    """Checkpoints for resuming: every so many steps and minutes (None: not), the newest ``keep`` stay."""

    every_steps: int | None = 1000
    every_minutes: float | None = 10.0
    keep: int = 2

    def __post_init__(self) -> None:
        _positive("every_steps", self.every_steps)
        _positive("every_minutes", self.every_minutes)
        _between("keep", self.keep, 1, 1000)


@dataclass(frozen=True)
class ValidationRecipe:
    """Retrieval on held-out pairs while training. data: file, folder or URL (None: no validation, or records given in
    Python); images, split, source: as in ``data``; every: epochs between two (may be a fraction); limit: only the first
    so many pictures; rerank: candidates that the fusion tower rescores (0: towers alone; a model without towers reads
    every pair, so ``limit`` has to keep them few); score_rule: how the fusion ranks pairs (docs/evaluate.md), as is
    stored with the model (None: by ``model.init``, else by the matching logit); captions: so many of the pictures get a
    caption, which CIDEr-D compares with theirs, where the model writes captions (0: none until the report at the end,
    which shows a dozen); regions: as in ``data``."""

    data: str | None = None
    images: str | None = None
    split: str | None = None
    source: SourceOptions = field(default_factory=SourceOptions)
    every: float = 1.0
    limit: int | None = None
    rerank: int = 0
    score_rule: ScoreRule | None = None
    captions: int = 0
    regions: str | None = None

    def __post_init__(self) -> None:
        if self.split is not None and self.split.lower().replace("_", "").replace("-", "").startswith("test"):
            raise SettingsError(
                "split",
                f"{self.split!r}: the best model is chosen by validation, and a test split must not choose; use val "
                "and measure the test split once, by imglish eval",
            )
        _positive("every", self.every)
        _positive("limit", self.limit)
        _between("captions", self.captions, 0, 1_000_000)
        _between("rerank", self.rerank, 0, 1_000_000)


@dataclass(frozen=True)
class TaskRecipe:
    """What a model is fine-tuned for (docs/tasks.md). name: a task with a head of its own, None: the model's own
    objectives on pairs; "text_assignment" prepares ALBEF for NLVR2, on pairs; head: a choice among "classes", or
    "answers" that are written; answers: file of the classes or candidate answers (None: the ``most_answers`` most
    frequent training answers, or the classes of the task); pictures: to a text (None: as the task has them);
    annotations: second file of VQA v2, validation_annotations: that of the validation; hold_out: share of the training
    data held out for validation, by picture; alpha: weight of what the momentum copy says in place of the labels (0: no
    copy); smoothing: share of a class label that is spread over all classes.
    """

    name: TaskName | None = None
    head: Literal["classes", "answers"] = "classes"
    answers: str | None = None
    most_answers: int = 3129
    pictures: int | None = None
    annotations: str | None = None
    validation_annotations: str | None = None
    hold_out: float = 0.0
    alpha: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        _between("most_answers", self.most_answers, 2, 1_000_000)
        if self.pictures is not None:
            _between("pictures", self.pictures, 1, 16)
        _between("hold_out", self.hold_out, 0, 0.9)
        _between("alpha", self.alpha, 0, 1)
        _between("smoothing", self.smoothing, 0, 0.99)


@dataclass(frozen=True)
class LogRecipe:
    """every: steps between two lines of the log; tensorboard: also write TensorBoard files (needs the extra)."""

    every: int = 20
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _positive("every", self.every)


@dataclass(frozen=True)
class Recipe:
    """A whole run. ``model``: ``name`` of a configuration, or ``init``, an exported checkpoint to start from; and any
    setting of the model's configuration, at any depth (``teacher: {alpha: 0.2}``); ``start``, beside a name: an
    exported model of an earlier stage, whose weights are taken as far as they have a place (docs/train.md).
    ``targets``: exported model that it learns from: a visual tokenizer (BEiT, BEiT-3), or one whose image tower is
    distilled (VQ-KD). ``output``: folder of the run. ``average``: decay of a moving average of the weights, which is
    then validated and exported (None: no average)."""

    model: dict[str, Any] = field(default_factory=dict)
    targets: str | None = None
    output: str = "runs/train"
    seed: int = 0
    task: TaskRecipe = TaskRecipe()
    data: DataRecipe = DataRecipe()
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    batch: BatchRecipe = BatchRecipe()
    optimiser: OptimiserRecipe = OptimiserRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe(epochs=10)
    average: float | None = None
    compute: ComputeRecipe = ComputeRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    validation: ValidationRecipe = ValidationRecipe()
    log: LogRecipe = LogRecipe()

    def __post_init__(self) -> None:
        if ("name" in self.model) == ("init" in self.model):
            raise SettingsError("model", "say which model: model.name (a configuration) or model.init (a checkpoint)")
        if self.schedule.lr_min > self.optimiser.lr:
            raise SettingsError(
                "schedule.lr_min", f"{self.schedule.lr_min} is above optimiser.lr = {self.optimiser.lr}; lower it"
            )
        if self.average is not None:
            _between("average", self.average, 0, 0.999999)
        _between("seed", self.seed, 0, 2**31 - 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (lists for tuples), for YAML, the checkpoint and the comparison on resume."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def recipe_from(data: Mapping[str, Any]) -> Recipe:
    """A recipe from nested mappings (YAML); mistakes raise :class:`SettingsError` naming the key and the fix."""
    data = dict(data)
    if isinstance(data.get("schedule"), dict) and data["schedule"].get("steps") is not None:
        data["schedule"] = {"epochs": None} | data["schedule"]  # steps replace the default number of epochs
    if "model" not in data:
        raise SettingsError("model", "the recipe names no model; write model: {name: albef-small}")
    if not isinstance(data["model"], dict):
        raise SettingsError("model", f"{data['model']!r} is not a group of settings; write model: {{name: ...}}")
    return fill(Recipe(model={"name": ""}), data)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file with ``key=value`` overrides."""
    return recipe_from(read_mapping(Path(path), overrides))


@dataclass(frozen=True)
class Plan:
    """What the recipe comes to on this data: steps of an epoch and of the run, pairs of a rank and of one part."""

    steps_per_epoch: int
    steps: int
    per_rank: int
    per_part: int
    validate_every: int

    def validates(self, step: int) -> bool:
        """Whether a validation belongs after ``step`` steps."""
        return step > 0 and (step % self.validate_every == 0 or step == self.steps)

    def epochs(self, step: int) -> float:
        """Progress in epochs after ``step`` steps."""
        return step / self.steps_per_epoch


def plan(recipe: Recipe, pairs: int, world_size: int = 1, queue_size: int = 0) -> Plan:
    """Check the recipe against the number of training pairs and processes and the model's queue; impossible settings
    raise."""
    size, parts = recipe.batch.size, recipe.batch.accumulate
    if size > pairs:
        raise SettingsError("batch.size", f"{size} is larger than the data set of {pairs} pairs; lower it")
    if size % (world_size * parts):
        raise SettingsError(
            "batch.size",
            f"{size} does not divide into {world_size} processes of {parts} parts (batch.accumulate); "
            f"{size - size % (world_size * parts) or world_size * parts} does",
        )
    per_part = size // (world_size * parts)
    if recipe.data.mixgen is not None and per_part % recipe.data.mixgen:
        raise SettingsError(
            "data.mixgen",
            f"{recipe.data.mixgen} does not divide the {per_part} pairs that a process computes at a time, so that "
            "the mixtures would depend on the number of processes",
        )
    if per_part * world_size < 2:
        raise SettingsError("batch.accumulate", f"{parts} parts leave a single pair in each; lower it")
    if queue_size >= pairs:
        raise SettingsError(
            "model.teacher.queue_size",
            f"{queue_size}, but there are {pairs} training pairs: the queue would hold old copies of the very pictures "
            f"of a batch; at most {pairs // 2} is sensible, 0 switches it off",
        )
    per_epoch = pairs // size
    schedule = recipe.schedule
    steps = schedule.steps if schedule.steps is not None else round((schedule.epochs or 0) * per_epoch)
    if steps < 1:
        raise SettingsError("schedule.epochs", f"{schedule.epochs} epochs of {per_epoch} steps make no step; raise it")
    if schedule.warmup_steps >= steps:
        raise SettingsError(
            "schedule.warmup_steps",
            f"{schedule.warmup_steps} steps of warm-up do not fit into a run of {steps} steps, so the learning rate "
            f"would never reach optimiser.lr; {max(steps // 20, 0)} would do",
        )
    every = max(1, round(recipe.validation.every * per_epoch))
    return Plan(per_epoch, steps, size // world_size, per_part, every)
