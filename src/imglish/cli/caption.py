"""`imglish caption PICTURES...`: captions for files and folders."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from imglish.cli.writing import add_options, generation_config

if TYPE_CHECKING:
    from imglish.api import Model
    from imglish.generation.config import GenerationConfig
    from imglish.generation.stream import Captioned

DESCRIPTION = """\
Write captions for pictures: files, and folders with all that is in them.

  imglish caption photos --model runs/flickr8k-blip/model
  imglish caption a.jpg b.jpg --model MODEL --prompt "a photo of" --top-p 0.9 --n 5 --json
  imglish caption photos --model MODEL --out captions.jsonl

Prints "picture<TAB>caption" lines as soon as they are written, or JSON lines; pictures that cannot be read are named,
counted and left out.
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 1 pictures could not be read (the others are done) or the disk failed, 2 wrong arguments."""
    parser = argparse.ArgumentParser(
        "imglish caption", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("pictures", nargs="+", type=Path, metavar="PICTURE", help="files, or folders with all that is in them")
    add("--model", required=True, help="folder of an exported model that writes captions")
    add("--json", action="store_true", help="print JSON lines: picture, captions, scores")
    add("--out", type=Path, help="write JSON lines to this file in place of printing")
    add("--batch", type=int, default=16, help="pictures at a time (default: 16)")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add_options(parser, many=True)
    arguments = parser.parse_args(argv)

    from imglish.checkpoints.native import CheckpointError
    from imglish.models.capabilities import MissingCapabilityError

    try:
        return _caption(arguments)
    except (CheckpointError, MissingCapabilityError, ValueError) as error:
        print(f"imglish caption: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"imglish caption: {error}", file=sys.stderr)
        return 1


def _caption(arguments: argparse.Namespace) -> int:
    from imglish.api import load

    config = generation_config(arguments)
    if arguments.batch < 1:
        raise ValueError(f"--batch is {arguments.batch}: it has to be at least 1")
    pictures = _found(arguments.pictures)
    model = load(arguments.model, arguments.device)
    if arguments.out is None:
        return _stream(arguments, config, model, pictures, sys.stdout)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", encoding="utf-8") as file:
        return _stream(arguments, config, model, pictures, file)


def _stream(
    arguments: argparse.Namespace, config: GenerationConfig, model: Model, pictures: list[Path], file: IO[str]
) -> int:
    from tqdm import tqdm

    from imglish.data.errors import printable

    stream = model.caption_stream(
        pictures, config, arguments.prompt, block=arguments.batch, precision=arguments.precision
    )
    lines = arguments.json or arguments.out is not None
    unreadable = 0
    with tqdm(total=len(pictures), desc="captions", unit="picture", file=sys.stderr, smoothing=0.1) as bar:
        for one in stream:
            bar.update()
            if one.problem is not None:
                unreadable += 1
                bar.write(f"left out: {printable(str(one.problem))}", file=sys.stderr)
                continue
            bar.clear()
            file.write(_json_line(one) if lines else _text_lines(one))
            file.flush()
    done = len(pictures) - unreadable
    where = f" to {arguments.out}" if arguments.out is not None else ""
    print(f"captions of {done} pictures{where}; {unreadable} could not be read", file=sys.stderr)
    return 1 if unreadable else 0


def _json_line(one: Captioned[Any]) -> str:
    captions = [{"caption": c.text, "score": round(c.score, 4), "ended": c.ended} for c in one.captions]
    return json.dumps({"image": str(one.item), "captions": captions}, ensure_ascii=False) + "\n"


def _text_lines(one: Captioned[Any]) -> str:
    return "".join(f"{one.item}\t{caption.text}\n" for caption in one.captions)


def _found(given: Sequence[Path]) -> list[Path]:
    """Files as they are given; of folders all pictures in them, by name; each once."""
    from imglish.data.sources.folder import PICTURES

    found: dict[Path, None] = {}
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
            if not inside:
                raise ValueError(f"{path}: no picture in this folder (looked for {', '.join(PICTURES)})")
            found |= dict.fromkeys(inside)
        else:
            found[path] = None
    return list(found)
