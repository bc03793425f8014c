from __future__ import annotations

import socket
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from imglish.cli import main, serve

pytest.importorskip("fastapi", reason="needs the extra serve")
KEY = "correct horse battery"


def _arguments(**more: Any) -> Namespace:
    values = {"host": "127.0.0.1", "port": 0, "key_file": None, "allow_host": [], "rerank": 40, "max_upload": 20}
    return Namespace(**{**values, "queue": 64, **more})


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.KEY, raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "photos.example"])
def test_other_machines_need_a_key(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "photos.index", "--host", host]) == 2
    assert "--key-file" in capsys.readouterr().err


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    found = serve._settings(_arguments(host="0.0.0.0", key_file=tmp_path / "key"))
    assert (found.key, found.hosts) == (KEY, None)
    monkeypatch.setenv(serve.KEY, KEY[::-1])
    assert serve._settings(_arguments(host="0.0.0.0", allow_host=["Photos.example"])).hosts == (
        "127.0.0.1",
        "::1",
        "localhost",
        "photos.example",
    )
    assert serve._settings(_arguments()).key == KEY[::-1]


def test_this_machine_alone_needs_none() -> None:
    found = serve._settings(_arguments(max_upload=3))
    assert (found.key, found.hosts, found.upload) == (None, ("127.0.0.1", "::1", "localhost"), 3 * 2**20)


@pytest.mark.parametrize("wrong", [("--rerank", "101"), ("--queue", "0"), ("--max-upload", "0"), ("--port", "99999")])
def test_numbers_out_of_range(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "photos.index", *wrong]) == 2
    assert f"{wrong[0]} is {wrong[1]}" in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "photos.index", "--port", str(taken.getsockname()[1])]) == 1
    assert "imglish serve:" in capsys.readouterr().err
