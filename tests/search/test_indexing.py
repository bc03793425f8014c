"""Making an index and keeping it up to date, whatever happens meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from imglish.checkpoints import native
from imglish.cli.index import main
from imglish.data.errors import DataError, Errors
from imglish.data.sources import open_source
from imglish.search import manifest as manifests
from imglish.search.duplicates import perceptual_hash
from imglish.search.indexing import IndexConfig, Summary, index_records, prepare
from imglish.search.manifest import ManifestError, dimension_of
from imglish.search.originals import read_original
from imglish.search.store import COLUMNS, Row, Store, StoreError, open_store
from tests.ranks import run_ranks
from tests.search.samples import export_model, load_model, picture, rows, write_pictures

QUIET = IndexConfig(batch=4, commit=8, thumbnail=32, decoders=2, progress=False)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(tmp_path_factory.mktemp("models") / "albef")


def _run(
    photos: Path, index: Path, model_folder: Path, config: IndexConfig = QUIET, errors: Errors | None = None
) -> tuple[Summary, Store]:
    model = load_model(model_folder)
    store = open_store(str(index), dimension_of(model))
    manifest = prepare(store, model, str(model_folder), config)
    records = open_source(str(photos), needs="pictures")
    return index_records(store, model, records, str(photos), manifest, config, errors), store


def _all(store: Store) -> dict[str, Row]:
    every = [row for block in store.scan(COLUMNS, vectors=True) for row in block]
    assert len({row.key for row in every}) == len(every)
    return {row.key: row for row in every}


def test_only_what_has_changed_is_read_again(tmp_path: Path, model_folder: Path) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    names = write_pictures(photos, 20)
    summary, store = _run(photos, index, model_folder)
    assert (summary.added, summary.rows) == (20, 20)
    first = _all(store)
    row = first[names[3]]
    assert row.tags == ("b",)
    assert (row.width, row.height) == (64, 48)
    assert row.thumbnail[:2] == b"\xff\xd8"
    assert row.phash == perceptual_hash(picture(3))
    assert read_original(row.place, row.key)[:4] == b"\x89PNG"
    picture(99).save(photos / names[0])  # changed
    os.utime(photos / names[1], (1, 1))  # touched, the same content
    (photos / names[2]).unlink()  # deleted
    shutil.move(photos / names[3], photos / "a" / "moved.png")
    shutil.copy(photos / names[4], photos / "a" / "copy.png")
    (photos / "a" / "broken.png").write_bytes(b"no picture")
    errors = Errors(share=0.5, quiet=True)
    summary, store = _run(photos, index, model_folder, errors=errors)
    assert (summary.added, summary.changed, summary.deleted, summary.broken, summary.copied) == (2, 1, 2, 1, 2)
    assert summary.unchanged == 17
    assert summary.rows == 20
    assert errors.summary() == "1 not a picture"
    second = _all(store)
    assert set(second) == {*names} - {names[2], names[3]} | {"a/moved.png", "a/copy.png"}
    assert second[names[0]].digest != first[names[0]].digest
    assert (second["a/moved.png"].vector == first[names[3]].vector).all()
    assert second["a/moved.png"].thumbnail == first[names[3]].thumbnail
    assert second["a/copy.png"].duplicate_of == names[4]
    assert summary.duplicates == 1
    summary, _ = _run(photos, index, model_folder)
    assert (summary.added, summary.changed, summary.deleted, summary.copied) == (0, 0, 0, 0)


def test_two_sources_and_a_picture_that_breaks(tmp_path: Path, model_folder: Path) -> None:
    write_pictures(tmp_path / "one", 4)
    names = write_pictures(tmp_path / "two", 4, first=2)
    index = tmp_path / "index"
    _run(tmp_path / "one", index, model_folder)
    with pytest.raises(DataError, match="--prefix"):
        _run(tmp_path / "two", index, model_folder)
    two = IndexConfig(prefix="two/", progress=False, thumbnail=32)
    summary, store = _run(tmp_path / "two", index, model_folder, two)
    assert summary.rows == 8
    assert summary.deleted == 0
    (tmp_path / "two" / names[0]).write_bytes(b"broken now")
    summary, store = _run(tmp_path / "two", index, model_folder, two, Errors(share=1, quiet=True))
    assert summary.broken == 1
    assert summary.deleted == 1
    assert "two/" + names[0] not in _all(store)
    for name in names:
        (tmp_path / "two" / name).write_bytes(b"all broken")
    with pytest.raises(DataError, match="more than the allowed share"):
        _run(tmp_path / "two", index, model_folder, two, Errors(share=0.5, quiet=True))
    assert store.count() == 7


def test_near_duplicates_are_grouped_and_plain_pictures_are_not(tmp_path: Path, model_folder: Path) -> None:
    photos = tmp_path / "photos"
    write_pictures(photos, 3)
    picture(1).resize((60, 45)).save(photos / "z-smaller.jpg", quality=90)
    summary, store = _run(photos, tmp_path / "index", model_folder)
    assert {row.key: row.duplicate_of for row in _all(store).values() if row.duplicate_of} == {
        "z-smaller.jpg": "b/0001.png"
    }
    assert summary.duplicates == 1


def test_the_hash_is_that_of_the_known_library() -> None:
    imagehash = pytest.importorskip("imagehash")
    for number in range(5):
        assert perceptual_hash(picture(number, 90)) == str(imagehash.phash(picture(number, 90)))


def test_another_model_is_refused_with_both_names(tmp_path: Path, model_folder: Path) -> None:
    write_pictures(tmp_path / "photos", 2)
    _run(tmp_path / "photos", tmp_path / "index", model_folder)
    other = export_model(tmp_path / "other", seed=1)
    with pytest.raises(ManifestError) as caught:
        _run(tmp_path / "photos", tmp_path / "index", other)
    assert str(model_folder) in str(caught.value)
    assert str(other) in str(caught.value)
    assert "imglish index SOURCE --model" in str(caught.value)
    note = (tmp_path / "index" / "manifest.json").read_text()
    (tmp_path / "index" / "manifest.json").write_text(note.replace('"format": 1', '"format": 2'))
    with pytest.raises(ManifestError, match="has format 2"):
        manifests.read(open_store(str(tmp_path / "index")))
    (tmp_path / "index" / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match="damaged"):
        manifests.read(open_store(str(tmp_path / "index")))


def test_a_disk_that_refuses_leaves_the_index_as_it_was(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "index"), 16)
    store.upsert(rows(0, 10))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(StoreError, match="index: "):
            store.upsert(rows(10, 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    again = open_store(str(tmp_path / "index"))
    assert again.count() == 10
    assert len(_all(again)) == 10
    again.upsert(rows(10, 20))
    assert again.count() == 20


def test_a_full_disk_is_named_and_what_was_committed_stays(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, photos = tmp_path / "disk", tmp_path / "photos"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        photos.mkdir()
        noise = np.random.default_rng(0)
        for number in range(40):  # thumbnails of about 60 kB each
            Image.fromarray(noise.integers(0, 255, (256, 256, 3), dtype=np.uint8)).save(photos / f"{number:02d}.png")
        index = ["--to", str(disk / "index"), "--model", str(model_folder), "--device", "cpu"]
        assert main([str(photos), *index, "--batch", "2", "--commit", "4"]) == 1
        said = capsys.readouterr().err
        assert f"{disk / 'index'}: the disk is full" in said
        assert "goes on from there" in said
        held = _all(open_store(str(disk / "index")))
        assert 0 < len(held) < 40
        assert len(held) % 4 == 0
        assert all(row.thumbnail for row in held.values())
        subprocess.run([*mount[:4], "remount,size=64m", *mount[5:]], check=True, capture_output=True)
        assert main([str(photos), *index]) == 0
        assert f"{40 - len(held)} new" in capsys.readouterr().out
        assert len(_all(open_store(str(disk / "index")))) == 40
    finally:
        subprocess.run(["umount", str(disk)], check=False, capture_output=True)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "index"), 16)
    store.upsert(rows(0, 10))
    for file in (tmp_path / "index" / "pictures.lance" / "data").iterdir():
        file.write_bytes(b"damage")
    with pytest.raises(StoreError, match=str(tmp_path)):
        list(open_store(str(tmp_path / "index")).scan(("digest",), vectors=True))


def _child(photos: str, index: str, model_folder: str) -> None:
    config = IndexConfig(batch=2, commit=2, thumbnail=32, decoders=1, progress=False)
    _run(Path(photos), Path(index), Path(model_folder), config)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments(tmp_path: Path, model_folder: Path, kills: int) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    names = write_pictures(photos, 10 * kills)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imglish.search.indexing", "imglish.data.sources", "tests.search.samples"])
    chance = random.Random(kills)
    survived = 0
    for _ in range(kills):
        before = len(list((index / "pictures.lance" / "_versions").glob("*"))) if index.exists() else 0
        process = context.Process(target=_child, args=(str(photos), str(index), str(model_folder)))
        process.start()
        until = before + chance.randint(0, 4)
        while process.is_alive():
            versions = index / "pictures.lance" / "_versions"
            if until == 0 or (versions.exists() and len(list(versions.glob("*"))) >= until):
                break
            time.sleep(0.002)
        time.sleep(chance.random() * 0.03)
        process.kill()
        process.join()
        if (index / "pictures.lance").exists():
            store = open_store(str(index), dimension_of(load_model(model_folder)))
            held = _all(store)  # opens, and holds each picture once
            assert len(held) >= survived
            assert set(held) <= set(names)
            survived = len(held)
    summary, store = _run(photos, index, model_folder)
    assert summary.added == len(names) - survived  # what was committed is not encoded again
    assert set(_all(store)) == set(names)


def _holder(index: str, held: Any, done: Any) -> None:
    with open_store(index).writing():
        held.set()
        done.wait(60)


def test_a_second_process_is_refused_or_waits(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    write_pictures(photos, 4)
    _run(photos, index, model_folder)
    write_pictures(photos, 2, first=4)
    context = multiprocessing.get_context("forkserver")
    held, done = context.Event(), context.Event()
    process = context.Process(target=_holder, args=(str(index), held, done))
    process.start()
    assert held.wait(60)
    run = [str(photos), "--to", str(index), "--device", "cpu"]
    assert main(run) == 1
    assert f"is being written to by process {process.pid}" in (said := capsys.readouterr().err)
    assert "--wait SECONDS" in said
    assert open_store(str(index)).count() == 4
    threading.Timer(0.5, done.set).start()
    assert main([*run, "--wait", "60"]) == 0
    assert "2 new" in capsys.readouterr().out
    process.join()
    held.clear(), done.clear()
    process = context.Process(target=_holder, args=(str(index), held, done))
    process.start()
    assert held.wait(60)
    process.kill()  # its right ends with it
    process.join()
    assert main(run) == 0


def _rank(rank: int, photos: str, index: str, model_folder: str) -> int:
    network = native.load(Path(model_folder)).model
    encoded = 0
    encode = type(network).encode_images

    def counted(self: Any, images: Any) -> Any:
        nonlocal encoded
        encoded += len(images)
        return encode(self, images)

    type(network).encode_images = counted  # type: ignore[method-assign]
    run = [photos, "--to", index, "--model", model_folder, "--device", "cpu", "--batch", "2", "--commit", "2"]
    assert main(run) == 0
    dist.barrier()
    if rank == 0:
        for name in ("a/0002.png", "b/0001.png"):  # one of each process
            (Path(photos) / name).write_bytes(b"broken now")
    dist.barrier()
    assert main(run) == 0
    return encoded


def test_two_processes_share_the_work_of_one_index(tmp_path: Path, model_folder: Path) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    names = write_pictures(photos, 12)
    (photos / "a/0000-broken.png").write_bytes(b"no picture")
    encoded = run_ranks(2, _rank, str(photos), str(index), str(model_folder))
    assert encoded == [6, 6]  # each of its own: every second of the names in their order
    assert set(_all(open_store(str(index)))) == set(names) - {"a/0002.png", "b/0001.png"}
    broken = (index / "errors.csv").read_text()
    for name in ("a/0000-broken.png", "a/0002.png", "b/0001.png"):
        assert broken.count(f",{name},") == 1


def test_a_reader_sees_whole_versions_while_another_process_writes(tmp_path: Path, model_folder: Path) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    write_pictures(photos, 4)
    _, store = _run(photos, index, model_folder)
    write_pictures(photos, 24, first=4)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_child, args=(str(photos), str(index), str(model_folder)))
    process.start()
    seen: Counter[int] = Counter()
    vector = _all(store)["a/0000.png"].vector.astype("float32")[None]
    while process.is_alive():
        hits = store.search(vector, 100)[0]
        assert hits[0].key == "a/0000.png"
        assert len({hit.key for hit in hits}) == len(hits)
        seen[len(hits)] += 1
    process.join()
    assert process.exitcode == 0
    assert all(size % 2 == 0 for size in seen)
    assert store.count() == 28 == len(store.search(vector, 100)[0])


def test_the_command_says_what_it_did(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    names = write_pictures(photos, 6)
    (photos / names[0]).with_suffix(".txt").write_text("a red dog")
    (photos / "broken.png").write_bytes(b"x")
    assert main([str(photos), "--to", str(index)]) == 2
    assert "--model" in capsys.readouterr().err
    assert main([str(photos), "--to", str(index), "--model", str(model_folder), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "6 new" in out
    assert "1 not a picture" in out
    assert "broken.png" in (index / "errors.csv").read_text()
    assert main([str(photos), "--to", str(index), "--check", "--info", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "6 unchanged" in out
    assert "recall@6" in out
    assert "1.0000 (1 texts)" in out
    assert "exact, in memory" in out
    assert main(["--to", str(index)]) == 2
    assert main(["--to", str(tmp_path / "nowhere"), "--info"]) == 1
    Image.new("RGB", (3, 3)).save(tmp_path / "other.png")
    assert main([str(tmp_path / "nothing"), "--to", str(index)]) == 2
    assert open_store(str(index)).count() == 6
