from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError

import pytest

from imglish.web.batching import Batcher, BusyError


class Slow:
    """Answers when it may, and writes down what it was asked."""

    def __init__(self) -> None:
        self.began, self.may_go = threading.Event(), threading.Event()
        self.seen: list[list[str] | str] = []

    def first(self, queries: Sequence[str]) -> list[str]:
        self.seen.append(list(queries))
        self.began.set()
        assert self.may_go.wait(10)
        if "bad" in queries:
            raise ValueError("bad")
        return [query.upper() for query in queries]

    def dear(self, query: str) -> Callable[[], str]:
        def compute() -> str:
            self.seen.append(query)
            if query == "bad":
                raise ValueError(query)
            return f"<{query}>"

        return compute


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def make(slow: Slow) -> Iterator[Callable[..., Batcher[str, str]]]:
    made: list[Batcher[str, str]] = []

    def batcher(**more: int) -> Batcher[str, str]:
        made.append(Batcher(slow.first, **more))
        return made[-1]

    yield batcher
    slow.may_go.set()
    for one in made:
        one.close()


def _busy(batcher: Batcher[str, str], slow: Slow) -> None:
    """Occupy the thread."""
    batcher.first("begin")
    assert slow.began.wait(10)


def test_what_comes_while_it_computes_is_one_batch(slow: Slow, make: Callable[..., Batcher[str, str]]) -> None:
    batcher = make(most=3)
    _busy(batcher, slow)
    futures = [batcher.first(name) for name in "abcd"]
    slow.may_go.set()
    assert [future.result(10) for future in futures] == ["A", "B", "C", "D"]
    assert slow.seen == [["begin"], ["a", "b", "c"], ["d"]]


def test_first_answers_go_before_reranking(slow: Slow, make: Callable[..., Batcher[str, str]]) -> None:
    batcher = make()
    _busy(batcher, slow)
    dear = [batcher.alone(slow.dear("x")), batcher.alone(slow.dear("y"))]
    quick = batcher.first("a")
    slow.may_go.set()
    assert [future.result(10) for future in (quick, *dear)] == ["A", "<x>", "<y>"]
    assert slow.seen == [["begin"], ["a"], "x", "y"]


def test_a_full_queue_refuses(slow: Slow, make: Callable[..., Batcher[str, str]]) -> None:
    batcher = make(waiting=2)
    _busy(batcher, slow)
    batcher.first("a")
    gone = batcher.alone(slow.dear("b"))
    assert batcher.waiting == 2
    with pytest.raises(BusyError, match="2 searches wait"):
        batcher.first("c")
    with pytest.raises(BusyError, match="2 searches wait"):
        batcher.alone(slow.dear("c"))
    gone.cancel()  # a client that went away leaves its place
    assert batcher.first("d") is not None
    slow.may_go.set()


def test_what_is_cancelled_is_not_computed(slow: Slow, make: Callable[..., Batcher[str, str]]) -> None:
    batcher = make()
    _busy(batcher, slow)
    batcher.alone(slow.dear("x")).cancel()
    later = batcher.alone(slow.dear("y"))
    slow.may_go.set()
    assert later.result(10) == "<y>"
    assert "x" not in slow.seen


def test_an_error_reaches_its_client_alone(slow: Slow, make: Callable[..., Batcher[str, str]]) -> None:
    batcher = make()
    slow.may_go.set()
    for bad in (batcher.first("bad"), batcher.alone(slow.dear("bad"))):
        with pytest.raises(ValueError, match="bad"):
            bad.result(10)
    assert batcher.first("a").result(10) == "A"
    assert batcher.alive


def test_a_query_that_fails_does_not_take_its_batch_along(slow: Slow, make: Callable[..., Batcher[str, str]]) -> None:
    batcher = make()
    _busy(batcher, slow)
    one, bad, two = batcher.first("a"), batcher.first("bad"), batcher.first("b")
    slow.may_go.set()
    assert (one.result(10), two.result(10)) == ("A", "B")
    with pytest.raises(ValueError, match="bad"):
        bad.result(10)


def test_closing_ends_what_waits(slow: Slow, make: Callable[..., Batcher[str, str]]) -> None:
    batcher = make()
    _busy(batcher, slow)
    waits = batcher.alone(slow.dear("x"))
    threading.Timer(0.1, slow.may_go.set).start()
    batcher.close()
    assert not batcher.alive
    with pytest.raises(CancelledError):
        waits.result(10)
    with pytest.raises(BusyError, match="stopping"):
        batcher.first("late")
