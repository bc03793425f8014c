from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imglish.search import Index
from tests.web import support

pytest.importorskip("fastapi", reason="needs the extra serve")

from imglish.web.app import create
from imglish.web.guard import Settings


def _keys(answer: dict[str, Any]) -> list[str]:
    return [hit["key"] for hit in answer["hits"]]


def _lines(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def test_the_stream_gives_the_towers_first_and_then_the_reranked(client: Any, index: Index) -> None:
    first, second = _lines(client.post("/v1/search/stream", data={"text": "a red hat", "k": 8, "rerank": 20}))
    assert (first["stage"], first["last"], second["stage"], second["last"]) == ("towers", False, "reranked", True)
    assert _keys(first) == [hit.key for hit in index.search("a red hat", k=8, rerank=0).hits]
    wanted = index.search("a red hat", k=8, rerank=20)
    assert _keys(second) == [hit.key for hit in wanted.hits] != _keys(first)
    assert [hit["moved"] for hit in second["hits"]] == [hit.moved for hit in wanted.hits]
    assert all(0 < hit["match"] < 1 for hit in second["hits"])
    assert first["hits"][0]["match"] is None


def test_without_words_there_is_one_answer(client: Any, index: Index) -> None:
    picture = support.jpeg(support.drawing(5), quality=95)
    [answer] = _lines(client.post("/v1/search/stream", files={"image": ("x.jpg", picture)}, data={"k": 5}))
    assert answer["last"]
    assert answer["hits"][0]["key"] == "in/5.jpg"


def test_words_and_a_picture_together(client: Any, index: Index) -> None:
    image = support.drawing(6)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    sent = client.post(
        "/v1/search",
        files={"image": ("x.png", buffer.getvalue())},
        data={"text": "a hat", "not_text": "blue", "k": 6, "rerank": 10},
    ).json()
    wanted = index.search("a hat", image=image, not_text="blue", k=6, rerank=10)
    assert _keys(sent) == [hit.key for hit in wanted.hits]
    assert sent["hits"][0]["excluded"] == pytest.approx(wanted.hits[0].excluded)


def test_get_answers_as_post(client: Any) -> None:
    asked = {"text": "黑色上衣", "k": 4, "offset": 2, "where": "path starts 'in/1'", "rerank": 5}
    one, other = client.get("/v1/search", params=asked).json(), client.post("/v1/search", data=asked).json()
    assert _keys(one) == _keys(other)
    assert all(key.startswith("in/1") for key in _keys(one))
    assert [hit["rank"] for hit in one["hits"]] == [3, 4, 5, 6]


def test_no_good_match_is_an_answer(client: Any) -> None:
    answer = client.get("/v1/search", params={"text": "a hat", "min_match": 1.0}).json()
    assert answer["no_good_match"]
    assert answer["hits"] == []


def test_what_waits_is_answered_together(index: Index) -> None:
    app = create(index)
    with support.closing(app) as client, ThreadPoolExecutor(8) as pool:
        batcher, store = app.state.service.batcher, index.store
        words = ["a red hat", "a hat", "a bag", "two blue shoes"]
        with index._lock:  # the model is busy
            busy = pool.submit(client.get, "/v1/search", params={"text": "nobody said this", "rerank": 0})
            until(lambda: not batcher.waiting and "imglish_batches_total 1" in app.state.service.metrics.text(0, 0))
            sent = [pool.submit(client.get, "/v1/search", params={"text": text, "rerank": 0}) for text in words]
            until(lambda: batcher.waiting == 4)
            store.searches.clear()  # type: ignore[attr-defined]
        found = [one.result(30).json() for one in (busy, *sent)][1:]
        assert store.searches == [1, 4]  # type: ignore[attr-defined]  # vectors in one pass
        for text, answer in zip(words, found, strict=True):
            assert _keys(answer) == [hit.key for hit in index.search(text, k=40, rerank=0).hits]


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_many_clients_at_once(client: Any) -> None:
    words = ["a hat", "a red hat", "a bag", "黑色上衣"] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: client.get("/v1/search", params={"text": text, "rerank": 4}).json(), words))
    for text, answer in zip(words, found, strict=True):
        assert _keys(answer) == _keys(client.get("/v1/search", params={"text": text, "rerank": 4}).json())


def test_pictures_by_key(client: Any, index: Index) -> None:
    key = "in/4.jpg"
    small = Image.open(io.BytesIO(client.get("/v1/picture/thumbnail", params={"key": key}).content))
    large = Image.open(io.BytesIO(client.get("/v1/picture/large", params={"key": key}).content))
    assert max(small.size) == 128
    assert large.size == support.drawing(4).size
    assert not large.getexif()  # the file has a home address
    known = client.get("/v1/picture", params={"key": key}).json()
    assert (known["tags"], known["width"]) == (["drawing"], large.width)
    similar = client.get("/v1/picture/similar", params={"key": key, "k": 5}).json()
    assert [hit["key"] for hit in similar] == [hit.key for hit in index.similar(key, 5).hits]
    assert key not in [hit["key"] for hit in similar]


def test_the_words_are_found_in_the_picture(client: Any, index: Index) -> None:
    key, text = "in/4.jpg", "a red hat"
    found = client.get("/v1/picture/explain", params={"key": key, "text": text}).json()
    wanted, box = index.explain(key, text)
    assert found["words"] == list(wanted.words)
    assert (found["height"], found["width"]) == tuple(wanted.whole.shape)
    assert found["box"] == list(box) == [0, 0, 1, 1]
    for sent, heat in zip([*found["maps"], found["whole"]], [*wanted.maps, wanted.whole], strict=True):
        highest = wanted.maps.max() if heat is not wanted.whole else wanted.whole.max()
        levels = np.frombuffer(base64.b64decode(sent), np.uint8).reshape(heat.shape)
        np.testing.assert_allclose(levels, heat.numpy() * 255 / float(highest), atol=0.51)
    assert client.get("/v1/picture/explain", params={"key": key, "text": " "}).status_code == 400


def test_a_lost_file_is_shown_small(client: Any, index: Index) -> None:
    lost = client.get("/v1/picture/large", params={"key": "in/1.jpg"})
    assert lost.content == index.thumbnail("in/1.jpg")


def test_health_and_metrics(client: Any) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    client.post("/v1/search/stream", data={"text": "a hat"})
    client.get("/v1/nothing/of/this/kind")
    lines = client.get("/metrics").text.splitlines()
    assert 'imglish_requests_total{route="/v1/search/stream",status="200"} 1' in lines
    assert 'imglish_requests_total{route="other",status="404"} 1' in lines
    assert 'imglish_search_seconds_count{stage="reranked"} 1' in lines
    assert "imglish_batches_total 1" in lines
    assert "imglish_pictures 24" in lines


def test_health_tells_that_the_search_has_ended(index: Index) -> None:
    app = create(index)
    with support.closing(app) as client:
        app.state.service.batcher.close()
        assert client.get("/healthz").status_code == 503


def test_a_full_queue_answers_429(index: Index) -> None:
    app = create(index, Settings(waiting=1))
    batcher = app.state.service.batcher
    with support.closing(app) as client, ThreadPoolExecutor(6) as pool, index._lock:  # the model is busy
        query = {"text": "x", "rerank": 0}
        sent = [pool.submit(client.post, "/v1/search", data=query)]
        until(lambda: "imglish_batches_total 1" in client.get("/metrics").text)  # it is being computed
        sent.append(pool.submit(client.post, "/v1/search", data=query))
        until(lambda: batcher.waiting == 1)
        refused = client.post("/v1/search/stream", data={"text": "a hat"})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "busy"
        index._lock.release()
        assert [one.result(30).status_code for one in sent] == [200, 200]
        index._lock.acquire()
        assert "imglish_refused_total" in client.get("/metrics").text


def test_everything_is_documented(client: Any) -> None:
    found = client.get("/openapi.json").json()
    for path in ("/v1/search", "/v1/search/stream", "/v1/picture/thumbnail", "/v1/picture/similar", "/metrics"):
        for route in found["paths"][path].values():
            assert route["summary"]
            assert "429" in route["responses"]
    assert "image" in json.dumps(found["components"]["schemas"]["Body_search_v1_search_post"])


def test_the_page_is_part_of_the_package(client: Any) -> None:
    for path, name in (("/", "index.html"), ("/app.js", "app.js"), ("/app.css", "app.css")):
        assert client.get(path).content == (files("imglish.web") / "static" / name).read_bytes()
