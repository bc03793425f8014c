from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest

from imglish.data.errors import LOGGED, DataError, Errors, Problem, printable, read_errors


def problem(number: int, reason: str = "damaged") -> Problem:
    return Problem(f"p{number}", reason, f"p{number}: is {reason}")


def test_each_is_counted_and_written_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "run" / "errors.csv"
    errors = Errors(file=file)
    with caplog.at_level(logging.WARNING):
        for number in (1, 2, 1, 2, 3):
            errors.add(problem(number))
        errors.add(problem(1, "empty"))
    assert len(errors) == 4
    assert errors.counts == {"damaged": 3, "empty": 1}
    assert errors.summary() == "3 damaged, 1 empty"
    assert len(caplog.records) == 4
    with file.open(newline="") as lines:
        assert [row["key"] for row in csv.DictReader(lines)] == ["p1", "p2", "p3", "p1"]


def test_a_run_that_goes_on_does_not_write_twice(tmp_path: Path) -> None:
    file = tmp_path / "errors.csv"
    Errors(file=file).extend([problem(1), problem(2)])
    text = file.read_text()
    file.write_text(text[:-5])  # a kill cut the last line off
    again = Errors(file=file)
    again.extend([problem(1), problem(3)])
    assert again.counts == {"damaged": 2}
    assert [p.key for p in read_errors(file)].count("p1") == 1


def test_the_limit_is_a_share_of_what_was_seen() -> None:
    errors = Errors(0.01)
    errors.extend(problem(i) for i in range(10))
    errors.check(seen=1, items=5000)  # early in a run the share is taken over a thousand
    errors.add(problem(10))
    with pytest.raises(DataError, match=r"11 of 1000 pictures cannot be used \(11 damaged\).* 1\.00% .*p0: is damaged"):
        errors.check(seen=1, items=5000)
    errors.check(seen=2000, items=5000)
    with pytest.raises(DataError, match="11 of 500"):
        errors.check(seen=2000, items=500)
    with pytest.raises(ValueError, match="expected 0"):
        Errors(1.5)


def test_the_log_names_some_of_each_reason_and_the_file_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    errors = Errors(1, tmp_path / "errors.csv")
    with caplog.at_level(logging.WARNING):
        errors.extend(problem(i) for i in range(LOGGED + 10))
        errors.add(problem(0, "rare"))
    assert len(caplog.records) == LOGGED + 2
    assert "named in" in caplog.records[LOGGED].getMessage()
    assert len(list(read_errors(tmp_path / "errors.csv"))) == LOGGED + 11


def test_hostile_names_do_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = 'a\x1b[2J\n"x",y\u202e\ud800' + "z" * 10_000
    errors = Errors(1, tmp_path / "errors.csv")
    with caplog.at_level(logging.WARNING):
        errors.add(Problem(name, "outside", f"{name}: leads out"))
    assert "\x1b" not in caplog.text
    (found,) = read_errors(tmp_path / "errors.csv")
    assert found.key.startswith('a\\x1b[2J\\n"x",y')
    assert len(found.key) < 500
    assert printable("äöü 你好") == "äöü 你好"
