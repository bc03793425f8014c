"""Validation while training: retrieval on held-out pairs."""

from __future__ import annotations

from torch import nn

from imglish.data.regions import region_loader
from imglish.data.sources.base import caption_counts
from imglish.evaluation.encoding import Machine
from imglish.evaluation.retrieval import RetrievalConfig, RetrievalResult, evaluate_retrieval, how_many
from imglish.models.capabilities import Matches
from imglish.training.config import Recipe
from imglish.training.settings import SettingsError
from imglish.training.setup import Materials, region_file


def validate(model: nn.Module, materials: Materials, recipe: Recipe) -> RetrievalResult:
    """Recalls on the validation records, by all ranks together; reranked as the recipe says where the model can."""
    load = None
    if recipe.validation.regions is not None:
        load = region_loader(region_file(recipe, "validation"))
    return evaluate_retrieval(model, materials.tokenizer, materials.validation, _config(model, recipe), load)


def check_validation(model: nn.Module, materials: Materials, recipe: Recipe) -> None:
    """Raise :class:`SettingsError` where a validation could not be done, before any training."""
    if not materials.validation:
        return
    texts = int(caption_counts(materials.validation).sum())
    try:
        how_many(_config(model, recipe), len(materials.validation), texts, model, [])
    except ValueError as error:
        raise SettingsError("validation.limit", str(error)) from error


def _config(model: nn.Module, recipe: Recipe) -> RetrievalConfig:
    rerank = recipe.validation.rerank if isinstance(model, Matches) else 0
    precision = "bfloat16" if recipe.compute.precision == "bf16" else "float32"
    return RetrievalConfig(rerank=rerank, machine=Machine(precision=precision, progress=False))
