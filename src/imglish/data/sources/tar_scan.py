"""Members of a tar file, in any condition: after damage the scan goes on at the next header that is whole.

Python's ``tarfile`` ends without a word at a damaged header. Nothing is ever extracted here: members are places
``(offset, size)`` in the file, so names cannot lead anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from imglish.data.errors import Problem, printable

BLOCK = 512
MAGIC = 257  # where "ustar" stands in a header
SEARCH = 1 << 20  # bytes read at a time in search of a header
MAX_NAMES = 1 << 20  # bytes of a block with long names
ZEROS = bytes(BLOCK)


@dataclass(frozen=True)
class Member:
    """name as it stands in the file; offset, size: of its content; kind: links are neither read nor followed."""

    name: str
    offset: int
    size: int
    kind: Literal["file", "folder", "other"]


def scan(file: BinaryIO, size: int, where: str) -> Iterator[Member | Problem]:
    """Members in their order. ``size`` of the whole file; ``where`` names it in problems. Raises ``OSError``."""
    at, long_name, ended = 0, b"", False
    attributes: dict[str, bytes] = {}
    while at + BLOCK <= size:
        file.seek(at)
        header = file.read(BLOCK)
        if header == ZEROS:
            ended, at = True, at + BLOCK
            continue
        length = _length(header)
        if length is None:
            yield Problem(f"{where}@{at}", "damaged tar", f"{where}: no member begins at byte {at}, looking further")
            at, long_name, attributes = _next_header(file, at + BLOCK, size), b"", {}
            continue
        ended = False
        if (said := attributes.get("size", b"")).isdigit() and len(said) < 20:
            length = int(said)
        data, kind = at + BLOCK, header[156:157]
        at = data + -(-length // BLOCK) * BLOCK
        if data + length > size:
            name = printable(_name(header, long_name, attributes))
            yield Problem(f"{where}/{name}", "truncated", f"{where}/{name}: the tar file ends within this member")
            return
        if kind in b"LxgK" and kind:
            if length > MAX_NAMES:
                yield Problem(f"{where}@{data}", "damaged tar", f"{where}: {length:,} bytes of names at byte {data}")
            elif kind == b"L":
                long_name = file.read(length).split(b"\0", 1)[0]
            elif kind == b"x":
                attributes = _attributes(file.read(length))
            continue
        name = _name(header, long_name, attributes)
        long_name, attributes = b"", {}
        if kind == b"5" or (kind in (b"\0", b"0") and name.endswith("/")):
            yield Member(name, data, 0, "folder")
        else:
            yield Member(name, data, length, "file" if kind in (b"\0", b"0", b"7") else "other")
    if not ended or size - at > 0:
        yield Problem(where, "truncated", f"{where}: the tar file is cut off: it has no end mark")


def _length(header: bytes) -> int | None:
    """The size of a member; None where the header is damaged."""
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _octal(header[148:156]) != total:
        return None
    field = header[124:136]
    if field[0] & 0x80:  # GNU's binary numbers
        length = int.from_bytes(field[1:], "big")
        return length if field[0] == 0x80 and length < 1 << 62 else None
    return _octal(field)


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    return int(digits, 8) if all(c in b"01234567" for c in digits) else None


def _name(header: bytes, long_name: bytes, attributes: dict[str, bytes]) -> str:
    name = attributes.get("path") or long_name
    if not name:
        name = header[:100].split(b"\0", 1)[0]
        prefix = header[345:500].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0" and prefix:
            name = prefix + b"/" + name
    return name.decode("utf-8", "replace")


def _attributes(data: bytes) -> dict[str, bytes]:
    """Keywords of a pax header, lines of ``length key=value``; what does not fit is left out."""
    found: dict[str, bytes] = {}
    while data:
        length, space, _ = data[:20].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 1 < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value
        data = data[int(length) :]
    return found


def _next_header(file: BinaryIO, at: int, size: int) -> int:
    """Where the next whole header begins, at any byte; ``size`` if nowhere."""
    while at + BLOCK <= size:
        file.seek(at)
        chunk = file.read(SEARCH)
        found = chunk.find(b"ustar")
        while found >= 0:
            header = chunk[found - MAGIC : found - MAGIC + BLOCK] if found >= MAGIC else b""
            if len(header) == BLOCK and _length(header) is not None:
                return at + found - MAGIC
            found = chunk.find(b"ustar", found + 1)
        at += max(len(chunk) - BLOCK + 1, 1)  # a header may begin at the end of what was read
    return size
