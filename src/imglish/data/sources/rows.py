"""Rows of text files: CSV, TSV, JSON lines, JSON lists. A row that cannot be read is a problem, not an end."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from imglish.data.errors import DataError, Problem, printable
from imglish.data.sources.files import opened

MAX_LINE = 64 * 2**20  # bytes; a longer line, cell or element is refused
BLOCK = 1 << 20
LINES = (".jsonl", ".ndjson")
CELLS = (".csv", ".tsv")


@dataclass(slots=True)
class Row:
    """where: ``file:line``; fields: by name; start, size: bytes of the row in its file, where it can be read again, or
    its number in table ``file``; holder: field that holds the picture itself and is not among ``fields``; key: of the
    record, where its picture has no name (default: from ``where``)."""

    where: str
    fields: Mapping[str, Any]
    start: int = -1
    size: int = 0
    file: int = 0
    holder: str | None = None
    key: str = ""


def suffix(path: str) -> str:
    """The ending of a name in lower case, ``.gz`` aside."""
    name = path.lower().removesuffix(".gz").rsplit("/", 1)[-1]
    return "." + name.rsplit(".", 1)[1] if "." in name else ""


def read_rows(path: str) -> Iterator[Row | Problem]:
    """Rows of a ``.jsonl``, ``.csv``, ``.tsv`` or ``.json`` file (a list, or one object of objects), ``.gz`` or not."""
    kind = suffix(path)
    with opened(path) as file:
        if kind in LINES:
            yield from _json_lines(file, path)
        elif kind in CELLS:
            yield from _cells(file, path, "\t" if kind == ".tsv" else ",")
        elif kind == ".json":
            yield from _json_list(file, path)
        else:
            raise DataError(f"{path}: cannot read {kind or 'a file without a suffix'} as rows")


def read_lines(file: BinaryIO, path: str) -> Iterator[tuple[str, int, bytes] | Problem]:
    """Lines that are not blank as (``file:line``, first byte, bytes)."""
    number, start = 0, 0
    while line := file.readline(MAX_LINE + 1):
        number, begin = number + 1, start
        start += len(line)
        where = f"{path}:{number}"
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):  # the rest of it
                line = file.readline(MAX_LINE)
                start += len(line)
            yield Problem(where, "line too long", f"{where}: the line is longer than {MAX_LINE >> 20} MiB")
        elif line.strip():
            yield where, begin, line


def _json_lines(file: BinaryIO, path: str) -> Iterator[Row | Problem]:
    for line in read_lines(file, path):
        if isinstance(line, Problem):
            yield line
            continue
        where, start, data = line
        found = parse_object(data, where)
        yield found if isinstance(found, Problem) else Row(where, found, start, len(data))


def parse_object(data: bytes, where: str) -> Mapping[str, Any] | Problem:
    """A JSON object, or why there is none."""
    try:
        row = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Problem(where, "broken text", f"{where}: not valid JSON: not UTF-8: {error.reason}")
    except RecursionError:
        return Problem(where, "broken line", f"{where}: not valid JSON: nested too deeply")
    except ValueError as error:
        return Problem(where, "broken line", f"{where}: not valid JSON: {error}")
    if not isinstance(row, dict):
        return Problem(where, "wrong type", f"{where}: expected a JSON object, found {type(row).__name__}")
    return cast(Mapping[str, Any], row)


def _cells(file: BinaryIO, path: str, delimiter: str) -> Iterator[Row | Problem]:
    """Rows of a table. The place of a row are the bytes of the lines that the reader took for it."""
    csv.field_size_limit(MAX_LINE)  # of the whole process; the module has no other way
    lines = _Decoded(file, path)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = lines.taken
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"{path}:{reader.line_num}"
            yield Problem(where, "broken line", f"{where}: {error}")
            continue
        where = f"{path}:{reader.line_num}"
        if lines.broken:
            lines.broken = False
            yield Problem(where, "broken text", f"{where}: not UTF-8")
        elif header is None:
            header = cells
        elif len(cells) != len(header):
            if cells:
                text = f"{where}: the number of cells differs from the header's: {len(cells)}, not {len(header)}"
                yield Problem(where, "broken line", text)
        else:
            yield Row(where, dict(zip(header, cells)), start, lines.taken - start)


class _Decoded(Iterator[str]):
    """Lines of a file as text; ``taken``: bytes of the lines so far; ``broken``: a line since was not UTF-8."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file, self.path = file, path
        self.taken, self.broken = 0, False

    def __next__(self) -> str:
        line = self.file.readline(MAX_LINE + 1)
        if not line:
            raise StopIteration
        if self.taken == 0:
            self.taken, line = self.taken + len(line), line.removeprefix(codecs.BOM_UTF8)
        else:
            self.taken += len(line)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError:
            self.broken = True
            return line.decode("utf-8", "replace")


def cell_row(data: bytes, header: list[str], delimiter: str) -> Mapping[str, Any]:
    """The fields of one row of a table that is read again."""
    reader = csv.reader(io.StringIO(data.decode("utf-8-sig", "replace")), delimiter=delimiter)
    return dict(zip(header, next(reader, [])))


def _json_list(file: BinaryIO, path: str) -> Iterator[Row | Problem]:
    """Elements of a JSON list, parsed one after the other, or the values of an object of objects.

    Damage between elements ends the file with a :class:`DataError`: what follows cannot be found again.
    """
    text = _Unparsed(file, path)
    if text.peek() == "{":
        whole = text.whole()
        if not isinstance(whole, dict) or not all(isinstance(value, dict) for value in whole.values()):
            raise DataError(f"{path}: a JSON object whose values are not all objects is no list of records")
        yield from (Row(f"{path}[{name}]", value) for name, value in whole.items())
        return
    if text.take() != "[":
        raise DataError(f"{path}: expected a JSON list")
    number = 0
    while text.peek() != "]":
        where = f"{path}[{number}]"
        value = text.element(where)
        if isinstance(value, dict):
            yield Row(where, value)
        else:
            yield Problem(where, "wrong type", f"{where}: expected a JSON object, found {type(value).__name__}")
        number += 1
        if text.peek() == ",":
            text.take()
        elif text.peek() != "]":
            raise DataError(f"{where}: not valid JSON: expected a comma, found {printable(text.peek())!r}")


class _Unparsed:
    """JSON text that is read as it is needed."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file, self.path = file, path
        self.decode = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended = "", 0, False
        self.parser = json.JSONDecoder()

    def _more(self, size: int = BLOCK) -> None:
        data = self.file.read(size)
        self.ended = not data
        try:
            self.text = self.text[self.at :] + self.decode.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8: {error.reason}") from error
        self.at = 0

    def peek(self) -> str:
        """The next character that is no space, without taking it; nothing at the end is an error."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                raise DataError(f"{self.path}: not valid JSON: it is cut off")
            self._more()

    def take(self) -> str:
        character = self.peek()
        self.at += 1
        return character

    def element(self, where: str) -> Any:
        self.peek()
        size = BLOCK
        while True:
            try:
                value, end = self.parser.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # a number might go on behind the text
                    self.at = end
                    return value
            except RecursionError as error:
                raise DataError(f"{where}: not valid JSON: nested too deeply") from error
            except ValueError as error:
                if self.ended or len(self.text) - self.at > MAX_LINE:
                    raise DataError(f"{where}: not valid JSON: {error}") from error
            self._more(size)
            size *= 2

    def whole(self) -> Any:
        while not self.ended:
            self._more(16 * BLOCK)
        try:
            return json.loads(self.text[self.at :])
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: not valid JSON: {error}") from error


def read_json(path: str) -> Any:
    """A whole JSON file. Raises :class:`DataError`."""
    with opened(path) as file:
        text = _Unparsed(file, path)
        text.peek()
        return text.whole()
