"""Files and folders that are, at every moment, either the old ones or the new ones: never half-written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".writing"
REPLACED = ".replaced"
LOCK = "run.lock"


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk and rename it to ``path``.

    When ``write`` or the disk fails the temporary file is removed, the old ``path`` stays, and the error is raised.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``path`` when the block ends without an error.

    An old ``path`` is renamed aside and then deleted; a kill between the two renames is mended by :func:`recover`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = path.with_name(path.name + TEMPORARY), path.with_name(path.name + REPLACED)
    recover(path)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for file in new.iterdir():
            _sync(file)
        _sync(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """No other process that asks for the same works in the folder ``path`` (made where it is not there) meanwhile.

    The lock ends with the process, however that ends. Raises ``BlockingIOError`` where another one holds it. Systems
    and network folders that know no such locks give none.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("w") as file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not the children's too
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise BlockingIOError(error.errno, f"another process works in {path}") from error
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
        yield


def require_writable(path: Path) -> None:
    """OSError where no folder could be made or filled at ``path``, so that work without a place for it is not begun."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"cannot write to {path}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {path}: {there} is not open for writing")


def recover(path: Path) -> None:
    """Bring back the old folder if a kill came between renaming it aside and renaming the new one into its place."""
    old = path.with_name(path.name + REPLACED)
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(old, path)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():  # some file systems cannot flush a folder; a file that cannot be flushed is an error
            raise
    finally:
        os.close(handle)
