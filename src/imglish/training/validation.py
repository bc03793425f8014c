"""Validation while training: retrieval on held-out pairs."""

from __future__ import annotations

from torch import nn

from imglish.evaluation.encoding import Machine
from imglish.evaluation.retrieval import RetrievalConfig, RetrievalResult, evaluate_retrieval
from imglish.models.capabilities import Matches
from imglish.training.config import Recipe
from imglish.training.setup import Materials


def validate(model: nn.Module, materials: Materials, recipe: Recipe) -> RetrievalResult:
    """Recalls on the validation records, by all ranks together; reranked as the recipe says where the model can."""
    rerank = recipe.validation.rerank if isinstance(model, Matches) else 0
    precision = "bfloat16" if recipe.compute.precision == "bf16" else "float32"
    config = RetrievalConfig(rerank=rerank, machine=Machine(precision=precision, progress=False))
    return evaluate_retrieval(model, materials.tokenizer, materials.validation, config)
