from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import imglish
from imglish.search import Index
from tests.web import support


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> imglish.Model:
    return support.tiny_model(tmp_path_factory.mktemp("web-model"))


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside the pictures of the index it holds ``secret.jpg``."""
    return tmp_path_factory.mktemp("web-photos")


@pytest.fixture(scope="package")
def index(folder: Path, model: imglish.Model) -> Index:
    return support.make_index(folder, model)


@pytest.fixture
def client(index: Index) -> Iterator[Any]:
    app = pytest.importorskip("imglish.web.app", reason="needs the extra serve")
    with support.closing(app.create(index)) as found:
        yield found
