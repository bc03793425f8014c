"""Pictures that cannot be read are left out of an evaluation with their captions, on one process and on two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from imglish.data.errors import Errors
from imglish.data.images import ImageError
from imglish.data.records import Record
from imglish.evaluation.captions import CaptioningConfig, evaluate_captioning
from imglish.evaluation.encoding import Machine
from imglish.evaluation.retrieval import RetrievalConfig, RetrievalResult, evaluate_retrieval
from imglish.evaluation.summary import retrieval_report
from imglish.generation.config import GenerationConfig
from tests.evaluation import test_captions
from tests.evaluation.fakes import Fusion, Words, a_set
from tests.generation.toy import ToyCaptioner
from tests.ranks import run_ranks

BROKEN = ("p3", "p17")


def measure(broken: tuple[str, ...], without: tuple[str, ...] = (), share: float = 0.1) -> RetrievalResult:
    model = Fusion()
    records, pixels = a_set(model)

    def load(record: Record) -> Tensor:
        if record.key in broken and record.image == b"":
            raise ImageError(f"{record.key}: nothing there", "missing")
        return pixels[record.image_id]

    kept = [record for record in records if record.key not in without]
    config = RetrievalConfig(rerank=5, machine=Machine(image_block=7, progress=False))
    return evaluate_retrieval(model, Words(), kept, config, load, Errors(share))


def test_the_result_is_that_of_the_readable_pictures() -> None:
    held, expected = measure(BROKEN), measure((), BROKEN)
    assert held.left_out == (103, 117)
    assert "2 pictures cannot be read and are left out with their captions: 2 missing" in held.notes[0]
    plain = replace(held, left_out=(), notes=held.notes[1:], seconds={})
    assert plain.to_dict() == replace(expected, seconds={}).to_dict()
    records, _ = a_set(Fusion())
    retrieval_report(held, [replace(r, image=_white) for r in records], "x", {})


def _white() -> object:
    from PIL import Image

    return Image.new("RGB", (8, 8))


def test_too_many_are_an_end() -> None:
    with pytest.raises(ImageError, match=r"2 of 30 pictures cannot be used \(2 missing\), more .* 1\.00%.*p3: nothing"):
        measure(BROKEN, share=0.01)
    with pytest.raises(ImageError, match="no picture can be read"):
        measure(tuple(f"p{i}" for i in range(30)), share=1)


def work(rank: int) -> tuple[dict[str, object], dict[str, float]]:
    return replace(measure(BROKEN), seconds={}).to_dict(), captioned()


def test_all_ranks_agree() -> None:
    assert run_ranks(2, work) == [work(0)] * 2


def captioned(broken: str = "p2", predictions: Path | None = None) -> dict[str, float]:
    def load(record: Record) -> Tensor:
        if record.key == broken:
            raise ImageError("p2: nothing there", "missing")
        return test_captions.load(record)

    errors = Errors(0.2)
    found = evaluate_captioning(
        ToyCaptioner(seed=3),
        test_captions.Words(),
        test_captions.records(8),
        CaptioningConfig(GenerationConfig(beams=2, max_length=8), machine=Machine(3, progress=False)),
        load=load,
        errors=errors,
    )
    assert found.images == 7
    assert errors.counts == {"missing": 1}
    return found.metrics


def test_captioning_leaves_them_out() -> None:
    captioned()
