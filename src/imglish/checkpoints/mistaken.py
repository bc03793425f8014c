"""Files that are taken for weights and are none: what they seem to be, by their first bytes, and what to do.

Downloads give most of them: a page in place of the file, a pointer in place of what it points to, half of an archive.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

_AGAIN = "download the file again"
_UNPACK = "unpack it and name the file of weights that was in it"
_PICTURE = "a picture"
_OTHER_LIBRARY = "weights of another library; only those of PyTorch are read (safetensors, .pth, .pt, .bin, .ckpt)"
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer in place of the file: run `git lfs pull` there"),
    (b"\xff\xd8\xff", _PICTURE),
    (b"\x89PNG\r\n\x1a\n", _PICTURE),
    (b"GIF8", _PICTURE),
    (b"\x89HDF\r\n\x1a\n", f"HDF5, {_OTHER_LIBRARY}"),
    (b"GGUF", f"GGUF, {_OTHER_LIBRARY}"),
    (b"\x93NUMPY", f"an array of NumPy, {_OTHER_LIBRARY}"),
    (b"\x1f\x8b", f"an archive of gzip: {_UNPACK}"),
    (b"BZh", f"an archive of bzip2: {_UNPACK}"),
    (b"\xfd7zXZ", f"an archive of xz: {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"an archive of zstd: {_UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"an archive of 7-Zip: {_UNPACK}"),
    (b"Rar!", f"an archive of RAR: {_UNPACK}"),
    (b"%PDF", "a PDF"),
)
_TAR, _TAR_AT = b"ustar", 257
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")
_FIRST = 4096  # bytes that are looked at


def seems(path: Path) -> str | None:
    """What the file seems to be, where that is no file of weights; None where it may be one. :class:`OSError` where it
    cannot be read."""
    with path.open("rb") as stream:
        first = stream.read(_FIRST)
    if not first:
        return f"empty: {_AGAIN}"
    for beginning, what in _BEGINNINGS:
        if first.startswith(beginning):
            return what
    if first[_TAR_AT:].startswith(_TAR):
        return f"an archive of tar: {_UNPACK}"
    if first.startswith(b"PK"):
        return _archive(path)
    return _text(first)


def _archive(path: Path) -> str | None:
    """PyTorch writes archives of zip, whose list of contents stands at their end."""
    try:
        if not zipfile.is_zipfile(path):
            return f"an archive that ends before its end, as downloads that break off do: {_AGAIN}"
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return f"a damaged archive ({error}): {_AGAIN}"
    if any(name.endswith("/data.pkl") for name in names):
        return None
    return f"an archive of zip that PyTorch did not write (in it: {', '.join(names[:3]) or 'nothing'}): {_UNPACK}"


def _text(first: bytes) -> str | None:
    if first.lstrip().lower().startswith(_PAGES):
        return f"a web page in place of the file: {_AGAIN}, by the link of the file itself"
    try:
        text = first.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(first) - 3:  # else a letter that the end cuts
            return None
        text = first[: error.start].decode("utf-8")
    if any(ord(letter) < 32 and letter not in "\t\n\r\f" for letter in text):
        return None
    begins = " ".join(text.split())
    what = "JSON, settings or a list of parts: name its folder" if begins.startswith(("{", "[")) else "text"
    return f"{what} (it begins {begins[:40]!r})"
