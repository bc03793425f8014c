from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from imglish.data.errors import DataError, Errors
from imglish.data.images import ImageError, decode
from imglish.data.sources import open_source, tar_index
from imglish.data.sources.tar_scan import Member, scan
from tests.data.sources import layouts
from tests.data.sources.layouts import CAPTIONS, picture, samples, tar


def scanned(data: bytes) -> tuple[list[str], list[str]]:
    """Names of the members, and reasons of the problems."""
    found = list(scan(io.BytesIO(data), len(data), "x.tar"))
    members = [item.name for item in found if isinstance(item, Member)]
    return members, [item.reason for item in found if not isinstance(item, Member)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(form: int) -> None:
    names = ["a.jpg", "folder/" + "b" * 90 + ".txt", *([] if form == tarfile.USTAR_FORMAT else ["c" * 300 + "é.json"])]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as made:
        made.addfile(_typed("folder", tarfile.DIRTYPE))
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 700 * number
            made.addfile(member, io.BytesIO(bytes([number]) * member.size))
        made.addfile(_typed("link", tarfile.SYMTYPE, "/etc/passwd"))
    data = file.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as known:
        expected = [(m.name, m.offset_data, m.size) for m in known]
    found = [item for item in scan(io.BytesIO(data), len(data), "x") if isinstance(item, Member)]
    assert [(m.name.rstrip("/"), m.offset, m.size) for m in found] == expected
    assert [m.kind for m in found] == ["folder", *["file"] * len(names), "other"]


def _typed(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def tar_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return file.getvalue()


def test_a_damaged_header_costs_its_own_member_only() -> None:
    data = bytearray(tar_bytes([(f"{i}.txt", b"x" * 600) for i in range(5)]))
    step = 512 + 1024
    data[2 * step : 2 * step + 100] = b"\xff" * 100
    members, reasons = scanned(bytes(data))
    assert members == ["0.txt", "1.txt", "3.txt", "4.txt"]
    assert reasons == ["damaged tar"]


def test_cut_and_spliced_files() -> None:
    data = tar_bytes([(f"{i}.txt", b"x" * 600) for i in range(5)])
    step = 512 + 1024
    assert scanned(data) == ([f"{i}.txt" for i in range(5)], [])
    assert scanned(data[: 3 * step + 700]) == (["0.txt", "1.txt", "2.txt"], ["truncated"])
    assert scanned(data[: 3 * step]) == (["0.txt", "1.txt", "2.txt"], ["truncated"])  # no end mark
    assert scanned(data + data) == ([f"{i}.txt" for i in range(5)] * 2, [])
    assert scanned(data[:step] + b"garbage" * 300 + data) == (
        ["0.txt"] + [f"{i}.txt" for i in range(5)],
        ["damaged tar"],
    )
    assert scanned(b"") == ([], ["truncated"])
    assert scanned(b"\0" * 1024) == ([], [])


def test_hostile_members_are_counted_and_nothing_else(tmp_path: Path) -> None:
    good = samples()
    bad = [("/etc/passwd.jpg", b"x"), ("../../up.jpg", b"x"), ("deep/../../up2.jpg", b"x"), ("code.pickle", b"x")]
    path = tar(tmp_path / "00000.tar", good + bad + [("only.txt", b"text"), ("silent.jpg", picture(1)), good[0]])
    with tarfile.open(path, "a") as made:
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            made.addfile(_typed(name, kind, "/etc/passwd"))
    found = open_source(tmp_path, max_errors=0.9)
    assert [r.captions[0] for r in found] == [c[0] for c in CAPTIONS]
    assert found.errors.counts == {"outside": 3, "link": 3, "missing member": 2, "no caption": 1, "duplicate key": 1}
    assert all(decode(r.image).size == (24, 16) for r in found)
    with pytest.raises(DataError, match="more than the allowed share"):
        open_source(tmp_path)


def test_the_index_is_made_once_and_mended_where_a_shard_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = layouts.tars(tmp_path / "t", 3)
    made: list[str] = []
    real = tar_index.read_shard
    monkeypatch.setattr(tar_index, "read_shard", lambda shard, config: made.append(shard.name) or real(shard, config))
    first = open_source(folder)
    assert made == ["00000.tar", "00001.tar", "00002.tar"]
    assert open_source(folder).digest() == first.digest()
    assert len(made) == 3
    tar(folder / "00001.tar", [*samples(1), ("new.jpg", picture(9)), ("new.txt", b"a new one")])
    changed = open_source(folder)
    assert made[3:] == ["00001.tar"]
    assert [r.captions[0] for r in changed][6] == "a new one"
    assert len(changed) == 10
    (folder / "00000.tar").unlink()
    assert len(open_source(folder)) == 7
    assert made[4:] == []
    tar(folder / "00009.tar", samples(9))
    assert len(open_source(folder)) == 10
    assert made[4:] == ["00009.tar"]
    assert open_source(folder, caption_fields=("parquet.better",), max_errors=1)[0].captions == ("better 000010000",)


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    folder = layouts.tars(tmp_path / "t")
    expected = open_source(folder).digest()
    (index,) = folder.glob(".imglish-*.index")
    whole = index.read_bytes()
    for damage in (whole[:200], b"", whole[:-8], b"x" * len(whole), whole.replace(b'"version": 1', b'"version": 0')):
        index.write_bytes(damage)
        assert open_source(folder).digest() == expected
        assert index.read_bytes() == whole


def test_problems_are_told_again_when_the_index_is_there(tmp_path: Path) -> None:
    tar(tmp_path / "00000.tar", [*samples(), ("only.txt", b"text")])
    counts = [open_source(tmp_path, max_errors=0.5).errors.counts for _ in range(2)]
    assert counts[0] == counts[1] == {"missing member": 1}
    file = tmp_path / "errors.csv"
    open_source(tmp_path, max_errors=0.5, errors_file=file)
    assert "no picture among .txt" in file.read_text()


def test_a_tar_that_changes_or_goes_after_the_index_was_made(tmp_path: Path) -> None:
    folder = layouts.tars(tmp_path / "t")
    source = open_source(folder)
    assert callable(source[0].image)
    assert callable(source[3].image)
    time.sleep(0.01)
    tar(folder / "00000.tar", samples(1))
    with pytest.raises(ImageError, match="has changed since it was looked through"):
        source[0].image()
    (folder / "00001.tar").unlink()
    with pytest.raises(ImageError, match="does not exist") as raised:
        source[3].image()
    assert raised.value.reason == "missing"


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = layouts.tars(tmp_path / "t")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert len(open_source(folder)) == 6
    assert not list(folder.glob(".imglish*"))
    assert len(list((tmp_path / "cache" / "imglish").glob("*.index"))) == 1
    assert len(open_source(folder, index=str(tmp_path / "mine"))) == 6
    assert len(list((tmp_path / "mine").glob("*.index"))) == 1


def test_patterns_and_links(tmp_path: Path) -> None:
    folder = layouts.tars(tmp_path / "t", 3)
    assert len(open_source(folder / "{00000..00001}.tar")) == 6
    assert len(open_source(f"{folder}/0000[12].tar", kind="tars")) == 6
    assert len(open_source(f"{folder}/{{00000,00002}}.tar")) == 6
    assert len(open_source(folder / "00002.tar")) == 3
    with pytest.raises(DataError, match=r"00003\.tar does not exist"):
        open_source(folder / "{00000..00003}.tar")
    layouts.tars(tmp_path / "other")
    (folder / "00007.tar").symlink_to(tmp_path / "other" / "00000.tar")
    with pytest.raises(DataError, match="a link that leads out"):
        open_source(folder)


def test_links_within_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    tar(blobs / "d41d8", samples())
    (snapshot / "00000.tar").symlink_to("../../blobs/d41d8")
    found = open_source(snapshot)
    assert [decode(record.image).size for record in found] == [(24, 16)] * 3


def test_many_shards_are_indexed_by_several_processes(tmp_path: Path) -> None:
    folder = layouts.tars(tmp_path / "t", 9)
    found = open_source(folder)
    assert [record.key for record in found][::3] == [f"{i:05d}.tar/{i:05d}0000" for i in range(9)]
    assert isinstance(found.errors, Errors)


def test_a_split_that_no_sample_has_is_named(tmp_path: Path) -> None:
    path = layouts.tars(tmp_path / "d")
    with pytest.raises(DataError, match="none of 6 samples is of split 'val'"):
        open_source(path, split="val")
