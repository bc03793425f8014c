"""`imglish export`: a model in our form, in that of transformers, as ONNX, or on the hub."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imglish.checkpoints.native import Loaded

DESCRIPTION = """\
Write a model for others, or put it on the hub.

  imglish export runs/flickr8k/model out                             # ours: safetensors, JSON, tokenizer
  imglish export runs/flickr8k/model out --image-size 384            # positions fitted to other pictures
  imglish export runs/blip/model out --layout transformers --kind captioning
  imglish export runs/flickr8k/model out --layout onnx               # image, text and match graphs, checked
  imglish export runs/flickr8k/model out --push me/flickr8k --dry-run

A model that transformers has no class for, or that its settings cannot express, is refused.
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 2 a model that cannot be read or written so."""
    parser = argparse.ArgumentParser(
        "imglish export", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="anything that imglish.load takes")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--layout", choices=("imglish", "transformers", "onnx"), default="imglish")
    parser.add_argument("--kind", help="which class of transformers: matching, captioning, words, ...")
    parser.add_argument("--tokenizer", help="its file, where none lies beside released weights")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--image-size", type=int, help="pixels a side, other than the model was trained with")
    parser.add_argument("--max-length", type=int, help="tokens of the longest text")
    parser.add_argument("--push", metavar="OWNER/NAME", help="then upload the folder, with a page about the model")
    parser.add_argument("--licence", help="of the weights, for that page (mit, apache-2.0, ...)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="write the folder and its page, upload nothing")
    arguments = parser.parse_args(argv)
    if arguments.kind is not None and arguments.layout != "transformers":
        parser.error("--kind goes with --layout transformers")
    if arguments.layout == "onnx" and arguments.push is not None:
        parser.error("--push uploads the layouts imglish and transformers")
    if arguments.push is None and (arguments.private or arguments.dry_run or arguments.licence):
        parser.error("--private, --licence and --dry-run go with --push")

    from imglish.checkpoints.loading import load_any
    from imglish.checkpoints.native import CheckpointError

    try:
        loaded = load_any(
            arguments.model, arguments.tokenizer, arguments.revision, arguments.image_size, arguments.max_length
        )
        written = _write(loaded, arguments)
        if arguments.push is not None:
            _push(loaded, written, arguments)
    except CheckpointError as error:
        print(f"imglish export: {error}", file=sys.stderr)
        return 2
    return 0


def _write(loaded: Loaded, arguments: argparse.Namespace) -> Path:
    from imglish.checkpoints.hf_export import export_transformers
    from imglish.checkpoints.native import export
    from imglish.checkpoints.onnx_export import export_onnx

    for name, change in loaded.meta.get("resized", {}).items():
        print(f"  {name}: {change}")
    if arguments.layout == "imglish":
        written = export(arguments.out, loaded.model, loaded.words, loaded.meta, loaded.score_rule)
    elif arguments.layout == "onnx":
        written, differences = export_onnx(arguments.out, loaded)
        for name, difference in differences.items():
            print(f"  {name}.onnx: at most {difference:.1e} from the model, relative, in onnxruntime on random input")
    else:
        written, left_out = export_transformers(arguments.out, loaded, arguments.kind)
        for reason, count in Counter(left_out.values()).items():
            print(f"  {count} {'name' if count == 1 else 'names'} left out: {reason}")
    print(f"written to {written} ({arguments.layout})")
    return written


def _push(loaded: Loaded, written: Path, arguments: argparse.Namespace) -> None:
    from imglish.checkpoints.card import model_card
    from imglish.checkpoints.pushing import push

    card = model_card(loaded, arguments.push, arguments.layout, arguments.licence)
    files = push(written, arguments.push, card, arguments.private, arguments.dry_run)
    print(f"{'would upload' if arguments.dry_run else 'uploaded'} to {arguments.push}:")
    for name, size in files:
        print(f"  {name} ({size / 1e6:.1f} MB)")
