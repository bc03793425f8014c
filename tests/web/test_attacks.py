from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imglish.search import Index
from tests.web import support

pytest.importorskip("fastapi", reason="needs the extra serve")

from imglish.web.app import create
from imglish.web.guard import OPEN, Settings

KEY = "correct horse battery"
PATHS = (
    "/v1/picture",
    "/v1/picture/thumbnail",
    "/v1/picture/large",
    "/v1/picture/similar",
    "/v1/picture/explain",
)


@pytest.fixture
def locked(index: Index) -> Iterator[Any]:
    with support.closing(create(index, Settings(key=KEY))) as found:
        yield found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "key",
    ["../secret.jpg", "in/../../secret.jpg", "/etc/passwd", "file:///etc/passwd", "in/0.jpg\0", "%2e%2e/x", "\\..\\x"],
)
def test_no_path_of_a_client_is_opened(client: Any, path: str, key: str, folder: Path) -> None:
    for asked in (key, str(folder / "secret.jpg"), str(folder / "photos/in/2.jpg")):
        answer = client.get(path, params={"key": asked, "text": "a hat"})
        assert answer.status_code == 404
        assert str(folder) not in answer.text


@pytest.mark.parametrize("path", ["/../secret.jpg", "/static/../guard.py", "/%2e%2e/app.py", "/app.py", "//etc/passwd"])
def test_the_page_is_three_files(client: Any, path: str) -> None:
    assert client.get(path).status_code == 404


def test_urls_are_not_fetched(client: Any) -> None:
    for name in ("image", "url"):
        answer = client.post("/v1/search", data={name: "http://169.254.169.254/latest"})
        assert answer.status_code == 400


def test_nothing_is_unpickled_or_run() -> None:
    """What lies in an index or comes over the network is data; the readers that could run it are not used."""
    for package in ("imglish.search", "imglish.web"):
        for file in files(package).iterdir():
            if file.name.endswith(".py"):
                text = file.read_text()
                for danger in (
                    "pickle",
                    "torch.load",
                    "np.load",
                    "yaml.load",
                    "eval(",
                    "exec(",
                    "subprocess",
                    "urlopen",
                ):
                    assert danger not in text, (file.name, danger)


def test_a_large_upload_is_cut_off(index: Index) -> None:
    with support.closing(create(index, Settings(upload=10_000))) as client:
        said = client.post("/v1/search", files={"image": ("x.jpg", b"x" * 200_000)})
        assert said.status_code == 413

        taken = []

        def chunks() -> Iterator[bytes]:  # no Content-Length
            yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
            for _ in range(1000):
                taken.append(1)
                yield b"x" * 10_000

        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        assert client.post("/v1/search", content=chunks(), headers=kind).status_code == 413
        exact = client.post("/v1/search", files={"image": ("x.jpg", b"x" * 10_001)})
        assert exact.status_code == 413
        for length in ("-1", "many"):
            assert client.post("/v1/search", headers={"Content-Length": length}).status_code == 413


def _bomb() -> bytes:
    """A small PNG of 30000 x 30000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(1 + 30_000 // 8) * 30_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_bomb_is_not_decoded(client: Any) -> None:
    answer = client.post("/v1/search/stream", files={"image": ("x.png", _bomb())})
    assert answer.status_code == 413
    assert "pixels" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "data", [b"", b"no picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\xff\xd8\xff\xe0" * 9]
)
def test_what_is_no_picture_is_refused(client: Any, data: bytes) -> None:
    answer = client.post("/v1/search", files={"image": ("x.jpg", data)}, data={"text": "a hat"})
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "picture"


def test_an_original_that_became_a_bomb_is_not_decoded(client: Any, folder: Path, index: Index) -> None:
    path = folder / "photos" / "in" / "3.jpg"
    before = path.read_bytes()
    path.write_bytes(_bomb())
    try:
        assert client.get("/v1/picture/large", params={"key": "in/3.jpg"}).content == index.thumbnail("in/3.jpg")
    finally:
        path.write_bytes(before)


def test_an_original_that_became_a_link_to_the_outside_is_not_shown(client: Any, folder: Path, index: Index) -> None:
    path = folder / "photos" / "in" / "7.jpg"
    before = path.read_bytes()
    path.unlink()
    path.symlink_to(folder / "secret.jpg")
    try:
        shown = client.get("/v1/picture/large", params={"key": "in/7.jpg"}).content
        assert shown == index.thumbnail("in/7.jpg")
    finally:
        path.unlink()
        path.write_bytes(before)


def test_captions_are_sent_as_data_and_the_page_never_makes_html(client: Any) -> None:
    answer = client.get("/v1/search", params={"text": support.SCRIPT, "k": 40})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert support.SCRIPT in [caption for hit in answer.json()["hits"] for caption in hit["captions"]]
    script = client.get("/app.js").text
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc"):
        assert danger not in script
    page = client.get("/").text
    assert "style=" not in page
    assert "http" not in page  # nothing from another host
    assert " on" not in "".join(part.split(">")[0] for part in page.split("<button")[1:])


@pytest.mark.parametrize("path", ["/", "/app.js", "/v1/info", "/nothing", "/v1/picture/thumbnail?key=in/4.jpg"])
def test_every_answer_has_the_policy(client: Any, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-frame-options"] == "DENY"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert not [name for name in headers if name.startswith("access-control")]


def test_other_sites_are_refused(client: Any) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:81", "http://127.0.0.1.evil.example"):
        answer = client.post("/v1/search", data={"text": "a hat"}, headers={"Origin": origin})
        assert answer.status_code == 403, origin
        assert "access-control-allow-origin" not in answer.headers
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        assert client.options("/v1/search", headers=asked).status_code == 403
    site = client.get("/v1/picture/thumbnail", params={"key": "in/4.jpg"}, headers={"Sec-Fetch-Site": "cross-site"})
    assert site.status_code == 403
    own = client.post("/v1/search", data={"text": "a hat"}, headers={"Origin": "http://127.0.0.1"})
    assert own.status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:80"])
def test_a_name_that_points_here_is_refused(client: Any, host: str) -> None:
    assert client.get("/v1/info", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:8321", "localhost", "LOCALHOST:1", "[::1]:8321"])
def test_names_of_this_machine_are_answered(client: Any, host: str) -> None:
    assert client.get("/v1/info", headers={"Host": host}).status_code == 200


def test_without_the_key_nothing_of_the_index_is_told(locked: Any) -> None:
    paths = {route.path for route in locked.app.routes if hasattr(route, "path")} | set(locked.app.openapi()["paths"])
    assert {"/v1/info", "/v1/search", "/metrics", *PATHS} <= paths
    for path in sorted(paths - set(OPEN)):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-API-Key": KEY[:-1]}, 
                        {"Authorization": f"Basic {KEY}"},
                        {"Cookie": "imglish_session=x"}, {"Cookie": f"imglish_session={KEY}"}):  # fmt: skip
            answer = locked.get(path, params={"key": "in/4.jpg", "text": "a hat"}, headers=headers)
            assert answer.status_code == 401, (path, headers)
            assert answer.headers["www-authenticate"] == "Bearer"
    assert locked.get("/").status_code == 200
    assert locked.get("/healthz").json() == {"status": "ok"}


def test_the_key_opens(locked: Any) -> None:
    assert locked.get("/v1/info", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert locked.get("/v1/info", headers={"X-API-Key": KEY}).status_code == 200


def test_the_cookie_of_the_page(locked: Any) -> None:
    assert locked.post("/v1/session", data={"key": "wrong"}).status_code == 401
    assert locked.get("/v1/info").status_code == 401
    opened = locked.post("/v1/session", data={"key": KEY})
    said = opened.headers["set-cookie"].lower()
    assert "httponly" in said
    assert "samesite=strict" in said
    assert KEY not in said
    assert locked.get("/v1/picture/thumbnail", params={"key": "in/4.jpg"}).status_code == 200


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        Settings(key="1234")


@pytest.mark.parametrize(
    "asked",
    [{"k": 10_000}, {"k": 0}, {"rerank": 100_000}, {"offset": -1}, {"offset": 10**9},
     {"min_match": 2}, {"min_match": "nan"},
     {"text": "x" * 5000}, {"where": "(" * 1999}, {"where": "x" * 3000}, {"where": "1=1; drop table x"}, {"text": " "}],
)  # fmt: skip
def test_what_is_too_much_is_refused(client: Any, asked: dict[str, Any]) -> None:
    for answer in (
        client.get("/v1/search", params={"text": "a", **asked}),
        client.post("/v1/search", data={"text": "a", **asked}),
    ):
        assert answer.status_code == 400
        assert len(answer.text) < 1000


def test_messages_do_not_name_files_of_the_server(client: Any, index: Index, folder: Path) -> None:
    kept, row = index.store.rows, index.store.rows["in/1.jpg"]  # type: ignore[attr-defined]
    kept["in/1.jpg"] = type(row)(**{**vars(row), "thumbnail": b""})
    try:
        for path in ("/v1/picture/thumbnail", "/v1/picture/large", "/v1/picture/explain"):
            answer = client.get(path, params={"key": "in/1.jpg", "text": "a hat"})
            assert answer.status_code == 404
            assert str(folder) not in answer.text
        found = client.post("/v1/search/stream", data={"text": "a bag of hats", "rerank": 24})
        assert "cannot be read" in found.text
        assert str(folder) not in found.text
    finally:
        kept["in/1.jpg"] = row
    assert "secret/place" not in client.get("/v1/info").text


def test_a_mistake_of_ours_is_not_explained(client: Any, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("/home/someone/photos")

    monkeypatch.setattr(index, "_recalled", broken)
    answer = client.get("/v1/search", params={"text": "a hat"})
    assert answer.status_code == 500
    assert "someone" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/healthz").status_code == 200


def test_pictures_are_drawn_anew(client: Any, folder: Path) -> None:
    """Bytes behind the picture (a polyglot file) and metadata do not reach the browser."""
    path = folder / "photos" / "in" / "8.jpg"
    before = path.read_bytes()
    path.write_bytes(before + b"<script>alert(1)</script>")
    try:
        sent = client.get("/v1/picture/large", params={"key": "in/8.jpg"}).content
        assert b"<script>" not in sent
        assert b"home address" in before
        assert b"home address" not in sent
        Image.open(io.BytesIO(sent)).verify()
    finally:
        path.write_bytes(before)
