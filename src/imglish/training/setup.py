"""From a recipe to what a run works with: records, tokenizer, configuration, model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
import torch.distributed as dist
from torch import nn

from imglish.checkpoints.native import CheckpointError, Loaded, load
from imglish.data.dataset import PairDataset
from imglish.data.images import ImageTransform
from imglish.data.masking import MaskConfig
from imglish.data.records import Record, RecordError, read_records
from imglish.data.tokenizers import Tokenizer, TokenizerError
from imglish.models import registry
from imglish.models.vit import VisionTransformer
from imglish.objectives.gather import rank, world_size
from imglish.training.config import Recipe
from imglish.training.settings import SettingsError, fill


@dataclass(frozen=True)
class Materials:
    """train and validation records; tokenizer; config of the model, with the tokenizer's vocabulary; start: the model
    that the run begins from, where ``model.init`` names one."""

    records: Sequence[Record]
    validation: Sequence[Record]
    tokenizer: Tokenizer
    config: Any
    start: nn.Module | None

    @property
    def digest(self) -> str:
        """A short digest of keys and captions of the training records: the place in the data belongs to these."""
        digest = hashlib.blake2b(digest_size=16)
        for record in self.records:
            digest.update(repr((record.key, record.captions, record.swapped)).encode())
        return digest.hexdigest()


def gather_materials(
    recipe: Recipe,
    records: Sequence[Record] | None,
    validation: Sequence[Record] | None,
    resumed: dict[str, Any] | None,
) -> Materials:
    """Read the data, make or load the tokenizer, settle the configuration. ``resumed``: a checkpoint, whose tokenizer
    is then used as it is."""
    base, loaded = base_config(recipe)
    train = read_pairs(recipe, "data") if records is None else records
    if not train:
        raise SettingsError("data.train", "there are no training records")
    held_out = (read_pairs(recipe, "validation") if validation is None else validation)[: recipe.validation.limit]
    if resumed is not None:
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(resumed["tokenizer"]))
    elif loaded is not None:
        tokenizer = loaded.tokenizer
    else:
        tokenizer = _tokenizer(recipe, base.max_length, train)
    tokenizer = _completed(tokenizer, base)
    wanted = recipe.model.get("vocab_size", tokenizer.vocab_size)
    if wanted != tokenizer.vocab_size:
        raise SettingsError(
            "model.vocab_size", f"{wanted}, but the tokenizer has {tokenizer.vocab_size} tokens; leave this setting out"
        )
    config = dataclasses.replace(base, vocab_size=tokenizer.vocab_size)
    if prompt := getattr(config, "prompt", ""):
        # without opening and closing token
        config = dataclasses.replace(config, prompt_tokens=len(tokenizer.encode([prompt])[0]) - 2)
    return Materials(train, held_out, tokenizer, config, loaded.model if loaded is not None else None)


def base_config(recipe: Recipe) -> tuple[Any, Loaded | None]:
    """The model's configuration with the recipe's changes, and the checkpoint of ``model.init`` if there is one."""
    changes = {key: value for key, value in recipe.model.items() if key not in ("name", "init")}
    if "init" in recipe.model:
        try:
            loaded = load(str(recipe.model["init"]))
        except CheckpointError as error:
            raise SettingsError("model.init", str(error)) from error
        return fill(loaded.config, changes, "model"), loaded
    try:
        base = registry.named(str(recipe.model["name"]))
    except KeyError as error:
        raise SettingsError("model.name", str(error.args[0])) from error
    return fill(base, changes, "model"), None


def read_pairs(recipe: Recipe, group: str) -> list[Record]:
    """Records of the recipe's ``data`` or ``validation``."""
    if group == "data":
        path, key, images, split = recipe.data.train, "data.train", recipe.data.images, recipe.data.split
    else:
        held_out = recipe.validation
        path, key, images, split = held_out.data, "validation.data", held_out.images, held_out.split
        if path is None:
            return []
    if path is None:
        raise SettingsError(key, "names no file; give a JSONL or CSV of pictures and captions")
    try:
        return read_records(path, images, split=split)
    except (RecordError, OSError) as error:
        raise SettingsError(key, str(error)) from error


def new_model(materials: Materials, seed: int) -> nn.Module:
    """The model with initial weights drawn from ``seed`` (alike on all ranks), or those of ``model.init``."""
    torch.manual_seed(seed)
    model = registry.build(materials.config)
    if materials.start is not None:
        try:
            model.load_state_dict(materials.start.state_dict())
        except RuntimeError as error:
            raise SettingsError("model.init", f"its weights do not fit the changed configuration: {error}") from error
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
        captions = (caption for record in records for caption in record.captions)
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


def pair_dataset(recipe: Recipe, materials: Materials) -> PairDataset:
    """The training records with the transforms, masks and wrong captions that model and recipe ask for."""
    data = recipe.data
    crop = None if data.crop is None else (data.crop, 1.0)
    image = materials.config.image
    transform = ImageTransform(image.size, image.resize, crop_scale=crop, flip=data.flip)
    masks = getattr(materials.config, "mlm", False)  # models without an MLM objective have no such setting
    if data.captions not in ("one", "all", 1) and not getattr(materials.config, "several_captions", False):
        raise SettingsError(
            "data.captions",
            f"{data.captions} captions a picture, but this model ({materials.config.family}) takes one: "
            "set it to one or all",
        )
    try:
        return PairDataset(
            materials.records,
            transform,
            materials.tokenizer,
            captions=data.captions,
            mlm=MaskConfig(data.masking, data.whole_word) if masks else None,
            prompt=getattr(materials.config, "prompt", ""),
            swapped=data.swapped,
            cache=data.cache,
        )
    except ValueError as error:
        raise SettingsError("data", str(error)) from error


def compile_towers(model: nn.Module) -> int:
    """torch.compile the blocks of vision Transformers, in place; returns how many.

    Their shapes are the same in every step. Text has other lengths in every batch, for which it would compile anew.
    """
    blocks = [block for tower in model.modules() if isinstance(tower, VisionTransformer) for block in tower.blocks]
    for block in blocks:
        block.compile()
    return len(blocks)
