"""`imglish index SOURCE --model CKPT --to INDEX`: make an index of pictures, bring it up to date, look after it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from imglish.cli.source_options import add_source_options, source_config

if TYPE_CHECKING:
    from imglish.api import Model
    from imglish.data.errors import Errors
    from imglish.search.manifest import Manifest
    from imglish.search.store import Store

DESCRIPTION = """\
Make an index of pictures for `imglish search` and `imglish serve`, or bring one up to date.

  imglish index photos --model runs/flickr8k-albef/model --to photos.index
  imglish index shards --model MODEL --to s3://bucket/index
  imglish index photos --to photos.index                  new, changed and deleted pictures; the model is known
  imglish index --to photos.index --check                 recall@10 and latency, with the captions as queries
  imglish index --to photos.index --calibrate val.jsonl   so that match probabilities mean what they say
  torchrun --nproc-per-node 8 -m imglish index ...        many processes write one index

SOURCE is a folder with all that is in it, or any other layout (docs/data.md). The command may be stopped at any moment:
it goes on where it was. Pictures that cannot be read are left out, counted, and named in errors.csv in the index.
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 1 the disk, the store or too many pictures failed, 2 wrong arguments, model or data."""
    arguments = _parser().parse_args(argv)

    from imglish.checkpoints.native import CheckpointError
    from imglish.data.errors import DataError
    from imglish.data.images import ImageError
    from imglish.models.capabilities import MissingCapabilityError
    from imglish.search.store import StoreError
    from imglish.training.settings import SettingsError

    try:
        return _index(arguments)
    except (StoreError, OSError, ImageError) as error:
        print(f"imglish index: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, DataError, MissingCapabilityError, SettingsError, ValueError) as error:
        print(f"imglish index: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "imglish index", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", nargs="?", help="folder, file or URL of pictures (default: none, with one of the jobs below)")
    add("--to", required=True, metavar="INDEX", help="the index: a folder, or a URL of object storage")
    add("--model", help="the model (default: the one that the index was made with)")
    add("--tokens", choices=("bfloat16", "int8"), help="keep image tokens: reranking never encodes a picture again")
    add("--thumbnail", type=int, default=512, metavar="SIDE", help="longest side of kept pictures, 0: none (512)")
    add("--prefix", default="", help="put before the names of the pictures, for several sources in one index")
    add("--keep-missing", action="store_true", help="pictures that are gone from the source stay in the index")
    add("--no-duplicates", action="store_true", help="do not look for duplicates")
    add("--batch", type=int, default=32, help="pictures at a time (default: 32)")
    add("--commit", type=int, default=512, help="pictures a commit (default: 512)")
    add("--decoders", type=int, default=4, help="threads that read pictures (default: 4)")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--wait", type=float, default=0.0, metavar="SECONDS", help="for another process that writes (default: 0)")
    jobs = parser.add_argument_group("jobs, after indexing or without it")
    jobs.add_argument("--check", action="store_true", help="measure recall@10 and latency with texts")
    jobs.add_argument("--queries", type=Path, metavar="FILE", help="the texts of --check, one a line (captions)")
    jobs.add_argument("--calibrate", metavar="DATA", help="calibrate match probabilities on these held-out captions")
    jobs.add_argument("--calibrate-split", metavar="SPLIT", help="only this split of them")
    jobs.add_argument("--calibrate-limit", type=int, default=1000, metavar="N", help="pictures of them (default: 1000)")
    jobs.add_argument("--optimize", action="store_true", help="put the data in order")
    jobs.add_argument("--info", action="store_true", help="say what the index is")
    add_source_options(parser)
    parser.set_defaults(max_errors=0.5)
    return parser


def _index(arguments: argparse.Namespace) -> int:
    from imglish.objectives.gather import rank
    from imglish.search import manifest as manifests
    from imglish.search.store import open_store
    from imglish.training.ranks import pick_device, process_group

    jobs = (arguments.check, arguments.calibrate, arguments.optimize, arguments.info)
    if arguments.source is None and not any(jobs):
        raise ValueError("nothing to do: give a SOURCE, or --check, --calibrate, --optimize, --info")
    device = pick_device(arguments.device)
    with process_group(device):
        store = None if arguments.source is not None else open_store(arguments.to)
        if arguments.source is not None:
            store = _update(arguments, str(device))
        if rank() > 0:
            return 0
        assert store is not None
        kept = manifests.read(store)
        if arguments.optimize:
            store.optimize()
        if arguments.calibrate or arguments.check:
            _measure(arguments, store, kept, str(device))
        if arguments.info:
            print(_said(store, manifests.read(store)))
        store.close()
    return 0


def _model(arguments: argparse.Namespace, kept: Manifest | None, device: str) -> tuple[Model, str]:
    """The model and where it lies; one that is named is checked against the index."""
    from imglish.api import load
    from imglish.search import manifest as manifests

    if arguments.model is None and kept is None:
        raise ValueError(f"{arguments.to} is new: name the model that it is made with (--model)")
    name = _full(arguments.model) if arguments.model is not None else kept.model if kept is not None else ""
    model = load(name, device)
    if kept is not None:
        manifests.check(kept, manifests.describe(model, name), arguments.to)
    return model, name


def _full(path: str) -> str:
    """A path that means the same from every folder; names and URLs as they are."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _update(arguments: argparse.Namespace, device: str) -> Store:
    from imglish.data.errors import FILE, Errors
    from imglish.data.sources import open_source
    from imglish.objectives.gather import rank
    from imglish.search import manifest as manifests
    from imglish.search.indexing import IndexConfig, index_records, prepare
    from imglish.search.store import StoreError, open_store

    config = IndexConfig(
        thumbnail=arguments.thumbnail,
        tokens=arguments.tokens or "",
        batch=arguments.batch,
        commit=arguments.commit,
        precision=arguments.precision,
        decoders=arguments.decoders,
        prefix=arguments.prefix,
        keep_missing=arguments.keep_missing,
        duplicates=not arguments.no_duplicates,
        wait=arguments.wait,
    )
    records = open_source(source_config(arguments, arguments.source, "pictures"))
    try:
        kept = manifests.read(open_store(arguments.to))
    except StoreError:
        kept = None  # not there yet; anything else shows when it is opened to be written
    model, name = _model(arguments, kept, device)
    store = open_store(arguments.to, manifests.dimension_of(model))
    manifest = prepare(store, model, name, config)
    local = Path(arguments.to) if "://" not in arguments.to and rank() == 0 else None
    errors: Errors = Errors(arguments.max_errors, local / FILE if local is not None else None, quiet=rank() > 0)
    errors.extend(records.errors.named)
    summary = index_records(store, model, records, _full(arguments.source), manifest, config, errors)
    if rank() == 0:
        print(summary.text())
        spent = summary.seconds
        print(
            f"seconds: {spent['all']:.1f}, of them encode {spent['encode']:.1f}, write {spent['write']:.1f}; the "
            f"threads read for {spent['read']:.1f}"
        )
        if len(errors):
            print(f"left out: {errors.summary()}" + (f"; named in {local / FILE}" if local is not None else ""))
    return store


def _measure(arguments: argparse.Namespace, store: Store, kept: Manifest | None, device: str) -> None:
    from imglish.data.sources import open_source
    from imglish.search import manifest as manifests
    from imglish.search.calibration import calibrate
    from imglish.search.checking import check_recall

    if kept is None:
        raise manifests.ManifestError(f"{arguments.to} has no manifest: it is no finished index")
    model, _ = _model(arguments, kept, device)
    if arguments.calibrate:
        config = replace(source_config(arguments, arguments.calibrate), split=arguments.calibrate_split)
        records = open_source(config)[: arguments.calibrate_limit]
        found = calibrate(model, records, arguments.calibrate)
        with store.writing(arguments.wait):
            manifests.write(store, replace(kept, calibration=found))
        print(
            f"calibrated on {found.queries} captions of {found.data}: the error of match probabilities went from "
            f"{found.error_before:.3f} to {found.error_after:.3f}"
        )
    if arguments.check:
        texts: list[str] = []
        if arguments.queries is not None:
            lines = arguments.queries.read_text(encoding="utf-8").splitlines()
            texts = [line.strip() for line in lines if line.strip()]
        print(check_recall(store, model, texts).text())


def _said(store: Store, kept: Manifest | None) -> str:
    info = store.info()
    lines = [f"{info.rows} pictures, version {info.version}, {info.engine}, recall: {info.recall}"]
    if info.size is not None:
        lines.append(f"{info.size / 2**20:.1f} MiB on this disk")
    if kept is not None:
        thumbnails = f"thumbnails of {kept.thumbnail} pixels" if kept.thumbnail else "no thumbnails"
        lines.append(
            f"model {kept.name}; {thumbnails}, " + (f"tokens as {kept.tokens}" if kept.tokens else "no tokens")
        )
        c = kept.calibration
        lines.append(f"match probabilities calibrated on {c.data}" if c else "match probabilities are not calibrated")
    return "\n".join(lines)
