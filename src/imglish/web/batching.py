"""One thread that computes for all clients: first answers together in batches, reranking when none of these waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class BusyError(Exception):
    """The queue is full: the client may try again later."""


@dataclass(frozen=True)
class _Job(Generic[Q, A]):
    query: Q
    future: Future[A]


class Batcher(Generic[Q, A]):
    """Queries wait in two queues of together at most ``waiting``; more are refused with :class:`BusyError`.

    first: answers up to ``most`` queries at once, one answer or exception each; second: the dear answer to one query.
    While the thread computes the next batch gathers by itself, so a query that comes alone never waits for company.
    A job whose future is cancelled is dropped when its turn comes. on_batch: is told the size of each batch.
    """

    def __init__(
        self,
        first: Callable[[Sequence[Q]], Sequence[A | Exception]],
        second: Callable[[Q], A],
        most: int = 16,
        waiting: int = 64,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        if most < 1 or waiting < 1:
            raise ValueError(f"batches of {most}, {waiting} waiting: both have to be at least 1")
        self._first, self._second = first, second
        self._most, self._waiting, self._on_batch = most, waiting, on_batch
        self._quick: deque[_Job[Q, A]] = deque()
        self._dear: deque[_Job[Q, A]] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="imglish-search", daemon=True)
        self._thread.start()

    def first(self, query: Q) -> Future[A]:
        """The towers' answer. Raises :class:`BusyError`."""
        return self._submit(self._quick, query)

    def second(self, query: Q) -> Future[A]:
        """The reranked answer. Raises :class:`BusyError`."""
        return self._submit(self._dear, query)

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

    def _submit(self, queue: deque[_Job[Q, A]], query: Q) -> Future[A]:
        job: _Job[Q, A] = _Job(query, Future())
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

    def _compute(self, jobs: list[_Job[Q, A]], quick: bool) -> None:
        answers: Sequence[A | Exception]
        try:
            if quick:
                if self._on_batch is not None:
                    self._on_batch(len(jobs))
                answers = self._first([job.query for job in jobs])
            else:
                answers = [self._second(jobs[0].query)]
        except Exception as error:  # given to those who asked; the thread goes on for the others
            answers = [error] * len(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            if isinstance(answer, Exception):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)
