"""Reading files by name below a root, local or in object storage: nothing outside of the root, nothing that hangs."""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Generic, TypeVar, cast

from imglish.data.errors import DataError
from imglish.data.images import MAX_FILE, ImageError

DAMAGED_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URL (``s3://...``)."""
    return "://" in path


@cache
def _file_system(protocol: str, process: int) -> Any:
    """fsspec's file system; one for each process, because connections do not survive a fork."""
    try:
        import fsspec
    except ImportError as error:
        raise DataError(f"{protocol}:// needs fsspec: pip install 'imglish[remote]'") from error
    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise DataError(f"{protocol}:// cannot be opened: {error}") from error


def remote(url: str) -> Any:
    """The file system that ``url`` is on."""
    return _file_system(url.split("://", 1)[0], os.getpid())


@dataclass(frozen=True)
class Stat:
    """size in bytes; stamp: changes when the content may have changed."""

    size: int
    stamp: str


def status(path: str) -> Stat | None:
    """Of a regular file; None if there is none."""
    if is_remote(path):
        files = remote(path)
        if not files.isfile(path):
            return None
        found = files.info(path)
        stamp = next(
            (str(found[name]) for name in ("ETag", "etag", "mtime", "LastModified", "created") if found.get(name)), ""
        )
        return Stat(int(found["size"]), stamp)
    try:
        here = os.stat(path)
    except (OSError, ValueError):  # a name that no file can have
        return None
    return Stat(here.st_size, str(here.st_mtime_ns)) if stat.S_ISREG(here.st_mode) else None


def is_folder(path: str) -> bool:
    """Whether ``path`` is a folder, local or in storage."""
    return bool(remote(path).isdir(path)) if is_remote(path) else os.path.isdir(path)


def exists(path: str) -> bool:
    """Whether anything is at ``path``, local or in storage."""
    return bool(remote(path).exists(path)) if is_remote(path) else os.path.exists(path)


def join(folder: str, name: str) -> str:
    """``name`` below ``folder``, both as given."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """The folder that ``path`` lies in."""
    return path.rsplit("/", 1)[0] if is_remote(path) else str(Path(path).parent)


def names_in(folder: str) -> list[str]:
    """Names of the files and folders in ``folder``, sorted; no hidden ones."""
    if is_remote(folder):
        found = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in remote(folder).ls(folder, detail=False)]
    else:
        found = os.listdir(folder)
    return sorted(name for name in found if not name.startswith("."))


def walk(folder: str) -> Iterator[tuple[str, bool]]:
    """Names of all files below ``folder``, relative to it and sorted within each folder, and whether each is a regular
    file (else a link or something special, which is not followed). Hidden files and folders are left out."""
    if is_remote(folder):
        files = remote(folder)
        root = files._strip_protocol(folder).rstrip("/") + "/"
        for path in sorted(files.find(folder)):
            name = path.removeprefix(root)
            if not any(part.startswith(".") for part in name.split("/")):
                yield name, True
        return
    waiting = [""]
    while waiting:
        here = waiting.pop()
        with os.scandir(os.path.join(folder, here)) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda e: e.name)
        folders = []
        for entry in entries:
            name = f"{here}/{entry.name}" if here else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
            else:
                yield name, entry.is_file(follow_symlinks=False)
        waiting += reversed(folders)


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A file that a person named, for reading from its beginning, unpacked if it ends in ``.gz``."""
    with open_raw(path) as raw:
        if not path.endswith(".gz"):
            yield raw
            return
        with gzip.open(raw) as unpacked:
            try:
                yield cast(BinaryIO, unpacked)
            except DAMAGED_GZIP as error:
                raise DataError(f"{path}: cannot be unpacked, it is damaged or cut off: {error}") from error


def open_raw(path: str) -> BinaryIO:
    """A regular file or an object in storage as it is. Raises ``OSError``; never waits for a pipe."""
    if is_remote(path):
        return cast(BinaryIO, remote(path).open(path, "rb"))
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:
        raise DataError(f"{path!r} cannot be the name of a file") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DataError(f"{path} is not a file")
    return os.fdopen(handle, "rb")


def escapes(name: str) -> bool:
    """Whether a name that must stay below a folder does not (absolute, a drive, ``..``), or cannot be a file's name."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return True
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or "\0" in name or (len(name) > 1 and name[1] == ":")


def allowed_roots(folder: str) -> tuple[str, ...]:
    """Real paths that files named below a local ``folder`` may lie in: itself, and where it is a snapshot in a cache of
    the Hugging Face hub, the ``blobs`` beside it that all its files are links to."""
    root = os.path.realpath(folder)
    parts = Path(root).parts
    if "snapshots" in parts:
        place = len(parts) - 1 - parts[::-1].index("snapshots")
        blobs = os.path.join(*parts[:place], "blobs")
        if os.path.isdir(blobs):
            return root, blobs
    return (root,)


def inside(roots: tuple[str, ...], path: str) -> bool:
    """Whether the real place of a local ``path``, all links followed, is below one of the ``roots``."""
    real = os.path.realpath(path)
    return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


@dataclass(frozen=True)
class StoredFile:
    """A picture's file: ``name`` below ``root``, a folder or a URL. Calling it reads the file.

    A name or a link that leads out of the root, something that is not a file, and a file that is missing or too large
    raise :class:`ImageError`. Absolute names are allowed where they lie below the root.
    """

    root: str
    name: str
    roots: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Where the file should be; whether it may be there is asked when it is read."""
        return self.name if os.path.isabs(self.name) and not is_remote(self.root) else join(self.root, self.name)

    def __call__(self) -> bytes:
        if is_remote(self.root):
            return self._read_remote()
        path = self.path
        if "\0" in path or not inside(self.roots or allowed_roots(self.root), path):
            raise ImageError(f"{self.name}: lies outside of {self.root}", "outside")
        try:
            with open_raw(path) as file:
                data = file.read(MAX_FILE + 1)
        except FileNotFoundError as error:
            raise ImageError(f"{self.name}: the picture does not exist", "missing") from error
        except DataError as error:
            raise ImageError(f"{self.name}: is not a file", "not a picture") from error
        except OSError as error:
            raise ImageError(f"{self.name}: cannot be read: {error.strerror or error}", "not readable") from error
        return self._checked(data)

    def _read_remote(self) -> bytes:
        if escapes(self.name):
            raise ImageError(f"{self.name}: lies outside of {self.root}", "outside")
        try:
            return self._checked(cast(bytes, remote(self.root).cat_file(self.path, 0, MAX_FILE + 1)))
        except FileNotFoundError as error:
            raise ImageError(f"{self.name}: the picture does not exist", "missing") from error
        except OSError as error:
            raise ImageError(f"{self.name}: cannot be read: {error}", "not readable") from error

    def _checked(self, data: bytes) -> bytes:
        if len(data) > MAX_FILE:
            raise ImageError(f"{self.name}: the file is larger than {MAX_FILE >> 20} MiB", "too large")
        return data


T = TypeVar("T")


class OpenFiles(Generic[T]):
    """What this process has opened, the least recently used given up when they are more than ``most``.

    open: opens a path. A file that is not as its ``Stat`` says is an ``OSError``: places in it mean nothing any more.
    """

    def __init__(self, open: Callable[[str], T], most: int = 64) -> None:
        self._open, self._most = open, most
        self._lock = Lock()
        self._held: OrderedDict[tuple[int, str, Stat], T] = OrderedDict()

    def get(self, path: str, stat: Stat) -> T:
        """What stays open as long as the caller holds it."""
        name = (os.getpid(), path, stat)
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
        now = status(path)
        if now is None:
            raise FileNotFoundError(path)
        if now != stat:
            raise OSError("the file has changed since it was looked through; open the source anew")
        opened = self._open(path)
        with self._lock:
            self._held[name] = opened
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        return opened
