"""One thread that computes for all clients: first answers together in batches, reranking when none of these waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")
T = TypeVar("T")


class BusyError(Exception):
    """The queue is full: the client may try again later."""


@dataclass(frozen=True)
class _Job:
    """what: a query, or what computes an answer by itself."""

    what: Any
    future: Future[Any]


class Batcher(Generic[Q, A]):
    """Queries wait in two queues of together at most ``waiting``; more are refused with :class:`BusyError`.

    answer: gives the first answers to up to ``most`` queries at once. While the thread computes the next batch gathers
    by itself, so a query that comes alone never waits for company. What is dearer is computed :meth:`alone`.
    A job whose future is cancelled is dropped when its turn comes. on_batch: is told the size of each batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Q]], Sequence[A]],
        most: int = 16,
        waiting: int = 64,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        if most < 1 or waiting < 1:
            raise ValueError(f"batches of {most}, {waiting} waiting: both have to be at least 1")
        self._answer = answer
        self._most, self._waiting, self._on_batch = most, waiting, on_batch
        self._quick: deque[_Job] = deque()
        self._dear: deque[_Job] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="imglish-search", daemon=True)
        self._thread.start()

    def first(self, query: Q) -> Future[A]:
        """The first answer to a query. Raises :class:`BusyError`."""
        return self._submit(self._quick, query)

    def alone(self, compute: Callable[[], T]) -> Future[T]:
        """What ``compute`` gives, called by the thread when no first answer waits. Raises :class:`BusyError`."""
        return self._submit(self._dear, compute)

    @property
    def waiting(self) -> int:
        """How many queries wait, without those that are being computed."""
        with self._change:
            return len(self._quick) + len(self._dear)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """Cancel what waits and end the thread after what it computes now."""
        with self._change:
            self._closed = True
            for job in (*self._quick, *self._dear):
                job.future.cancel()
            self._change.notify_all()
        self._thread.join(timeout=60)

    def _submit(self, queue: deque[_Job], what: Any) -> Future[Any]:
        job = _Job(what, Future())
        with self._change:
            if self._closed:
                raise BusyError("the server is stopping")
            self._drop_cancelled()
            if len(self._quick) + len(self._dear) >= self._waiting:
                raise BusyError(f"{self._waiting} searches wait already: try again in a moment")
            queue.append(job)
            self._change.notify()
        return job.future

    def _drop_cancelled(self) -> None:
        """Clients that went away leave their places to others."""
        for queue in (self._quick, self._dear):
            if any(job.future.cancelled() for job in queue):
                left = [job for job in queue if not job.future.cancelled()]
                queue.clear()
                queue.extend(left)

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or self._quick or self._dear)
                if self._closed:
                    return
                quick = bool(self._quick)
                queue, most = (self._quick, self._most) if quick else (self._dear, 1)
                taken = [queue.popleft() for _ in range(min(most, len(queue)))]
            jobs = [job for job in taken if job.future.set_running_or_notify_cancel()]
            if jobs:
                self._compute(jobs, quick)

    def _compute(self, jobs: list[_Job], quick: bool) -> None:
        if quick:
            if self._on_batch is not None:
                self._on_batch(len(jobs))
            answers = self._answers([job.what for job in jobs])
        else:
            answers = [_tried(jobs[0].what)]
        for job, answer in zip(jobs, answers, strict=True):
            if isinstance(answer, Exception):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)

    def _answers(self, queries: Sequence[Any]) -> Sequence[Any]:
        """One each; where they fail together, one after the other, so that an error reaches its client alone."""
        found = _tried(lambda: self._answer(queries))
        if not isinstance(found, Exception):
            return found
        return [found] if len(queries) == 1 else [answer for query in queries for answer in self._answers([query])]


def _tried(compute: Callable[[], T]) -> T | Exception:
    """The result, or the error: the thread goes on for the others."""
    try:
        return compute()
    except Exception as error:
        return error
