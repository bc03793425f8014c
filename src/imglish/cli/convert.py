"""`imglish convert`: a released checkpoint as a folder of this library, with an account of what was done."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imglish.checkpoints.native import Loaded

DESCRIPTION = """\
Read a checkpoint of another project and write it as a folder that every command here takes.

  imglish convert ALBEF.pth models/albef --tokenizer bert-base-uncased/vocab.txt
  imglish convert hf:Salesforce/blip-itm-base-coco models/blip-itm

What it is, is recognised from its names; every name is accounted for, and what is left out is said with the reason.
No code in a file is ever run.
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 2 a checkpoint that cannot be read or does not fit."""
    parser = argparse.ArgumentParser(
        "imglish convert", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="file, folder, or hf:OWNER/NAME on the Hugging Face hub")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--tokenizer", help="its file, where none lies beside the weights")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--classes", help="JSON file with the names of a task's answers (a list, or name: number)")
    arguments = parser.parse_args(argv)

    from imglish.checkpoints.loading import load_any
    from imglish.checkpoints.native import CheckpointError, export

    try:
        loaded = load_any(arguments.source, arguments.tokenizer, arguments.revision, classes=arguments.classes)
        written = export(arguments.out, loaded.model, loaded.words, loaded.meta, loaded.score_rule)
    except CheckpointError as error:
        print(f"imglish convert: {error}", file=sys.stderr)
        return 2
    parameters = sum(p.numel() for p in loaded.model.parameters())
    origin = loaded.meta.get("from", {})
    print(f"{arguments.source}: {origin.get('format', loaded.config.family)}, {parameters / 1e6:.1f} M parameters")
    for reason, count in Counter(loaded.meta.get("conversion", {}).values()).most_common():
        print(f"  {count} {'name' if count == 1 else 'names'}: {reason}")
    print(f"written to {written}{_use(loaded)}")
    return 0


def _use(loaded: Loaded) -> str:
    """What the model is for."""
    from imglish.models.heads import HeadConfig

    head = getattr(loaded.model, "head", None)
    if isinstance(head, HeadConfig):
        if head.form == "answers":
            return f"; it writes answers ({head.task})"
        unnamed = head.classes == tuple(str(number) for number in range(len(head.classes)))
        more = ", called by their numbers: --classes FILE names them" if unnamed else ""
        return f"; it chooses among {len(head.classes)} classes ({head.task}){more}"
    return "" if loaded.words is None else f"; pairs are ranked by {loaded.score_rule}"
