"""The application: search by words, by a picture, by both; pictures by their key; health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import APIRouter, FastAPI, File, Form, Request, Response, UploadFile
from fastapi import Query as Parameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from imglish import __version__
from imglish.data.images import ImageError
from imglish.search import FilterError, Index, Results, StoreError
from imglish.web import answers, pictures
from imglish.web.answers import Query
from imglish.web.batching import Batcher, BusyError
from imglish.web.guard import COOKIE, Guard, Settings
from imglish.web.metrics import Metrics
from imglish.web.schemas import HealthAnswer, HitAnswer, InfoAnswer, PictureAnswer, ProblemAnswer, SearchAnswer

LOG = logging.getLogger("imglish.web")
MOST = 200  # pictures of a page
MOST_RERANKED = 100
DEEPEST = 10_000  # first place of a page
DECODERS = 4  # pictures that are decoded at a time
PAGE = {"/": ("index.html", "text/html"), "/app.js": ("app.js", "text/javascript"), "/app.css": ("app.css", "text/css")}
KEEP = {"Cache-Control": "private, max-age=3600"}
T = TypeVar("T")

Words = Annotated[str, Parameter(max_length=1000, description="what the pictures should show")]
NotWords = Annotated[str, Parameter(max_length=1000, description="what they should not show")]
Count = Annotated[int, Parameter(ge=1, le=MOST, description="pictures of a page")]
Reranked = Annotated[int | None, Parameter(ge=0, le=MOST_RERANKED, description="pictures to rerank; 0: none")]
Where = Annotated[str, Parameter(max_length=2000, description="a filter, as `date >= 2021-06 and tag = 'dress'`")]
LeastMatch = Annotated[float | None, Parameter(ge=0, le=1, description="leave out what matches less")]
Offset = Annotated[int, Parameter(ge=0, le=DEEPEST, description="pictures to skip")]
Key = Annotated[str, Parameter(min_length=1, max_length=4096, description="of a picture, as a search gives it")]
WORDS = Form(max_length=1000, description="what the pictures should show")
NOT_WORDS = Form(max_length=1000, description="what they should not show")
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
        if isinstance(error, StoreError):
            LOG.error("the index cannot be read: %s", error)
            return RefusedError(503, "index", "the index cannot be read now; the server's log says why")
        return None

    def body(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": self.message}}


class Service:
    """The index, its thread, and what is counted; what the routes share."""

    def __init__(self, index: Index, settings: Settings) -> None:
        self.index, self.settings, self.metrics = index, settings, Metrics()
        self.batcher: Batcher[Query, Results] = Batcher(
            lambda queries: answers.first(index, queries),
            lambda query: answers.search(index, query),
            settings.batch,
            settings.waiting,
            self.metrics.batch,
        )
        self._decoders = anyio.CapacityLimiter(DECODERS)

    def reranks(self, query: Query) -> bool:
        """Whether a second answer follows that of the towers."""
        return bool(query.text) and query.rerank > 0 and self.index.reranks

    async def first(self, query: Query, began: float) -> SearchAnswer:
        results = await self._answer(self.batcher.first, query)
        return self._counted(results, "towers", not self.reranks(query), began)

    async def second(self, query: Query, began: float) -> SearchAnswer:
        results = await self._answer(self.batcher.second, query)
        return self._counted(results, "reranked", True, began)

    async def best(self, query: Query, began: float) -> SearchAnswer:
        return await (self.second if self.reranks(query) else self.first)(query, began)

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
        """What ``make`` gives for a key."""
        try:
            return await self.off_loop(make)
        except KeyError as error:
            raise RefusedError(404, "key", "there is no such picture in the index") from error
        except ImageError as error:
            raise RefusedError(404, "picture", str(error)) from error
        except StoreError as error:
            raise RefusedError.of(error) or error from error

    async def off_loop(self, make: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(make, limiter=self._decoders)

    async def _answer(self, submit: Callable[[Query], Future[Results]], query: Query) -> Results:
        try:
            return await asyncio.wrap_future(submit(query))
        except Exception as error:
            if isinstance(error, BusyError):
                self.metrics.refused()
            raise RefusedError.of(error) or error from error

    def _counted(self, results: Results, stage: Any, last: bool, began: float) -> SearchAnswer:
        seconds = time.perf_counter() - began
        self.metrics.answered(stage, seconds)
        return SearchAnswer.of(results, stage, last, seconds)


def create(index: Index, settings: Settings | None = None) -> FastAPI:
    """The application for an open index."""
    service = Service(index, settings or Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.batcher.close()

    app = FastAPI(
        title="imglish",
        version=__version__,
        description="Image search: recall by the towers, reranking by the fusion tower.",
        docs_url=None,  # these pages load code from another host
        redoc_url=None,
        lifespan=lifespan,
        responses=PROBLEMS,
    )
    app.state.service = service
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.include_router(_searching(service))
    app.include_router(_looking(service))
    app.include_router(_watching(service))
    app.include_router(_page())
    return app


def _searching(service: Service) -> APIRouter:
    api = APIRouter(prefix="/v1", tags=["search"])
    index_rerank = service.settings.rerank

    def wish(
        text: str, image: Any, not_text: str, k: int, rerank: int | None, where: str, least: float | None, at: int
    ) -> Query:
        if not text.strip() and image is None:
            raise RefusedError(400, "empty", "nothing to search for: give words, a picture, or both")
        many = index_rerank if rerank is None else rerank
        return Query(text.strip() or None, image, not_text.strip() or None, k, many, where.strip() or None, least, at)

    @api.get("/search", summary="Search by words")
    async def by_words(
        text: Words,
        not_text: NotWords = "",
        k: Count = 40,
        rerank: Reranked = None,
        where: Where = "",
        min_match: LeastMatch = None,
        offset: Offset = 0,
    ) -> SearchAnswer:
        began = time.perf_counter()
        return await service.best(wish(text, None, not_text, k, rerank, where, min_match, offset), began)

    @api.post("/search", summary="Search by words, by a picture, or by both")
    async def search(
        text: Annotated[str, WORDS] = "",
        image: Annotated[UploadFile | None, File(description="JPEG, PNG, WebP, GIF, BMP, TIFF")] = None,
        not_text: Annotated[str, NOT_WORDS] = "",
        k: Annotated[int, Form(ge=1, le=MOST)] = 40,
        rerank: Annotated[int | None, Form(ge=0, le=MOST_RERANKED)] = None,
        where: Annotated[str, Form(max_length=2000)] = "",
        min_match: Annotated[float | None, Form(ge=0, le=1)] = None,
        offset: Annotated[int, Form(ge=0, le=DEEPEST)] = 0,
    ) -> SearchAnswer:
        began = time.perf_counter()
        picture = await service.uploaded(image)
        return await service.best(wish(text, picture, not_text, k, rerank, where, min_match, offset), began)

    @api.post(
        "/search/stream",
        summary="The same, the towers' answer at once and the reranked one when it is there",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "One JSON object a line: `SearchAnswer`, the last one with `last`; or an `error`.",
                "content": {"application/x-ndjson": {"schema": {"$ref": "#/components/schemas/SearchAnswer"}}},
            }
        },
    )
    async def stream(
        text: Annotated[str, WORDS] = "",
        image: Annotated[UploadFile | None, File(description="JPEG, PNG, WebP, GIF, BMP, TIFF")] = None,
        not_text: Annotated[str, NOT_WORDS] = "",
        k: Annotated[int, Form(ge=1, le=MOST)] = 40,
        rerank: Annotated[int | None, Form(ge=0, le=MOST_RERANKED)] = None,
        where: Annotated[str, Form(max_length=2000)] = "",
        min_match: Annotated[float | None, Form(ge=0, le=1)] = None,
        offset: Annotated[int, Form(ge=0, le=DEEPEST)] = 0,
    ) -> StreamingResponse:
        began = time.perf_counter()
        picture = await service.uploaded(image)
        query = wish(text, picture, not_text, k, rerank, where, min_match, offset)
        first = await service.first(query, began)  # before the response starts: errors have their status
        return StreamingResponse(_lines(service, query, first, began), media_type="application/x-ndjson")

    return api


async def _lines(service: Service, query: Query, first: SearchAnswer, began: float) -> AsyncIterator[str]:
    yield first.model_dump_json() + "\n"
    if first.last:
        return
    try:
        second = await service.second(query, began)
    except RefusedError as refusal:
        yield json.dumps(refusal.body()) + "\n"
        return
    except Exception:
        LOG.exception("reranking failed")
        failed = RefusedError(500, "internal", "reranking has failed; the server's log says why")
        yield json.dumps(failed.body()) + "\n"
        return
    yield second.model_dump_json() + "\n"


def _looking(service: Service) -> APIRouter:
    api = APIRouter(prefix="/v1/picture", tags=["pictures"])
    index, pixels = service.index, service.settings.pixels
    jpeg: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}}

    @api.get("", summary="What is known of a picture")
    async def known(key: Key) -> PictureAnswer:
        row = await service.picture(lambda: index.get(key))
        values = {name: getattr(row, name) for name in PictureAnswer.model_fields}
        return PictureAnswer(**{**values, "captions": list(row.captions), "tags": list(row.tags)})

    @api.get("/thumbnail", summary="The picture, small", response_class=Response, responses=jpeg)
    async def thumbnail(key: Key) -> Response:
        data = await service.picture(lambda: pictures.small(index, key, pixels))
        return Response(data, media_type="image/jpeg", headers=KEEP)

    @api.get("/large", summary="The picture, large, without its metadata", response_class=Response, responses=jpeg)
    async def large(key: Key) -> Response:
        data = await service.picture(lambda: pictures.large(index, key, pixels))
        return Response(data, media_type="image/jpeg", headers=KEEP)

    @api.get("/similar", summary="Pictures that look like it")
    async def similar(key: Key, k: Count = 12) -> list[HitAnswer]:
        found = await service.picture(lambda: index.similar(key, k))
        return [HitAnswer.of(hit) for hit in found.hits]

    return api


def _watching(service: Service) -> APIRouter:
    api = APIRouter()

    @api.get("/healthz", tags=["operation"], summary="Whether searches are answered")
    async def health() -> HealthAnswer:
        if not service.batcher.alive:
            raise RefusedError(503, "stopped", "the search thread has ended")
        await service.picture(lambda: service.index.store.version)
        return HealthAnswer(status="ok")

    @api.get("/metrics", tags=["operation"], summary="Counters for Prometheus", response_class=Response)
    async def metrics() -> Response:
        rows = await service.picture(lambda: service.index.store.count())
        text = service.metrics.text(service.batcher.waiting, rows)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @api.get("/v1/info", tags=["search"], summary="What is searched")
    async def info() -> InfoAnswer:
        found = await service.picture(service.index.info)
        manifest = service.index.manifest
        return InfoAnswer(
            name=found.url.rstrip("/").rsplit("/", 1)[-1],
            pictures=found.rows,
            version=found.version,
            model=manifest.family,
            reranks=service.index.reranks,
            calibrated=manifest.calibration is not None,
            rerank=service.settings.rerank,
            upload=service.settings.upload,
        )

    @api.post("/v1/session", tags=["operation"], status_code=204, summary="Exchange the API key for a cookie")
    async def session(request: Request, key: Annotated[str, Form(max_length=1000)] = "") -> Response:
        wanted = service.settings.key
        if wanted is not None and not hmac.compare_digest(key.encode(), wanted.encode()):
            raise RefusedError(401, "key", "that is not the key")
        response = Response(status_code=204)
        if wanted is not None:
            secure = request.url.scheme == "https"
            response.set_cookie(
                COOKIE, service.settings.session, httponly=True, samesite="strict", secure=secure, path="/"
            )
        return response

    return api


def _page() -> APIRouter:
    api = APIRouter(include_in_schema=False)
    folder = files("imglish.web") / "static"

    def add(path: str, name: str, kind: str) -> None:
        content = (folder / name).read_bytes()

        @api.get(path)
        async def page() -> Response:
            return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    for path, (name, kind) in PAGE.items():
        add(path, name, kind)
    return api


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


def _invalid(request: Request, error: Exception) -> Response:
    """Which parameter is wrong, without repeating what the client sent."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])
    return JSONResponse(RefusedError(400, "invalid", f"{name}: {first['msg']}").body(), 400)


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not found", 405: "method", 413: "too large"}.get(error.status_code, "http")
    return JSONResponse(
        RefusedError(error.status_code, code, str(error.detail)).body(), error.status_code, error.headers
    )
