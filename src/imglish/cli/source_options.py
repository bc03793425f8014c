"""Options that say which data a command reads; the same for all commands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imglish.data.sources import Needs, SourceConfig


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Everything about the data except their path."""
    add = parser.add_argument
    add("--kind", help="layout of the data (default: recognised; docs/data.md lists them)")
    add("--images", help="folder that the names of pictures are relative to (default: where the file lies)")
    add("--split", help="only this split; also train+restval, 'not test'")
    add("--split-field", default="split", help="field that holds the split (default: split)")
    add("--captions", help="fields that hold captions, separated by commas (default: captions, caption, ...)")
    add("--image-field", help="field that holds the picture's path or bytes (default: image, file_name, ...)")
    add("--language", help="only captions in this language, where the data say it")
    add("--strip", default="", help="beginning to take off the names of pictures")
    add("--template", default="{}", help="captions from folder names (default: {}; try 'a photo of a {}')")
    add(
        "--max-errors", type=float, default=0.01, metavar="SHARE", help="of the records that may be bad (default: 0.01)"
    )
    add("--index", help="folder for the index of tar files (default: beside them)")


def source_config(arguments: argparse.Namespace, path: str, needs: Needs = "pairs") -> SourceConfig:
    """What the options say. Raises ``DataError``."""
    from imglish.data.sources import SourceConfig

    fields = arguments.captions.split(",") if arguments.captions else []
    return SourceConfig(
        path=path,
        kind=arguments.kind,
        images=arguments.images,
        split=arguments.split,
        split_field=arguments.split_field,
        caption_fields=tuple(name.strip() for name in fields if name.strip()),
        image_field=arguments.image_field,
        language=arguments.language,
        strip=arguments.strip,
        template=arguments.template,
        max_errors=arguments.max_errors,
        index=arguments.index,
        needs=needs,
    )
