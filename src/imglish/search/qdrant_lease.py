"""The right to write to a collection of a server, where no lock of a file system reaches all writers: a lease."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from imglish.search.qdrant_rows import point_id
from imglish.search.store import StoreError

SECONDS = 30.0  # that a lease lasts after its holder was last heard of; clocks of writers may differ by less
_PAUSE = 0.5  # seconds between two attempts
_POINT = point_id("writer")


class Lease:
    """A point of the collection ``notes`` that says who may write, and until when; Qdrant writes it only where the old
    one has ended, so of two that ask at once one gets it. A thread renews it while it is held."""

    def __init__(self, client: Any, notes: str, what: str, seconds: float = SECONDS) -> None:
        self._client, self._notes, self._what, self._seconds = client, notes, what, seconds
        self._name = f"process {os.getpid()} on {socket.gethostname()}"
        self._token = uuid.uuid4().hex
        self._lost_to = ""

    @contextmanager
    def held(self, wait: float) -> Iterator[None]:
        """Raises :class:`StoreError`, which names the holder, after ``wait`` seconds."""
        end = time.monotonic() + wait
        while holder := self._take():
            if time.monotonic() >= end:
                raise StoreError(
                    f"{self._what} is being written to by {holder}; wait until it is done (--wait SECONDS), or stop it "
                    f"(its right to write ends {self._seconds:.0f} seconds later)"
                )
            time.sleep(_PAUSE)
        done = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(done,), name="imglish-lease", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            done.set()
            keeper.join()
            self._write(until=0.0)

    def check(self) -> None:
        """Raise :class:`StoreError` where the right was lost while it was held: this process stood still too long."""
        if self._lost_to:
            raise StoreError(f"{self._what} is being written to by {self._lost_to} since this process stood still")

    def _keep(self, done: threading.Event) -> None:
        while not done.wait(self._seconds / 3):
            try:
                self._lost_to = self._take()
            except Exception:  # the server is away: the next change says so, or the next attempt succeeds
                continue

    def _take(self) -> str:
        """Begin or renew; "" where it is held now, else who holds it."""
        self._write(until=time.time() + self._seconds)
        [found] = self._client.retrieve(self._notes, [_POINT], with_payload=True)
        return "" if found.payload["token"] == self._token else str(found.payload["holder"])

    def _write(self, until: float) -> None:
        from qdrant_client import models

        own = models.FieldCondition(key="token", match=models.MatchValue(value=self._token))
        ended = models.FieldCondition(key="until", range=models.Range(lt=time.time()))
        payload = {"holder": self._name, "token": self._token, "until": until}
        self._client.upsert(
            self._notes,
            [models.PointStruct(id=_POINT, vector={}, payload=payload)],
            wait=True,
            ordering=models.WriteOrdering.STRONG,
            update_filter=models.Filter(should=[own, ended]),
        )
