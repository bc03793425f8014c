"""`imglish explain IMAGE "text"`: where in the picture the model finds each word."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Write a picture with a heat map for each word: where in the image the model finds it (docs/explain.md).

  imglish explain dog.jpg "a brown dog in the snow" --model runs/flickr8k-albef/model
  imglish explain dog.jpg "a brown dog in the snow" --model MODEL --layer 3 --out dog.png

A model with cross-attention (ALBEF, BLIP) is explained by Grad-CAM of its matching score, one Transformer over the pair
(ViLT, VLMo, BEiT-3) by attention rollout. Towers alone (CLIP) see the text as a whole: one map, none for a word.
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 1 the picture cannot be read or the disk failed, 2 wrong arguments, or a model without maps."""
    parser = argparse.ArgumentParser(
        "imglish explain", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("image", metavar="IMAGE", type=Path)
    add("text", metavar="TEXT")
    add("--model", required=True, help="folder of an exported model, or a released checkpoint")
    add("--layer", type=int, help="of the fusion's cross-attention, from 0 (default: the middle one)")
    add("--out", type=Path, default=Path("explain.png"), help="the picture to write (default: explain.png)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    arguments = parser.parse_args(argv)

    from imglish.checkpoints.native import CheckpointError
    from imglish.data.images import ImageError
    from imglish.models.capabilities import MissingCapabilityError

    try:
        return _explain(arguments)
    except (CheckpointError, MissingCapabilityError, ValueError, TypeError) as error:
        print(f"imglish explain: {error}", file=sys.stderr)
        return 1 if isinstance(error, ImageError) else 2
    except OSError as error:
        print(f"imglish explain: {error}", file=sys.stderr)
        return 1


def _explain(arguments: argparse.Namespace) -> int:
    from imglish.api import load
    from imglish.data.images import decode
    from imglish.evaluation.heatmaps import draw

    if not arguments.text.strip():
        raise ValueError("the text is empty: there is nothing to look for")
    model = load(arguments.model, arguments.device)
    found = model.explain(arguments.image, arguments.text, arguments.layer)
    score = "cosine of the towers" if found.method == "grad-cam of towers" else "match"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    title = f"{arguments.text}   ({score} {found.score:.2f}, {found.method})"
    draw(decode(arguments.image), found, model.config.image.transform(), arguments.out, title)
    read, whole = (
        len(one.encode([arguments.text])[0]) for one in (model.tokenizer, model.tokenizer.with_max_length(10**6))
    )
    if read < whole:
        print(f"imglish explain: the text has {whole} tokens, the model reads the first {read}")
    if found.method == "grad-cam of towers":
        print("imglish explain: this model sees a text as one vector: one map for all of it, none for a word")
    elif not found.words:
        print(f"imglish explain: layer {arguments.layer} is the last, where the words do not look: no maps of words")
    print(f"{score} {found.score:.3f}; {found.method}, {len(found.words)} words: {arguments.out}")
    return 0
