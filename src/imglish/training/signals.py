"""SIGTERM and SIGINT end a run after its step, with a checkpoint; a second signal ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WATCHED = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818 (no error: it was asked for)
    """Raised out of work that may be broken off (validation), when a signal comes."""


class StopSignal:
    """While the block ``with`` it runs, the first signal sets ``came`` instead of ending the process."""

    def __init__(self) -> None:
        self.came: str | None = None
        self._before: dict[int, Any] = {}
        self._breakable = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in WATCHED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def breakable(self, wanted: bool = True) -> Iterator[None]:
        """Inside, a signal raises :class:`Interrupted` (if ``wanted``)."""
        if wanted and self.came:
            raise Interrupted(self.came)
        self._breakable = wanted
        try:
            yield
        finally:
            self._breakable = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.came = signal.Signals(number).name
        for watched, handler in self._before.items():
            signal.signal(watched, handler)
        if self._breakable:
            self._breakable = False
            raise Interrupted(self.came)
