"""Who works on what: a file for each shard in work, which its worker touches while it lives."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

TOUCHES = 4  # of a lease in the time after which it counts as dead


def _place() -> str:
    """Where process numbers mean something: this machine, and this container of it."""
    try:
        inner = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        inner = 0
    return f"{socket.gethostname()}:{inner}"


class Leases:
    """The leases of one worker in ``folder``; a context manager, inside which they are kept alive.

    seconds: a lease that was not touched for so long is dead. One whose process is gone is dead at once, where that
    can be seen. Two workers that take over the same dead lease at one moment may both believe to hold it: they then do
    the same work and write the same file, so leases save work and nothing depends on them.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"a lease of {seconds} seconds: it has to be above 0")
        self.folder, self.seconds, self.token = folder, seconds, uuid.uuid4().hex
        self._held: Path | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)

    def __enter__(self) -> Leases:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._held is not None:
            self.release()

    def take(self, name: str) -> bool:
        """Whether this worker may work on ``name``; it holds one lease at a time."""
        path = self.folder / f"{name}.lease"
        if self._make(path):
            return True
        dead = self._dead(path)
        if dead is None:
            return False
        aside = self.folder / f"{name}.{self.token}.dead"
        try:
            os.rename(path, aside)  # of several workers one gets through
            aside.unlink()
        except FileNotFoundError:
            return False
        for left in self.folder.glob(f"{name}.{dead}.part*"):
            left.unlink(missing_ok=True)
        return self._make(path)

    def part(self, name: str) -> Path:
        """A file that only this worker writes, for what it makes of ``name``."""
        return self.folder / f"{name}.{self.token}.part"

    def release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.unlink(missing_ok=True)

    def _make(self, path: Path) -> bool:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(handle, json.dumps({"token": self.token, "place": _place(), "process": os.getpid()}).encode())
        finally:
            os.close(handle)
        self._held = path
        return True

    def _dead(self, path: Path) -> str | None:
        """The token of the worker that held it, if that is dead; empty if it is not known."""
        try:
            age = time.time() - path.stat().st_mtime
            owner = json.loads(path.read_text())
            token, place, process = str(owner["token"]), owner["place"], int(owner["process"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):  # killed before it was written
            return "" if age > self.seconds else None
        gone = place == _place() and not _alive(process)
        return token if gone or age > self.seconds else None

    def _keep_alive(self) -> None:
        while not self._stop.wait(self.seconds / TOUCHES):
            held = self._held
            if held is not None:
                try:
                    os.utime(held)
                except FileNotFoundError:
                    continue  # released this moment, or taken over while this process was stopped


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
