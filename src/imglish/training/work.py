"""What a run trains on and is judged by: pairs with a model's own objectives; tasks are in :mod:`.finetuning`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from imglish.data.errors import Errors
from imglish.data.loader import Position, Samples, training_batches
from imglish.data.records import Record
from imglish.models.capabilities import MissingCapabilityError
from imglish.models.heads import for_assignment
from imglish.objectives.gather import rank, world_size
from imglish.report import Report
from imglish.training.config import Recipe
from imglish.training.settings import SettingsError
from imglish.training.setup import Materials, beside_pairs, gather_materials, mixtures, new_model, pair_dataset
from imglish.training.validation import Validated, check_validation, retrieves, validate, validate_captions

SHOWN = 12  # pictures with captions in the report of a model that writes some
Events = Sequence[Mapping[str, Any]]


class Work(Protocol):
    """materials: tokenizer, configuration, start; items: how many make an epoch; validates: whether anything is held
    out."""

    materials: Materials
    items: int
    validates: bool

    def new_model(self) -> nn.Module: ...

    def check(self, model: nn.Module) -> None:
        """SettingsError where a validation could not be done, before any training."""
        ...

    def told(self) -> str:
        """How much there is, in words."""
        ...

    def batches(self, position: Position, workers: int, errors: Errors) -> Iterator[tuple[Any, Position]]: ...

    def validate(self, model: nn.Module, teacher: Any, errors: Errors) -> Validated: ...

    def finish(self, model: nn.Module) -> Callable[[Report, Events], None]:
        """What all ranks do at the end; returns what writes their findings into the report."""
        ...


def batches_of(
    recipe: Recipe, dataset: Samples, position: Position, workers: int, errors: Errors, **more: Any
) -> Iterator[tuple[Any, Position]]:
    """This rank's batches of ``dataset`` as the recipe wants them; more: of :func:`training_batches`."""
    return training_batches(
        dataset,
        recipe.batch.size,
        position,
        seed=recipe.seed,
        rank=rank(),
        world_size=world_size(),
        workers=workers,
        errors=errors,
        **more,
    )


class PairWork:
    """Pictures and captions, the objectives of the model, retrieval (and captions) as validation."""

    def __init__(
        self,
        recipe: Recipe,
        records: Sequence[Record] | None = None,
        validation: Sequence[Record] | None = None,
        resumed: dict[str, Any] | None = None,
        errors_file: Path | None = None,
    ) -> None:
        self.recipe = recipe
        self.materials = gather_materials(recipe, records, validation, resumed, errors_file)
        self.dataset = pair_dataset(recipe, self.materials)
        self.beside = beside_pairs(recipe, self.materials)
        self.items = len(self.dataset)
        self.validates = bool(self.materials.validation)
        self.written: Any = None

    def new_model(self) -> nn.Module:
        return new_model(self.materials, self.recipe.seed)

    def check(self, model: nn.Module) -> None:
        check_validation(model, self.materials, self.recipe)

    def told(self) -> str:
        return f"{self.items} training pairs, {len(self.materials.validation)} validation pictures"

    def batches(self, position: Position, workers: int, errors: Errors) -> Iterator[tuple[Any, Position]]:
        mixgen = mixtures(self.recipe, self.materials)
        return batches_of(self.recipe, self.dataset, position, workers, errors, mixgen=mixgen, beside=self.beside)

    def validate(self, model: nn.Module, teacher: Any, errors: Errors) -> Validated:
        found = validate(model, teacher, self.materials, self.recipe, errors)
        self.written = self._write_captions(model, self.recipe.validation.captions)
        if self.written is None:
            return found
        scores = self.written.metrics
        text, beside = f"{found.text}, CIDEr-D {scores['cider']:.1f}", {"captions": scores}
        if retrieves(self.materials, self.recipe):
            return replace(found, text=text, beside=beside)
        return replace(found, text=text, beside=beside, measure="cider", value=scores["cider"])

    def finish(self, model: nn.Module) -> Callable[[Report, Events], None]:
        written = self.written or self._write_captions(model, SHOWN)  # those of the last validation, if it made some
        from imglish.training.summary import add_retrieval

        return partial(add_retrieval, written=written, materials=self.materials)

    def _write_captions(self, model: nn.Module, limit: int) -> Any:
        """Captions of the first validation pictures, where the model writes some and there are pictures."""
        return validate_captions(model, self.materials, self.recipe, limit)


class AssignmentWork(PairWork):
    """Text assignment on pairs, which prepares ALBEF for NLVR2 and is judged there."""

    def __init__(self, recipe: Recipe, *rest: Any) -> None:
        super().__init__(recipe, *rest)
        if self.validates:
            raise SettingsError("validation.data", "text assignment is judged by the NLVR2 that follows; leave it out")

    def new_model(self) -> nn.Module:
        try:
            return for_assignment(super().new_model())
        except MissingCapabilityError as error:
            raise SettingsError("model", str(error)) from error

    def check(self, model: nn.Module) -> None:
        """Nothing is validated."""
