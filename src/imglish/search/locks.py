"""One writer at a time: a lock file that ends with its process."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imglish.search.store import StoreError

_PAUSE = 0.1  # seconds between two attempts


@contextmanager
def writer_lock(path: Path, what: str, wait: float) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs; what: is written to, for messages.

    Raises :class:`StoreError`, which names the process that holds it, after ``wait`` seconds.
    """
    end = time.monotonic() + wait
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not _taken(handle):
            if time.monotonic() >= end:
                holder = os.pread(handle, 200, 0).decode("utf-8", "replace").strip() or "another process"
                raise StoreError(
                    f"{what} is being written to by {holder}; wait until it is done (--wait SECONDS), or stop it"
                )
            time.sleep(_PAUSE)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)  # and with it the lock


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
