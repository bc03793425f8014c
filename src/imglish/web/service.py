"""What the routes share: the index with its thread, what is counted, and refusals that have a status."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import UploadFile

from imglish.data.images import ImageError
from imglish.models.capabilities import MissingCapabilityError
from imglish.search import FilterError, Index, Query, Results, StoreError
from imglish.web import pictures
from imglish.web.batching import Batcher, BusyError
from imglish.web.guard import Settings
from imglish.web.metrics import Metrics
from imglish.web.schemas import ExplainAnswer, ProblemAnswer, SearchAnswer

LOG = logging.getLogger("imglish.web")
DECODERS = 4  # pictures that are decoded at a time
T = TypeVar("T")
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemAnswer, "description": says}
    for status, says in (
        (400, "wrong parameters"),
        (401, "no API key"),
        (403, "another site asks"),
        (404, "no such picture"),
        (413, "too large"),
        (415, "not a picture that can be read"),
        (429, "the queue is full"),
        (503, "the index cannot be read"),
    )
}


class RefusedError(Exception):
    """An answer that is no result: status, code for programs, message for persons."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message

    @staticmethod
    def of(error: Exception) -> RefusedError | None:
        """None for an error that is a mistake of ours. Messages that may name files of the server go to the log."""
        if isinstance(error, BusyError):
            return RefusedError(429, "busy", str(error))
        if isinstance(error, FilterError):
            return RefusedError(400, "filter", str(error))
        if isinstance(error, ImageError):
            return RefusedError(413 if error.reason == "too large" else 415, "picture", str(error))
        if isinstance(error, MissingCapabilityError):
            return RefusedError(400, "model", str(error))
        if isinstance(error, StoreError):
            LOG.error("the index cannot be read: %s", error)
            return RefusedError(503, "index", "the index cannot be read now; the server's log says why")
        return None

    def body(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": self.message}}


@dataclass(frozen=True)
class Asked:
    """A query, and when it arrived (``time.perf_counter``)."""

    query: Query
    began: float


class Service:
    """The index, its thread, and what is counted."""

    def __init__(self, index: Index, settings: Settings) -> None:
        self.index, self.settings, self.metrics = index, settings, Metrics()
        self.batcher: Batcher[Query, Results] = Batcher(
            index.search_many, settings.batch, settings.waiting, self.metrics.batch
        )
        self._decoders = anyio.CapacityLimiter(DECODERS)

    def reranks(self, query: Query) -> bool:
        """Whether a second answer follows that of the towers."""
        return query.text is not None and query.rerank > 0 and self.index.reranks

    async def first(self, asked: Asked) -> SearchAnswer:
        towers = replace(asked.query, rerank=0, min_match=None)
        results = await self._waited(lambda: self.batcher.first(towers))
        return self._counted(results, "towers", not self.reranks(asked.query), asked.began)

    async def second(self, asked: Asked) -> SearchAnswer:
        results = await self._waited(lambda: self.batcher.alone(lambda: self.index.search_many([asked.query])[0]))
        return self._counted(results, "reranked", True, asked.began)

    async def best(self, asked: Asked) -> SearchAnswer:
        return await (self.second if self.reranks(asked.query) else self.first)(asked)

    async def uploaded(self, image: UploadFile | None) -> Any:
        """The query's picture, None without one."""
        if image is None:
            return None
        data = await image.read()
        if len(data) > self.settings.upload:
            raise RefusedError(413, "picture", f"a picture of more than {self.settings.upload >> 20} MiB")
        try:
            return await self.off_loop(lambda: pictures.uploaded(data, self.settings.pixels))
        except ImageError as error:
            raise RefusedError.of(error) or error from error

    async def picture(self, make: Callable[[], T]) -> T:
        """What ``make`` gives for a key, without the model."""
        return await self.off_loop(lambda: _of_key(make))

    async def explained(self, key: str, text: str) -> ExplainAnswer:
        return ExplainAnswer.of(
            *await self._waited(lambda: self.batcher.alone(lambda: _of_key(lambda: self.index.explain(key, text))))
        )

    async def off_loop(self, make: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(make, limiter=self._decoders)

    async def _waited(self, submit: Callable[[], Future[T]]) -> T:
        try:
            return await asyncio.wrap_future(submit())
        except Exception as error:
            if isinstance(error, BusyError):
                self.metrics.refused()
            raise RefusedError.of(error) or error from error

    def _counted(self, results: Results, stage: Any, last: bool, began: float) -> SearchAnswer:
        seconds = time.perf_counter() - began
        self.metrics.answered(stage, seconds)
        return SearchAnswer.of(results, stage, last, seconds)


def _of_key(make: Callable[[], T]) -> T:
    """What ``make`` gives for a picture of the index. Messages do not name files of the server."""
    try:
        return make()
    except KeyError as error:
        raise RefusedError(404, "key", "there is no such picture in the index") from error
    except ImageError as error:
        raise RefusedError(404, "picture", "the picture's file cannot be read any more") from error
    except StoreError as error:
        raise RefusedError.of(error) or error from error
