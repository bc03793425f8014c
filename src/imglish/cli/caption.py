"""`imglish caption PICTURES...`: captions for files and folders, or for all pictures of a source of data."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from imglish.cli.source_options import add_source_options, source_config
from imglish.cli.workers import add_worker_options, device_of, failures, is_stage_folder, on_ray, said, worker_of
from imglish.cli.writing import add_options, generation_config

if TYPE_CHECKING:
    from imglish.api import Model
    from imglish.generation.config import GenerationConfig
    from imglish.generation.stream import Captioned

DESCRIPTION = """\
Write captions for pictures: files, folders with all that is in them, data of any layout.

  imglish caption photos --model runs/flickr8k-blip/model
  imglish caption a.jpg b.jpg --model MODEL --prompt "a photo of" --top-p 0.9 --n 5 --json
  imglish caption photos --model MODEL --out captions.jsonl
  imglish caption shards --model MODEL --top-p 0.9 --n 5 --out captions     # data of any layout, shard by shard

With --out a folder, the one argument is a source of data (docs/data.md): each of its shards becomes a parquet file of
captions; stopped, the command goes on where it was, and several workers may share the folder (docs/bootstrap.md).
Otherwise it prints "picture<TAB>caption" lines as soon as they are written, or JSON lines; pictures that cannot be read
are named, counted and left out.
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 1 pictures could not be read (the others are done) or the disk failed, 2 wrong arguments."""
    parser = argparse.ArgumentParser(
        "imglish caption", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "pictures", nargs="+", metavar="PICTURE", help="files, or folders with all that is in them; or a source of data"
    )
    add("--model", required=True, help="folder of an exported model that writes captions")
    add("--json", action="store_true", help="print JSON lines: picture, captions, scores")
    add(
        "--out",
        type=Path,
        help="write JSON lines to this file in place of printing, or captions of shards to this folder",
    )
    add("--batch", type=int, default=16, help="pictures at a time (default: 16)")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--pictures-only", action="store_true", help="of a source: its pictures may be without captions")
    add_options(parser, many=True)
    add_source_options(parser)
    add_worker_options(parser)
    arguments = parser.parse_args(argv)

    from imglish.checkpoints.native import CheckpointError
    from imglish.models.capabilities import MissingCapabilityError

    try:
        if not is_stage_folder(arguments.out):
            return _caption(arguments)
        return _shards(arguments) if arguments.ray is None else on_ray("caption", argv, arguments.ray)
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
    pictures = _found([Path(name) for name in arguments.pictures])
    model = load(arguments.model, arguments.device)
    if arguments.out is None:
        return _stream(arguments, config, model, pictures, sys.stdout)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", encoding="utf-8") as file:
        return _stream(arguments, config, model, pictures, file)


def _shards(arguments: argparse.Namespace) -> int:
    """Captions of a source of data, one parquet file a shard."""
    from imglish.api import load
    from imglish.bootstrapping.captioning import KIND, captioner, settings, speed, summary
    from imglish.bootstrapping.stage import Stage

    if len(arguments.pictures) != 1:
        raise ValueError("captions in a folder are of one source of data: give one, or --out FILE.jsonl")
    if arguments.batch < 1:
        raise ValueError(f"--batch is {arguments.batch}: it has to be at least 1")
    config, (rank, world) = generation_config(arguments), worker_of(arguments.worker)
    source = source_config(arguments, arguments.pictures[0], "images" if arguments.pictures_only else "pairs")
    model = load(arguments.model, device_of(arguments.device))
    about = settings(model, arguments.model, config, arguments.prompt, arguments.precision)
    stage = Stage.begin(arguments.out, KIND, about, source, arguments.per_shard)
    work = captioner(model, config, arguments.prompt, block=arguments.batch, precision=arguments.precision)
    done = stage.run(work, rank=rank, world=world, lease=arguments.lease, said=said)
    status = failures("imglish caption", stage, done)
    if any(stage.file(shard).exists() for shard in stage.shards):
        found = summary(stage)
        print(
            f"{found.captions} captions of {found.pictures} pictures in {arguments.out} ({speed(done, stage)}); "
            f"{found.repeated:.1%} repeat another of their picture, {found.shared:.1%} of any picture; "
            f"{found.unreadable} pictures could not be read"
        )
    return status


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
