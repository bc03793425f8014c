"""Validation while training: retrieval on held-out pairs, or the objective itself on held-out data; captions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from imglish.data.errors import Errors
from imglish.data.regions import region_loader
from imglish.data.sources.base import caption_counts
from imglish.evaluation.captions import CaptioningConfig, CaptioningResult, evaluate_captioning
from imglish.evaluation.encoding import Machine
from imglish.evaluation.retrieval import RetrievalConfig, evaluate_retrieval, how_many
from imglish.generation.config import CAPTIONS
from imglish.models.capabilities import Captions, Matches
from imglish.training.config import Recipe
from imglish.training.held_out import held_out
from imglish.training.regions import region_file
from imglish.training.settings import SettingsError
from imglish.training.setup import Materials, pair_dataset


@dataclass(frozen=True)
class Validated:
    """What a validation found. entry: for the log; measure: what decides which one is better, ``loss`` or something of
    which more is better (``r_mean``, mean recall in percent; ``cider`` where captions are all that is trained); value:
    of it; text: for people; beside: for the log too,
    but not remembered of the best one."""

    entry: dict[str, Any]
    measure: str
    value: float
    text: str
    beside: dict[str, Any] = field(default_factory=dict)

    def better(self, best: dict[str, Any]) -> bool:
        """Than the best so far, empty for none."""
        return not best or (self.value - best[self.measure]) * (-1 if self.measure == "loss" else 1) > 0

    def as_best(self, step: int) -> dict[str, Any]:
        return {"step": step, self.measure: self.value, **self.entry}


def validate(model: nn.Module, teacher: Any, materials: Materials, recipe: Recipe, errors: Errors) -> Validated:
    """Recalls on the validation records, by all ranks together, reranked as the recipe says where the model can; or the
    losses of training there, where nothing is trained that retrieval could show."""
    if not retrieves(materials, recipe):
        dataset = pair_dataset(recipe, materials, held_out=True)
        losses = held_out(model, teacher, dataset, recipe.compute.precision == "bf16", errors)
        entry = {"losses": losses.losses, "metrics": losses.metrics}
        return Validated(entry, "loss", losses.total, f"held out {losses.text()}")
    regions = region_file(recipe, "validation", model.config)
    load = None if regions is None else region_loader(regions)
    found = evaluate_retrieval(
        model, materials.tokenizer, materials.validation, _config(model, materials, recipe), load
    )
    mean = found.best["r_mean"]
    return Validated({"towers": found.towers, "reranked": found.reranked}, "r_mean", mean, f"mean recall {mean:.2f} %")


def retrieves(materials: Materials, recipe: Recipe) -> bool:
    """Whether pictures and texts are aligned or matched by this training."""
    return materials.words is not None and not recipe.data.texts_only and getattr(materials.config, "retrieves", True)


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
    region_file(recipe, "validation", materials.config)
    if recipe.validation.score_rule and not isinstance(model, Matches):
        raise SettingsError("validation.score_rule", f"{type(model).__name__} matches no pairs; leave this setting out")
    if recipe.validation.captions and not isinstance(model, Captions):
        raise SettingsError("validation.captions", f"{type(model).__name__} writes no captions; leave this setting out")
    if not retrieves(materials, recipe):
        if recipe.validation.rerank:
            raise SettingsError("validation.rerank", "this training aligns and matches nothing; leave this setting out")
        return
    texts = int(caption_counts(materials.validation).sum())
    try:
        how_many(_config(model, materials, recipe), len(materials.validation), texts, model, [])
    except ValueError as error:
        raise SettingsError("validation.limit", str(error)) from error


def _config(model: nn.Module, materials: Materials, recipe: Recipe) -> RetrievalConfig:
    rerank = recipe.validation.rerank if isinstance(model, Matches) else 0
    return RetrievalConfig(rerank=rerank, score_rule=materials.score_rule or "itm", machine=_machine(recipe))


def _machine(recipe: Recipe) -> Machine:
    return Machine(precision="bfloat16" if recipe.compute.precision == "bf16" else "float32", progress=False)
