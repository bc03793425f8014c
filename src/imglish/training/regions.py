"""Regions of a detector in place of pictures: the file that a recipe names, and what cannot be done with them."""

from __future__ import annotations

from typing import Any, Literal

from imglish.data.regions import RegionFile, RegionFileError
from imglish.models.vilt_pictures import RegionInput
from imglish.training.config import Recipe
from imglish.training.settings import SettingsError


def reads_regions(config: Any) -> bool:
    """Whether a model of this configuration reads regions in place of pixels."""
    return isinstance(getattr(config, "image", None), RegionInput)


def region_file(recipe: Recipe, group: Literal["data", "validation"], config: Any) -> RegionFile | None:
    """The region file of the recipe's ``data`` or ``validation``; None for a model that reads pixels.

    Raises :class:`SettingsError` where recipe, file and model do not fit: a file that is missing, not wanted or of
    another number of features, and in training a crop, a mirror image or an augmentation of regions.
    """
    path = recipe.data.regions if group == "data" else recipe.validation.regions
    if not reads_regions(config):
        if path is not None:
            raise SettingsError(f"{group}.regions", f"a model of family {config.family} with pixels reads no regions")
        return None
    if path is None:
        raise SettingsError(f"{group}.regions", "this model reads the regions of a detector: name a region file")
    if group == "data":
        _check_untouched(recipe)
    try:
        file = RegionFile(path)
    except RegionFileError as error:
        raise SettingsError(f"{group}.regions", str(error)) from error
    wanted = config.image.features
    if file.width != wanted:
        raise SettingsError(
            f"{group}.regions",
            f"{path}: {file.width} numbers a region, the model reads {wanted}; set model.image.features={file.width}",
        )
    return file


def _check_untouched(recipe: Recipe) -> None:
    """Features of a box are those of its pixels as the detector saw them."""
    for key, off in {"crop": None, "flip": False, "augment": None}.items():
        if getattr(recipe.data, key) != off:
            text = "null" if off is None else "false"
            raise SettingsError(f"data.{key}", f"regions of a detector are read as they are; set data.{key}={text}")
