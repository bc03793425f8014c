"""The answers of the server as they are documented in ``/openapi.json``."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from imglish.evaluation.explain import Explanation
from imglish.search import Results, SearchHit


class HitAnswer(BaseModel):
    """One picture of a list."""

    key: str = Field(description="name of the picture in the index")
    rank: int = Field(description="its place, from 1")
    rank_before: int = Field(description="its place by the towers alone")
    moved: int = Field(description="how many places reranking has moved it up; negative: down")
    cosine: float = Field(description="score of the towers")
    match: float | None = Field(
        description="probability that words and picture belong together (and not the words that it should not show); "
        "null: not looked at"
    )
    excluded: float | None = Field(description="probability of the words that it should not show")
    captions: list[str]
    date: str
    tags: list[str]
    width: int
    height: int
    duplicate_of: str

    @staticmethod
    def of(hit: SearchHit) -> HitAnswer:
        values = {name: getattr(hit, name) for name in HitAnswer.model_fields}
        return HitAnswer(**{**values, "captions": list(hit.captions), "tags": list(hit.tags)})


class SearchAnswer(BaseModel):
    """A page of results, best first."""

    stage: Literal["towers", "reranked"] = Field(description="who ordered them")
    last: bool = Field(description="whether no better answer follows in this response")
    hits: list[HitAnswer]
    total: int = Field(description="pictures that the filter lets through")
    more: bool = Field(description="whether there is a next page")
    reranked: int = Field(description="pictures that the fusion tower has looked at")
    calibrated: bool = Field(description="whether `match` is calibrated on held-out pairs")
    no_good_match: bool = Field(description="a `min_match` was asked for and no picture reaches it")
    notes: list[str]
    seconds: float = Field(description="from the arrival of the search to this answer")

    @staticmethod
    def of(results: Results, stage: Literal["towers", "reranked"], last: bool, seconds: float) -> SearchAnswer:
        return SearchAnswer(
            stage=stage,
            last=last,
            hits=[HitAnswer.of(hit) for hit in results.hits],
            total=results.total,
            more=results.more,
            reranked=results.reranked,
            calibrated=results.calibrated,
            no_good_match=results.no_good_match,
            notes=[note.split(": ", 1)[0] for note in results.notes],  # what follows may name files of the server
            seconds=round(seconds, 4),
        )


class PictureAnswer(BaseModel):
    """What is known of one picture."""

    key: str
    captions: list[str]
    date: str
    tags: list[str]
    width: int
    height: int
    duplicate_of: str


class ExplainAnswer(BaseModel):
    """Where in a picture the model finds the words: maps of bytes, row by row from the top."""

    method: str = Field(description="how they were made: docs/explain.md")
    words: list[str]
    maps: list[str] = Field(description="of each word, base64, all of one scale")
    whole: str = Field(description="of the whole text, base64, 255 at its highest")
    height: int = Field(description="of the maps, in patches")
    width: int
    box: list[float] = Field(description="what the model saw: left, upper, right, lower as shares of the picture")

    @staticmethod
    def of(found: Explanation, box: Sequence[float]) -> ExplainAnswer:
        height, width = found.whole.shape
        return ExplainAnswer(
            method=found.method,
            words=list(found.words),
            maps=[_bytes(one, found.maps.max()) for one in found.maps],
            whole=_bytes(found.whole, found.whole.max()),
            height=height,
            width=width,
            box=list(box),
        )


def _bytes(heat: Tensor, highest: Tensor) -> str:
    """A map as base64 of bytes, 255 where it is ``highest``."""
    levels = (heat * (255 / highest.clamp(min=1e-12))).round().clamp(0, 255)
    return b64encode(levels.to(torch.uint8).numpy().tobytes()).decode()


class InfoAnswer(BaseModel):
    """What is searched, and what the page may ask for."""

    name: str = Field(description="last part of the index's name")
    pictures: int
    version: int = Field(description="rises with every change of the index")
    model: str
    reranks: bool = Field(description="whether the model has a fusion tower")
    calibrated: bool
    rerank: int = Field(description="pictures that are reranked where a search does not say")
    upload: int = Field(description="largest picture that can be sent, in bytes")


class HealthAnswer(BaseModel):
    status: Literal["ok"]


class Problem(BaseModel):
    code: str
    message: str


class ProblemAnswer(BaseModel):
    """Every error has this form."""

    error: Problem
