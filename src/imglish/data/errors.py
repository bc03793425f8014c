"""One place for everything that is wrong with data: counted by reason, named once, and a limit at which a job stops."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

COLUMNS = ("reason", "key", "message")
FILE = "errors.csv"
SEEN_AT_LEAST = 1000  # items over which the share is taken, early in a job
KEPT = 100_000  # problems that are kept in memory
LOGGED = 20  # of each reason that are named in the log; the file names all


class DataError(ValueError):
    """Data that cannot be used: not there, not of a known kind, or with more errors than are allowed. The message says
    what and why."""


@dataclass(frozen=True)
class Problem:
    """One thing that cannot be used. key: the record, or the place ``file:line``; reason: a few words that are counted;
    message: one line that begins with the key."""

    key: str
    reason: str
    message: str


class Errors:
    """Takes problems; each is written once to the log and to ``file`` (CSV, appended, complete at every moment).

    share: part of the items that may be unusable, 0..1; what: what the items are, for messages. A ``file`` that is
    there from an earlier run is continued: what it names is not written again. quiet: without the log. ``named`` holds
    the first :data:`KEPT` problems.
    """

    def __init__(
        self, share: float = 0.01, file: Path | None = None, what: str = "pictures", quiet: bool = False
    ) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"a share of errors of {share}: expected 0..1")
        self.share, self.file, self.what, self.quiet = share, file, what, quiet
        self.counts: Counter[str] = Counter()
        self.named: list[Problem] = []
        self._known: set[tuple[str, str]] = set()
        self._written = {(p.reason, p.key) for p in read_errors(file)} if file is not None else set()

    def __len__(self) -> int:
        """How many different problems there are."""
        return len(self._known)

    def add(self, problem: Problem) -> None:
        """Count and name ``problem``, unless it was there before."""
        name = (problem.reason, printable(problem.key))
        if name in self._known:
            return
        self._known.add(name)
        self.counts[problem.reason] += 1
        if len(self.named) < KEPT:
            self.named.append(problem)
        if not self.quiet:
            self._log(problem)
        if self.file is not None and name not in self._written:
            self._written.add(name)
            _append(self.file, problem)

    def extend(self, problems: Iterable[Problem]) -> None:
        """Take several problems."""
        for problem in problems:
            self.add(problem)

    def check(self, seen: int, items: int) -> None:
        """Raise :class:`DataError` when the problems are more than the share of what was ``seen`` (so that a run
        stops early), of at least :data:`SEEN_AT_LEAST` and at most all ``items``."""
        of = min(items, max(seen, SEEN_AT_LEAST))
        if len(self) > self.share * of:
            example = printable(self.named[0].message)
            raise DataError(
                f"{len(self)} of {of} {self.what} cannot be used ({self.summary()}), more than the allowed share of "
                f"{self.share:.2%} (max_errors); for example {example}"
            )

    def extend_checked(self, problems: Collection[Problem], items: int) -> None:
        """Take ``problems`` of ``items`` that were left after earlier ones: more than the share of these items are a
        :class:`DataError`, whatever came before."""
        fresh = Errors(self.share, what=self.what, quiet=True)
        fresh.extend(problems)
        self.extend(problems)
        fresh.check(items, items)

    def summary(self) -> str:
        """The counts in one line, most frequent first: ``3 damaged, 1 empty``."""
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())

    def _log(self, problem: Problem) -> None:
        count = self.counts[problem.reason]
        if count <= LOGGED:
            log.warning("%s: %s", problem.reason, printable(problem.message))
        elif count == LOGGED + 1:
            log.warning("%s: more of them, named in %s", problem.reason, self.file or "the list of errors")


def printable(text: str, most: int = 400) -> str:
    """``text`` in one line without control characters, cut after ``most``: hostile names do no harm in a terminal."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:most])
    return line + "..." if len(text) > most else line


def read_errors(path: Path) -> Iterator[Problem]:
    """The problems in an errors file; none if there is no such file. A line that a kill cut off is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.reader(file):
            if len(row) == len(COLUMNS) and tuple(row) != COLUMNS:
                yield Problem(row[1], row[0], row[2])


def _append(path: Path, problem: Problem) -> None:
    """Add a line with one write, so that lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not path.exists():
        writer.writerow(COLUMNS)
    writer.writerow((problem.reason, printable(problem.key), printable(problem.message)))
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, text.getvalue().encode("utf-8", "replace"))
    finally:
        os.close(handle)
