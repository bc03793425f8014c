"""From a recipe to what a run works with: records, tokenizer, configuration, model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
import torch.distributed as dist
from torch import nn

from imglish.checkpoints.loading import load_any
from imglish.checkpoints.native import CheckpointError, Loaded, built
from imglish.checkpoints.rules import ConversionError
from imglish.checkpoints.transfer import resized, transfer
from imglish.data.augment import policy
from imglish.data.dataset import PairDataset
from imglish.data.errors import DataError
from imglish.data.images import ImageTransform
from imglish.data.loader import Beside
from imglish.data.masking import MaskConfig
from imglish.data.mixgen import MixGen
from imglish.data.records import Record
from imglish.data.sources import Needs, SourceConfig, open_source
from imglish.data.sources.base import digest
from imglish.data.text import clean_caption, clean_record
from imglish.data.tokenizers import Tokenizer, TokenizerError
from imglish.evaluation.rerank import ScoreRule
from imglish.models import registry
from imglish.models.heads import ASSIGNMENT, TaskModel
from imglish.models.vit import VisionTransformer
from imglish.objectives.gather import rank, world_size
from imglish.training.config import Recipe
from imglish.training.regions import reads_regions, region_file
from imglish.training.settings import SettingsError, fill


@dataclass(frozen=True)
class Materials:
    """train and validation records; words: the tokenizer, None for models of pictures only; config of the model, with
    the tokenizer's vocabulary; start: the model that the run begins from, where ``model.init`` names one; earlier: the
    model of an earlier stage, where ``model.start`` names one; targets: the model that it learns from, where
    ``targets`` names one; alone: records of pictures alone and of texts alone, where the recipe has them; score_rule:
    how the fusion ranks pairs, None: as its family does."""

    records: Sequence[Record]
    validation: Sequence[Record]
    words: Tokenizer | None
    config: Any
    start: nn.Module | None
    targets: nn.Module | None = None
    earlier: nn.Module | None = None
    alone: tuple[Sequence[Record], Sequence[Record]] | None = None
    score_rule: ScoreRule | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a model that reads texts."""
        if self.words is None:
            raise SettingsError("model", f"{self.config.family} takes pictures only, this job needs texts")
        return self.words

    @property
    def digest(self) -> str:
        """A short digest of keys and captions of the training records: the place in the data belongs to these."""
        return "+".join(digest(records) for records in (self.records, *(self.alone or ())))


def gather_materials(
    recipe: Recipe,
    records: Sequence[Record] | None,
    validation: Sequence[Record] | None,
    resumed: dict[str, Any] | None,
    errors_file: Path | None = None,
    reads_texts: bool = True,
) -> Materials:
    """Read the data, make or load the tokenizer, settle the configuration. ``resumed``: a checkpoint, whose tokenizer
    is then used as it is. ``errors_file``: takes what cannot be used of the data.
    ``reads_texts``: whether the job looks at any."""
    base, loaded = base_config(recipe)
    needs: Needs = "pairs" if registry.reads_texts(base) else "images"
    if reads_regions(base):
        needs = "names"
    if recipe.data.texts_only:
        needs = "texts"
        if not registry.reads_texts(base):
            raise SettingsError("data.texts_only", f"a model of family {base.family} reads no texts; set it to false")
    train = read_source(recipe, "data", needs, errors_file) if records is None else records
    if not train:
        raise SettingsError("data.train", "there are no training records")
    if validation is None:
        validation = read_source(recipe, "validation", needs, errors_file)
    held_out = validation[: recipe.validation.limit]
    if recipe.data.clean != "none":
        held_out = [clean_record(record, recipe.data.max_words, recipe.data.clean) for record in held_out]
    start = loaded.model if loaded is not None else None
    targets = _exported(recipe.targets, "targets").model if recipe.targets is not None else None
    stage = _exported(str(recipe.model["start"]), "model.start") if "start" in recipe.model else None
    earlier = stage.model if stage is not None else None
    if not (reads_texts and registry.reads_texts(base)):
        return Materials(train, held_out, None, base, start, targets, earlier)
    alone = read_alone(recipe, errors_file) if recipe.data.pictures_alone.train is not None else None
    if resumed is not None:
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(resumed["tokenizer"]))
    elif loaded is not None:
        tokenizer = loaded.tokenizer
        if base.max_length != loaded.config.max_length:
            tokenizer = tokenizer.with_max_length(base.max_length)
    elif stage is not None and stage.words is not None and recipe.tokenizer.load is None:
        tokenizer = stage.words.with_max_length(base.max_length)
    else:
        texts = train if alone is None else [*train, *alone[1]]
        tokenizer = _tokenizer(recipe, base.max_length, texts)
    tokenizer = _completed(tokenizer, base)
    wanted = recipe.model.get("vocab_size", tokenizer.vocab_size)
    if wanted != tokenizer.vocab_size:
        raise SettingsError(
            "model.vocab_size", f"{wanted}, but the tokenizer has {tokenizer.vocab_size} tokens; leave this setting out"
        )
    config = dataclasses.replace(base, vocab_size=tokenizer.vocab_size)
    if hasattr(config, "mask_id"):
        config = dataclasses.replace(config, mask_id=tokenizer.mask_id)
    if prompt := getattr(config, "prompt", ""):
        # without opening and closing token
        config = dataclasses.replace(config, prompt_tokens=len(tokenizer.encode([prompt])[0]) - 2)
    rule: Any = loaded.score_rule if loaded is not None and loaded.score_rule != "itc" else None
    rule = recipe.validation.score_rule or rule
    return Materials(train, held_out, tokenizer, config, start, targets, earlier, alone, rule)


def base_config(recipe: Recipe) -> tuple[Any, Loaded | None]:
    """The model's configuration with the recipe's changes, and the checkpoint of ``model.init`` if there is one."""
    changes = {key: value for key, value in recipe.model.items() if key not in ("name", "init", "start")}
    if "init" in recipe.model:
        loaded = _exported(str(recipe.model["init"]), "model.init")
        head = loaded.model.head if isinstance(loaded.model, TaskModel) else None
        task = recipe.task.name
        if head is not None and (task in (None, ASSIGNMENT) or head.task not in (task, ASSIGNMENT)):
            raise SettingsError(
                "model.init", f"it has a head for {head.task}: start from a model without one, or set task.name to that"
            )
        return fill(loaded.config, changes, "model"), loaded
    try:
        base = registry.named(str(recipe.model["name"]))
    except KeyError as error:
        raise SettingsError("model.name", str(error.args[0])) from error
    return fill(base, changes, "model"), None


def _exported(path: str, key: str) -> Loaded:
    try:
        return load_any(path)
    except CheckpointError as error:
        raise SettingsError(key, str(error)) from error


def make_teacher(model: nn.Module, materials: Materials) -> Any:
    """What the model learns from besides the data, on its device: its momentum copy, or the model that the recipe's
    ``targets`` names; None for models that learn from the data alone."""
    make, source = getattr(model, "make_teacher", None), materials.targets
    wanted = getattr(model, "learns_from", None)
    if wanted is None:
        if source is not None:
            raise SettingsError("targets", f"a model of family {materials.config.family} learns from no other model")
        return make() if make is not None else None
    if source is None or make is None:
        raise SettingsError("targets", f"this model learns from {wanted}: give the folder of one that is trained")
    try:
        return make(source.to(next(model.parameters()).device))
    except ValueError as error:
        raise SettingsError("targets", str(error)) from error


def read_source(
    recipe: Recipe, group: Literal["data", "validation"], needs: Needs = "pairs", errors_file: Path | None = None
) -> Sequence[Record]:
    """Records of the recipe's ``data`` or ``validation``."""
    key = "data.train" if group == "data" else "validation.data"
    wanted = recipe.data if group == "data" else recipe.validation
    path = recipe.data.train if group == "data" else recipe.validation.data
    if path is None:
        if group == "validation":
            return []
        raise SettingsError(key, "names no data; give a file or folder of pictures and captions (docs/data.md)")
    options = {name.name: getattr(wanted.source, name.name) for name in dataclasses.fields(wanted.source)}
    config = SourceConfig(path=path, images=wanted.images, split=wanted.split, needs=needs, **options)
    try:
        return open_source(config, errors_file=errors_file)
    except DataError as error:
        raise SettingsError(key, str(error)) from error


def read_alone(recipe: Recipe, errors_file: Path | None = None) -> tuple[Sequence[Record], Sequence[Record]]:
    """Records of the recipe's pictures alone and texts alone."""
    found: list[Sequence[Record]] = []
    kinds: tuple[tuple[str, Needs], ...] = (("pictures_alone", "images"), ("texts_alone", "texts"))
    for name, needs in kinds:
        wanted = getattr(recipe.data, name)
        options = {field.name: getattr(wanted.source, field.name) for field in dataclasses.fields(wanted.source)}
        config = SourceConfig(path=wanted.train, images=wanted.images, split=wanted.split, needs=needs, **options)
        try:
            found.append(open_source(config, errors_file=errors_file))
        except DataError as error:
            raise SettingsError(f"data.{name}.train", str(error)) from error
    return found[0], found[1]


def beside_pairs(recipe: Recipe, materials: Materials) -> Beside | None:
    """Pictures alone and texts alone as every batch has them, or None."""
    if materials.alone is None:
        return None
    data, config = recipe.data, materials.config
    if not getattr(config, "takes_unpaired", False):
        raise SettingsError("data.pictures_alone", f"a model of family {config.family} trains on pairs; leave it out")
    sizes = [round(kind.per_pair * recipe.batch.size) for kind in (data.pictures_alone, data.texts_alone)]
    transform = config.image.transform(None if data.crop is None else (data.crop, 1.0), data.flip)
    pictures, texts = materials.alone
    try:
        made = Beside(
            PairDataset(
                pictures, transform, None, mim=data.patches, patch=config.patch, cache=data.cache, detail=data.decode
            ),
            PairDataset(
                texts,
                None,
                materials.tokenizer,
                captions="all",
                mlm=MaskConfig(data.masking_alone, data.whole_word),
                clean=data.clean,
                max_words=data.max_words,
            ),
            *sizes,
        )
        made.sizes(world_size())
    except ValueError as error:
        raise SettingsError("data.pictures_alone", str(error)) from error
    return made


def new_model(materials: Materials, seed: int) -> nn.Module:
    """The model with initial weights drawn from ``seed`` (alike on all ranks), or those of ``model.init`` (with the
    head of a task that it has) or, as far as they go, of ``model.start``."""
    torch.manual_seed(seed)
    model = built(materials.config, materials.start.head if isinstance(materials.start, TaskModel) else None)
    if materials.start is not None:
        try:
            model.load_state_dict(resized(materials.start, model).state)
        except ConversionError as error:
            raise SettingsError("model.init", f"its weights do not fit the changed configuration: {error}") from error
    if materials.earlier is not None:
        try:
            model.load_state_dict(transfer(materials.earlier, model).state)
        except ConversionError as error:
            raise SettingsError("model.start", str(error)) from error
    return model


def _tokenizer(recipe: Recipe, max_length: int, records: Sequence[Record]) -> Tokenizer:
    wanted = recipe.tokenizer
    if wanted.load is not None:
        try:
            return Tokenizer.load(wanted.load, max_length=max_length, append_sep=wanted.append_sep)
        except (TokenizerError, OSError) as error:
            raise SettingsError("tokenizer.load", str(error)) from error
    text = [""]
    if rank() == 0:
        data = recipe.data
        captions = (clean_caption(text, data.max_words, data.clean) for record in records for text in record.captions)
        trained = Tokenizer.train_wordpiece(
            captions, wanted.vocab_size, max_length=max_length, append_sep=wanted.append_sep
        )
        text = [trained.inner.to_str()]
    if world_size() > 1:
        dist.broadcast_object_list(text, src=0, device=torch.device("cpu"))
    return Tokenizer(tokenizers.Tokenizer.from_str(text[0]))


def _completed(tokenizer: Tokenizer, config: Any) -> Tokenizer:
    """The tokenizer with the special tokens that the model's family adds, closing texts where the model needs that."""
    if getattr(config, "closing_token", False) and not tokenizer.append_sep:
        raise SettingsError(
            "tokenizer.append_sep", f"{config.family} learns from the closing token where a text ends; set it to true"
        )
    try:
        return tokenizer.with_special(getattr(config, "special_tokens", ()))
    except TokenizerError as error:
        raise SettingsError("tokenizer.load", str(error)) from error


def pair_dataset(recipe: Recipe, materials: Materials, held_out: bool = False) -> PairDataset:
    """The training records with the transforms, masks and wrong captions that model and recipe ask for; ``held_out``:
    those of the validation, the pictures whole and as they are."""
    data = recipe.data
    crop = None if data.crop is None or held_out else (data.crop, 1.0)
    transform = materials.config.image.transform(crop, data.flip and not held_out)
    regions = None if data.texts_only else region_file(recipe, "validation" if held_out else "data", materials.config)
    # models without an MLM or MIM objective have no such settings
    masks, mim = getattr(materials.config, "mlm", False), getattr(materials.config, "mim", False)
    end = getattr(materials.config, "masks_end", False)
    if data.captions not in ("one", "all", 1) and not getattr(materials.config, "several_captions", False):
        raise SettingsError(
            "data.captions",
            f"{data.captions} captions a picture, but this model ({materials.config.family}) takes one: "
            "set it to one or all",
        )
    try:
        return PairDataset(
            materials.validation if held_out else materials.records,
            None if data.texts_only else transform,
            materials.words,
            captions=data.captions,
            mlm=MaskConfig(data.masking, data.whole_word, end) if masks else None,
            mim=data.patches if mim else None,
            patch=materials.config.patch if mim else None,
            clean=data.clean,
            max_words=data.max_words,
            prompt=getattr(materials.config, "prompt", ""),
            swapped=data.swapped,
            cache=data.cache and not held_out,
            detail=data.decode,
            augment=policy(data.augment, data.magnitude) if data.augment is not None and not held_out else None,
            regions=regions,
        )
    except ValueError as error:
        raise SettingsError("data", str(error)) from error


def mixtures(recipe: Recipe, materials: Materials) -> MixGen | None:
    """MixGen, where the recipe asks for it."""
    every = recipe.data.mixgen
    if every is None:
        return None
    if recipe.data.captions not in ("one", "all", 1):
        raise SettingsError("data.mixgen", "mixtures of pictures with several captions each are not defined")
    if not isinstance(materials.config.image.transform(None, False), ImageTransform):
        raise SettingsError("data.mixgen", "this model takes pictures of several sizes, which cannot be blended")
    return MixGen.of(every, materials.tokenizer, getattr(materials.config, "prompt", ""))


def compile_towers(model: nn.Module) -> int:
    """torch.compile the blocks of vision Transformers, in place; returns how many.

    Their shapes are the same in every step. Text has other lengths in every batch, for which it would compile anew.
    """
    blocks = [block for tower in model.modules() if isinstance(tower, VisionTransformer) for block in tower.blocks]
    for block in blocks:
        block.compile()
    return len(blocks)
