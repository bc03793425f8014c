"""`imglish data shard SOURCE OUT`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from imglish.cli.source_options import add_source_options, source_config

DESCRIPTION = """\
Write data of any layout as tar shards: upright pictures at one shorter side, captions, checksums.

  imglish data shard photos/captions.csv shards --side 288
  imglish data shard photos shards --needs images --workers 8

The same command goes on where it was stopped. What cannot be used is named in OUT/errors.csv.
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 1 the data or the disk failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        "imglish data shard", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="file, folder or URL of the data")
    add("out", help="folder for the shards")
    add("--needs", choices=("pairs", "images", "texts"), default="pairs", help="what every record must have")
    add("--side", type=int, default=288, help="shorter side of the pictures, 0: as they are (default: 288)")
    add("--per-shard", type=int, default=10_000, help="records of a shard (default: 10000)")
    add("--format", choices=("jpeg", "webp", "png"), default="jpeg")
    add("--quality", type=int, default=95, help="of JPEG and WebP (default: 95)")
    add("--sidecar", choices=("parquet", "jsonl"), help="table beside each tar (default: parquet with pyarrow)")
    add("--workers", type=int, default=1, help="processes (default: 1)")
    add_source_options(parser)
    arguments = parser.parse_args(argv)

    from imglish.data.errors import FILE, DataError
    from imglish.data.shards import ShardConfig, shard
    from imglish.data.sources import open_source

    try:
        config = ShardConfig(
            side=arguments.side or None,
            per_shard=arguments.per_shard,
            format=arguments.format,
            quality=arguments.quality,
            sidecar=arguments.sidecar,
            workers=arguments.workers,
            max_errors=arguments.max_errors,
        )
        source = source_config(arguments, arguments.source, arguments.needs)
        report = shard(open_source(source, errors_file=Path(arguments.out) / FILE), arguments.out, config)
    except (DataError, OSError) as error:
        print(f"imglish data shard: {error}", file=sys.stderr)
        return 1
    print(f"{report.written:,} records in {report.shards} shards, {report.size / 2**20:.1f} MiB: {report.out}")
    if len(report.errors):
        print(f"{len(report.errors)} records could not be used ({report.errors.summary()}): {report.out / FILE}")
    return 0
