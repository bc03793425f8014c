"""What every store must do; the same suite for all of them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imglish.search.filters import FilterError, accepts, parse
from imglish.search.lance import LanceStore
from imglish.search.qdrant import QdrantStore
from imglish.search.qdrant_lease import Lease
from imglish.search.qdrant_rows import point_id
from imglish.search.store import COLUMNS, Row, Store, StoreError, open_store
from tests.search.samples import rows

pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact")  # Qdrant's client's local form
FILTERS = [
    'path starts "a/it\'s 1" and not tag = one',
    "caption contains 'red DOG'",
    "date >= 2021-03",
    "date = 2021-03 or date < 2021-02-06",
    "not date > 2021-05",
    "width > 120 and tag != two",
    'path = "a/it\'s 3.jpg"',
    "height = 50 and (width <= 110 or width != 130)",
    "source = photos and duplicate_of = ''",
    "path starts '%_'",
]


def _lance(folder: Path) -> Store:
    return open_store(str(folder / "index"), 16)


def _qdrant(folder: Path) -> Store:
    """In the client's local form, which keeps to the server's answers; its files are opened once a process."""
    models = pytest.importorskip("qdrant_client", reason="needs the extra qdrant")
    return QdrantStore.open(QDRANT, 16, models.QdrantClient(path=str(folder / "qdrant")))


QDRANT = "qdrant+http://localhost:6333/photos"


@pytest.fixture(params=[_lance, _qdrant], ids=["lance", "qdrant"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    make: Callable[[Path], Store] = request.param
    return make(tmp_path)


def _true(some: list[Row], vector: np.ndarray, k: int) -> list[str]:
    score = {row.key: float(vector @ row.vector.astype(np.float32)) for row in some}
    return sorted(score, key=lambda key: (-score[key], key))[:k]


def test_rows_come_back_as_they_went_in(store: Store) -> None:
    some = rows(0, 30)
    store.upsert(some)
    assert store.count() == 30
    found = store.get([row.key for row in some[::-1]] + ["nobody"], COLUMNS, vectors=True)
    assert list(found) == [row.key for row in some[::-1]]
    for row in some:
        same = found[row.key]
        assert all(getattr(same, name) == getattr(row, name) for name in COLUMNS)
        np.testing.assert_allclose(same.vector.astype(np.float32), row.vector.astype(np.float32), atol=1e-3)
    cards = store.get([some[0].key])
    assert cards[some[0].key].thumbnail == b""
    assert cards[some[0].key].captions == some[0].captions
    scanned = [row for block in store.scan(("digest",), vectors=True) for row in block]
    assert {row.key: row.digest for row in scanned} == {row.key: row.digest for row in some}
    assert scanned[0].vector.shape == (16,)


def test_search_is_exact_with_every_filter(store: Store) -> None:
    some = rows(0, 60)
    store.upsert(some)
    queries = np.stack([row.vector for row in rows(100, 103)]).astype(np.float32)
    for text in (None, *FILTERS):
        where = parse(text)
        left = [row for row in some if where is None or accepts(where, row)]
        assert store.count(where) == len(left), text
        for vector, hits in zip(queries, store.search(queries, 7, where)):
            assert [hit.key for hit in hits] == _true(left, vector, 7), text
            scores = {row.key: float(vector @ row.vector.astype(np.float32)) for row in left}
            assert all(abs(hit.score - scores[hit.key]) < 1e-3 for hit in hits)


def test_changes_replace_and_deletions_last(store: Store) -> None:
    store.upsert(rows(0, 20))
    before = store.version
    changed = Row(rows(3, 4)[0].key, -rows(3, 4)[0].vector, digest="new")
    store.upsert([changed, *rows(20, 25)])
    assert store.version != before
    assert store.count() == 25
    found = store.get([changed.key], COLUMNS, vectors=True)[changed.key]
    assert found.digest == "new"
    assert found.tags == ()
    assert found.thumbnail == b""
    assert store.search(changed.vector[None].astype(np.float32), 1)[0][0].key == changed.key
    store.delete([changed.key, "nobody"])
    store.delete([])
    store.upsert([])
    assert store.count() == 24
    assert changed.key not in store.get([changed.key])
    assert changed.key not in [hit.key for hit in store.search(changed.vector[None].astype(np.float32), 24)[0]]
    keys = [row.key for row in rows(4, 6)]
    store.mark_duplicates({keys[0]: keys[1]})
    marked = store.get(keys, COLUMNS, vectors=True)
    assert marked[keys[0]].duplicate_of == keys[1]
    assert marked[keys[0]].digest == rows(4, 5)[0].digest
    assert marked[keys[0]].vector.any()
    assert marked[keys[1]].duplicate_of == ""
    with pytest.raises(ValueError, match="different keys"):
        store.upsert([*rows(0, 1), *rows(0, 1)])


def test_edges_of_a_search(store: Store) -> None:
    vector = np.ones((1, 16), np.float32)
    assert store.search(vector, 5) == [[]]
    assert store.count() == 0
    store.upsert(rows(0, 4))
    assert len(store.search(vector, 50)[0]) == 4
    assert store.search(vector, 5, parse("width > 9999")) == [[]]
    twins = [Row(key, rows(1, 2)[0].vector, digest=key) for key in ("z", "y", "x", "w")]
    store.upsert(twins)
    assert [hit.key for hit in store.search(rows(1, 2)[0].vector[None].astype(np.float32), 3)[0]][1:] == ["w", "x"] or [
        hit.key for hit in store.search(rows(1, 2)[0].vector[None].astype(np.float32), 3)[0]
    ] == [rows(1, 2)[0].key, "w", "x"]
    with pytest.raises(ValueError, match="shape"):
        store.search(np.ones((1, 5), np.float32), 3)


def test_notes_and_what_is_said_of_a_store(store: Store) -> None:
    assert store.note("manifest") is None
    store.set_note("manifest", "één")
    store.set_note("manifest", "twee")
    assert store.note("manifest") == "twee"
    store.upsert(rows(0, 3))
    info = store.info()
    assert info.rows == 3
    assert info.dimension == 16
    assert info.recall.startswith("exact")
    store.optimize()
    assert store.count() == 3


def test_an_index_of_lance_is_opened_again(tmp_path: Path) -> None:
    first = _lance(tmp_path)
    first.upsert(rows(0, 9))
    again = open_store(str(tmp_path / "index"))
    assert again.count() == 9
    assert again.dimension == 16
    first.upsert(rows(9, 12))
    assert again.count() == 12
    assert len(again.search(np.ones((1, 16), np.float32), 50)[0]) == 12
    with pytest.raises(StoreError, match="16 numbers, the model gives 8"):
        open_store(str(tmp_path / "index"), 8)
    with pytest.raises(StoreError, match="there is no index"):
        open_store(str(tmp_path / "nowhere"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match="exists and is no index"):
        open_store(str(tmp_path / "photos"), 16)


def test_many_rows_are_searched_through_an_index_and_few_exactly(tmp_path: Path) -> None:
    store = LanceStore.open(str(tmp_path / "index"), 16, exact_rows=200, few_rows=60)
    some = rows(0, 600)
    store.upsert(some)
    queries = np.stack([row.vector for row in rows(900, 920)]).astype(np.float32)
    assert store.info().recall.startswith("exact, from disk")
    store.optimize()
    assert store.info().recall.startswith("IVF_RQ")
    true = [set(_true(some, vector, 10)) for vector in queries]
    found = [{hit.key for hit in hits} for hits in store.search(queries, 10)]
    assert np.mean([len(a & b) for a, b in zip(true, found)]) >= 9.5
    assert [{hit.key for hit in hits} for hits in store.search(queries, 10, exact=True)] == true
    where = parse("width < 150")  # leaves 50: compared with all
    left = [row for row in some if row.width < 150]
    assert [[hit.key for hit in hits] for hits in store.search(queries, 5, where)] == [
        _true(left, vector, 5) for vector in queries
    ]


def test_the_second_writer_waits_or_is_refused(tmp_path: Path) -> None:
    one, two = _lance(tmp_path), _lance(tmp_path)
    with one.writing():
        with pytest.raises(StoreError, match=r"being written to by process \d+"), two.writing():
            pass
        timer = threading.Timer(0.3, lambda: None)
        timer.start()
    with two.writing(wait=5):
        two.upsert(rows(0, 1))


def test_qdrant_is_opened_again_and_refuses_what_is_no_index(tmp_path: Path) -> None:
    first = _qdrant(tmp_path)
    client: Any = first._client  # type: ignore[attr-defined]
    first.upsert(rows(0, 9))
    again = QdrantStore.open(QDRANT, client=client)
    assert (again.count(), again.dimension) == (9, 16)
    assert again.version == first.version > 0
    with pytest.raises(StoreError, match="16 numbers, the model gives 8"):
        QdrantStore.open(QDRANT, 8, client)
    with pytest.raises(StoreError, match="there is no index"):
        QdrantStore.open("qdrant+http://localhost:6333/nothing", client=client)
    client.create_collection("foreign", vectors_config={})
    with pytest.raises(StoreError, match="exists and is no index"):
        QdrantStore.open("qdrant+http://localhost:6333/foreign", 16, client)
    with pytest.raises(StoreError, match=r"qdrant\+http://HOST:PORT/NAME"):
        open_store("qdrant+http://photos")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        nowhere = f"qdrant+http://127.0.0.1:{nobody.getsockname()[1]}/photos"
        with pytest.raises(StoreError, match="cannot be reached") as caught:
            open_store(nowhere)
        assert nowhere in str(caught.value)


def test_many_rows_are_sent_to_qdrant_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _qdrant(tmp_path)
    monkeypatch.setattr("imglish.search.qdrant.PART", 3000)
    sent = []
    upsert = store._client.upsert  # type: ignore[attr-defined]
    monkeypatch.setattr(store._client, "upsert", lambda *given, **more: sent.append(given) or upsert(*given, **more))  # type: ignore[attr-defined]
    store.upsert(rows(0, 40))
    parts = [len(points) for name, points in sent if name == "photos"]
    assert sum(parts) == 40
    assert max(parts) < 20
    assert store.count() == 40


def test_one_writer_at_a_time_in_qdrant(tmp_path: Path) -> None:
    store = _qdrant(tmp_path)
    client: Any = store._client  # type: ignore[attr-defined]
    other = QdrantStore.open(QDRANT, client=client)
    with store.writing():
        store.upsert(rows(0, 1))
        with pytest.raises(StoreError, match=r"being written to by process \d+"), other.writing():
            pass
    with other.writing():
        other.upsert(rows(1, 2))
    killed = Lease(client, "photos-notes", "photos", seconds=0.3)
    assert killed._take() == ""  # and is never heard of again
    with pytest.raises(StoreError, match="process"), store.writing():
        pass
    with store.writing(wait=5):
        store.upsert(rows(2, 3))
        thief = Lease(client, "photos-notes", "photos")
        client.delete("photos-notes", [point_id("writer")])  # as if this process had stood still
        assert thief._take() == ""
        store._lease._lost_to = store._lease._take()  # type: ignore[attr-defined]  # what its thread finds
        with pytest.raises(StoreError, match="stood still"):
            store.upsert(rows(3, 4))
    assert store.count() == 3


@pytest.mark.parametrize(
    "text, problem",
    [
        ("colour = red", "no field 'colour'"),
        ("width = wide", "number of pixels"),
        ("date > yesterday", "no date"),
        ("tag > x", "tag > is not known"),
        ("(width > 3", "bracket"),
        ("width > 3 height > 3", "expected 'and'"),
        ("width >", "a value is expected"),
        ("path = 'x", "cannot read"),
        ("(" * 300 + "width > 3", "nested"),
        ("width > 3 and " * 300 + "width > 3", "longest allowed|more than"),
    ],
)
def test_filters_that_make_no_sense(text: str, problem: str) -> None:
    with pytest.raises(FilterError, match=problem):
        parse(text)


def test_a_filter_never_becomes_code(tmp_path: Path) -> None:
    store = _lance(tmp_path)
    store.upsert(rows(0, 10))
    for hostile in ("x' OR '1'='1", "x'; DROP TABLE pictures; --", "') OR (1=1", "\\' OR 1=1 --"):
        for text in (f'path = "{hostile}"', f'caption contains "{hostile}"', f'tag = "{hostile}"'):
            assert store.count(parse(text)) == 0
