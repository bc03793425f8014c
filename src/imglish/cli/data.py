"""`imglish data JOB ...`: look at data, write them in another layout, draw them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

JOBS = {
    "inspect": ("imglish.cli.data_inspect", "count, look for duplicates, leaks and broken items, and write a page"),
    "shard": ("imglish.cli.data_shard", "write data of any layout as tar shards"),
    "scenes": ("imglish.cli.data_scenes", "draw pictures of dressed people, with captions, to a folder"),
}


def _usage() -> str:
    width = max(map(len, JOBS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in JOBS.items())
    return f"usage: imglish data JOB ...\n\njobs:\n{rows}\n\nimglish data JOB --help shows what a job takes."


def main(argv: Sequence[str]) -> int:
    """Status: 0 well, 1 the data or the disk failed, 2 wrong usage."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    job, *rest = argv
    if job not in JOBS:
        print(f"imglish data: there is no job {job!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    status: int = import_module(JOBS[job][0]).main(rest)
    return status
