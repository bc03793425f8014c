"""Validation while training: retrieval on held-out pairs, and captions of their pictures."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from imglish.data.regions import region_loader
from imglish.data.sources.base import caption_counts
from imglish.evaluation.captions import CaptioningConfig, CaptioningResult, evaluate_captioning
from imglish.evaluation.encoding import Machine
from imglish.evaluation.retrieval import RetrievalConfig, RetrievalResult, evaluate_retrieval, how_many
from imglish.generation.config import CAPTIONS
from imglish.models.capabilities import Captions, Matches
from imglish.training.config import Recipe
from imglish.training.settings import SettingsError
from imglish.training.setup import Materials, region_file


def validate(model: nn.Module, materials: Materials, recipe: Recipe) -> RetrievalResult:
    """Recalls on the validation records, by all ranks together; reranked as the recipe says where the model can."""
    load = None
    if recipe.validation.regions is not None:
        load = region_loader(region_file(recipe, "validation"))
    return evaluate_retrieval(model, materials.tokenizer, materials.validation, _config(model, recipe), load)


def validate_captions(model: nn.Module, materials: Materials, recipe: Recipe, limit: int) -> CaptioningResult | None:
    """Captions of the first ``limit`` validation pictures, compared with theirs, by all ranks together.

    None for a model that writes no captions, and without validation pictures.
    """
    records = [materials.validation[i] for i in range(min(limit, len(materials.validation)))]
    if not isinstance(model, Captions) or not records:
        return None
    written = replace(CAPTIONS, max_length=min(CAPTIONS.max_length, model.caption_form().longest))
    config = CaptioningConfig(written, machine=replace(_machine(recipe), image_block=32))
    return evaluate_captioning(model, materials.tokenizer, records, config)


def check_validation(model: nn.Module, materials: Materials, recipe: Recipe) -> None:
    """Raise :class:`SettingsError` where a validation could not be done, before any training."""
    if not materials.validation:
        return
    texts = int(caption_counts(materials.validation).sum())
    try:
        how_many(_config(model, recipe), len(materials.validation), texts, model, [])
    except ValueError as error:
        raise SettingsError("validation.limit", str(error)) from error
    if recipe.validation.captions and not isinstance(model, Captions):
        raise SettingsError("validation.captions", f"{type(model).__name__} writes no captions; leave this setting out")


def _config(model: nn.Module, recipe: Recipe) -> RetrievalConfig:
    rerank = recipe.validation.rerank if isinstance(model, Matches) else 0
    return RetrievalConfig(rerank=rerank, machine=_machine(recipe))


def _machine(recipe: Recipe) -> Machine:
    return Machine(precision="bfloat16" if recipe.compute.precision == "bf16" else "float32", progress=False)
