"""What a person says about a source of data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from imglish.data.errors import DataError

Kind = Literal["table", "list", "coco", "karpathy", "folder", "tars", "parquet", "arrow", "lines", "mixture", "scenes"]
Needs = Literal["pairs", "images", "pictures", "texts", "names"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NEEDS: tuple[Needs, ...] = get_args(Needs)


@dataclass(frozen=True)
class SourceOptions:
    """How data are read.

    kind: of layout, see docs/data.md (None: recognised from what lies there). strip: what to remove from the beginning
    of the names of pictures (absolute paths of another machine). split_field: field of the split. language: keep rows
    whose field ``language`` or ``lang`` says it, and of captions by language those. image_field, caption_fields: names
    of fields (None, empty: the usual ones; a dot reaches into nested ones), all caption fields count. group_field,
    swapped_field: of the group label and of the wrong captions. template: of captions made from folder names, ``{}`` is
    the name. max_errors: share of the records that may be unusable. index: folder for the index of tars (None: beside
    them, or the cache folder where that cannot be written).
    """

    kind: Kind | None = None
    strip: str = ""
    split_field: str = "split"
    language: str | None = None
    image_field: str | None = None
    caption_fields: tuple[str, ...] = ()
    group_field: str = "group"
    swapped_field: str | None = None
    template: str = "{}"
    max_errors: float = 0.01
    index: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise DataError(f"there is no kind of source {self.kind!r}; known: {', '.join(KINDS)}")
        if isinstance(self.caption_fields, str):
            raise TypeError("caption_fields is a tuple of names, not one name")
        if "{}" not in self.template:
            raise DataError(f"the template {self.template!r} has no {{}} for the name")
        if not 0 <= self.max_errors <= 1:
            raise DataError(f"max_errors is {self.max_errors}: it is a share, 0..1")


@dataclass(frozen=True)
class SourceConfig(SourceOptions):
    """Data at ``path``, a file, a folder, a pattern of tars (``shards/{00000..00099}.tar``) or a URL of object storage.

    images: folder that the names of pictures are relative to (None: the usual places beside the file); pictures outside
    of it are refused. split: keep records whose ``split_field`` is one of these: ``train``, ``train+restval``,
    ``not val+test``. needs: what every record must have; with ``images`` captions are left out, with ``pictures`` they
    may be missing, with ``texts`` there are no pictures, with ``names`` pictures are named and not looked for (models
    that read regions). by_split: records of different splits stay apart, also those of one picture, and their group is
    the split. weight: in a mixture.
    """

    path: str = field(kw_only=True)
    images: str | None = None
    split: str | None = None
    needs: Needs = "pairs"
    by_split: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.needs not in NEEDS:
            raise DataError(f"{self.path}: needs is {self.needs!r}: choose {', '.join(NEEDS)}")


def from_mapping(data: Mapping[str, Any], where: str) -> SourceConfig:
    """A config from plain data (YAML, JSON). Unknown names and wrong types raise :class:`DataError`."""
    types: dict[str, tuple[type, ...]] = {"weight": (int, float), "max_errors": (int, float), "caption_fields": (list,)}
    known = [known.name for known in fields(SourceConfig)]
    if "path" not in data:
        raise DataError(f"{where}: a source without a path")
    values = dict(data)
    if isinstance(values.get("caption_fields"), str):
        values["caption_fields"] = [values["caption_fields"]]
    for name, value in values.items():
        if name not in known:
            raise DataError(f"{where}: there is no setting {name!r} of a source; known: {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, (*types.get(name, (str,)), type(None))):
            raise DataError(f"{where}: {name} is {value!r}")
    values["caption_fields"] = tuple(values.get("caption_fields") or ())
    return SourceConfig(**values)


def in_split(wanted: str | None, split: object) -> bool:
    """Whether a record with this ``split`` is wanted."""
    if wanted is None:
        return True
    names = wanted.removeprefix("not ").split("+")
    return (str(split) in names) != wanted.startswith("not ")
