"""The application: search by words, by a picture, by both; pictures by their key; health and metrics."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, File, Form, Request, Response, UploadFile
from fastapi import Query as Parameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from imglish import __version__
from imglish.search import FilterError, Index, Query
from imglish.web import pictures
from imglish.web.guard import COOKIE, Guard, Settings
from imglish.web.schemas import ExplainAnswer, HealthAnswer, HitAnswer, InfoAnswer, PictureAnswer, SearchAnswer
from imglish.web.service import LOG, PROBLEMS, Asked, RefusedError, Service

MOST = 200  # pictures of a page
MOST_RERANKED = 100
DEEPEST = 10_000  # first place of a page
PAGE = {"/": ("index.html", "text/html"), "/app.js": ("app.js", "text/javascript"), "/app.css": ("app.css", "text/css")}
KEEP = {"Cache-Control": "private, max-age=3600"}

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


def _asked(settings: Settings, began: float, rerank: int | None, **wish: Any) -> Asked:
    """The query that a client sends, of whichever form."""
    try:
        return Asked(Query(rerank=settings.rerank if rerank is None else rerank, **wish), began)
    except FilterError as error:
        raise RefusedError.of(error) or error from error
    except ValueError as error:
        raise RefusedError(400, "invalid", str(error)) from error


def _searching(service: Service) -> APIRouter:
    api = APIRouter(prefix="/v1", tags=["search"])

    async def in_address(
        text: Words,
        not_text: NotWords = "",
        k: Count = 40,
        rerank: Reranked = None,
        where: Where = "",
        min_match: LeastMatch = None,
        offset: Offset = 0,
    ) -> Asked:
        wish = {"text": text, "not_text": not_text, "k": k, "where": where, "min_match": min_match, "offset": offset}
        return _asked(service.settings, time.perf_counter(), rerank, **wish)

    async def in_form(
        text: Annotated[str, WORDS] = "",
        image: Annotated[UploadFile | None, File(description="JPEG, PNG, WebP, GIF, BMP, TIFF")] = None,
        not_text: Annotated[str, NOT_WORDS] = "",
        k: Annotated[int, Form(ge=1, le=MOST)] = 40,
        rerank: Annotated[int | None, Form(ge=0, le=MOST_RERANKED)] = None,
        where: Annotated[str, Form(max_length=2000)] = "",
        min_match: Annotated[float | None, Form(ge=0, le=1)] = None,
        offset: Annotated[int, Form(ge=0, le=DEEPEST)] = 0,
    ) -> Asked:
        began, picture = time.perf_counter(), await service.uploaded(image)
        wish = {"text": text, "not_text": not_text, "k": k, "where": where, "min_match": min_match, "offset": offset}
        return _asked(service.settings, began, rerank, image=picture, **wish)

    addressed, sent = Depends(in_address), Depends(in_form)

    @api.get("/search", summary="Search by words")
    async def by_words(asked: Asked = addressed) -> SearchAnswer:
        return await service.best(asked)

    @api.post("/search", summary="Search by words, by a picture, or by both")
    async def search(asked: Asked = sent) -> SearchAnswer:
        return await service.best(asked)

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
    async def stream(asked: Asked = sent) -> StreamingResponse:
        first = await service.first(asked)  # before the response starts: errors have their status
        return StreamingResponse(_lines(service, asked, first), media_type="application/x-ndjson")

    return api


async def _lines(service: Service, asked: Asked, first: SearchAnswer) -> AsyncIterator[str]:
    yield first.model_dump_json() + "\n"
    if first.last:
        return
    try:
        second = await service.second(asked)
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

    @api.get("/explain", summary="Where in the picture the model finds each word")
    async def explained(key: Key, text: Words) -> ExplainAnswer:
        if not text.strip():
            raise RefusedError(400, "invalid", "the text is empty: there is nothing to look for")
        return await service.explained(key, text.strip())

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
