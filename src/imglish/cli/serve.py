"""`imglish serve INDEX`: the search in a browser."""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imglish.web.guard import Settings

KEY = "IMGLISH_API_KEY"
DESCRIPTION = f"""\
Search an index in a browser, and over HTTP (documented at /openapi.json).

  imglish serve photos.index
  imglish serve photos.index --port 9000 --rerank 20
  imglish serve photos.index --host 0.0.0.0 --key-file key.txt

Answers this machine alone unless --host says otherwise; then an API key of at least 16 characters is needed, in a file
or in the environment variable {KEY}.
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 stopped by the person, 1 the address or the index cannot be used, 2 wrong arguments."""
    parser = argparse.ArgumentParser(
        "imglish serve", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("index", help="folder or URL of an index, as imglish index makes it")
    add("--model", help="where the index's model lies now (default: where it lay when the index was made)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8321, help="0: any that is free (default: 8321)")
    add("--key-file", type=Path, help=f"file with the API key (default: the environment variable {KEY})")
    add("--allow-host", action="append", default=[], metavar="NAME", help="answer to this name too, as behind a proxy")
    add("--rerank", type=int, default=40, help="pictures that are reranked, 0 to 100 (default: 40)")
    add("--max-upload", type=int, default=20, metavar="MIB", help="largest picture that can be sent (default: 20)")
    add("--queue", type=int, default=64, help="searches that may wait; more are refused (default: 64)")
    arguments = parser.parse_args(argv)

    from imglish.checkpoints.native import CheckpointError
    from imglish.models.capabilities import MissingCapabilityError
    from imglish.search.manifest import ManifestError
    from imglish.search.store import StoreError

    try:
        return _serve(arguments)
    except (CheckpointError, MissingCapabilityError, ManifestError, ValueError) as error:
        print(f"imglish serve: {error}", file=sys.stderr)
        return 2
    except (StoreError, OSError) as error:
        print(f"imglish serve: {error}", file=sys.stderr)
        return 1


def _serve(arguments: argparse.Namespace) -> int:
    try:
        import uvicorn

        from imglish.web.app import create
    except ImportError as error:
        raise ValueError(f'this needs {error.name}, which is not installed: pip install "imglish[serve]"') from error
    from imglish import search

    settings = _settings(arguments)
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    with socket.create_server((arguments.host, arguments.port), family=family) as listener:
        index = search.open(arguments.index, arguments.model, arguments.device)
        try:
            app = create(index, settings)
            host = f"[{arguments.host}]" if family == socket.AF_INET6 else arguments.host
            print(f"{index.info().rows:,} pictures at http://{host}:{listener.getsockname()[1]}/  (Ctrl-C stops)")
            sys.stdout.flush()
            config = uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,  # it would hold what people search for
                server_header=False,
                proxy_headers=False,
                limit_concurrency=500,
                timeout_graceful_shutdown=5,
            )
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            index.close()
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    from imglish.web.guard import LOOPBACK, Settings

    for name, low, high in (("port", 0, 65535), ("rerank", 0, 100), ("max_upload", 1, 1024), ("queue", 1, 100_000)):
        if not low <= getattr(arguments, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: expected {low} to {high}")
    key = arguments.key_file.read_text(encoding="utf-8").strip() if arguments.key_file else os.environ.get(KEY, "")
    local = _is_loopback(arguments.host)
    if not local and not key:
        raise ValueError(f"--host {arguments.host} lets other machines in: give an API key with --key-file or in {KEY}")
    hosts = (*LOOPBACK, *(name.lower() for name in arguments.allow_host)) if local or arguments.allow_host else None
    return Settings(
        key=key or None,
        hosts=hosts,
        upload=arguments.max_upload * 2**20,
        waiting=arguments.queue,
        rerank=arguments.rerank,
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
