"""Stages over shards: resuming, leases, workers that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from imglish.bootstrapping.leases import Leases
from imglish.bootstrapping.stage import Shard, Stage, divide
from imglish.data.errors import DataError
from imglish.data.shards import ShardConfig, shard
from imglish.data.sources import Source, SourceConfig, open_source


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve pictures with captions in a JSONL file."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(12):
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(folder / "images" / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "captions": [f"picture {i}"]}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder / "captions.jsonl"


def keys(_: Shard, records: Source) -> Any:
    return pa.table({"key": [record.key for record in records]})


def begin(out: Path, data: Path, **settings: Any) -> Stage:
    return Stage.begin(out, "keys", settings, SourceConfig(path=str(data)), 5)


def test_all_rows_once_and_resuming_finds_what_is_missing(tmp_path: Path, data: Path) -> None:
    stage = begin(tmp_path / "out", data)
    assert stage.run(keys).shards == 3
    before = {path: path.stat().st_mtime_ns for path in stage.out.glob("*.parquet")}
    assert stage.tables()["key"].to_pylist() == [f"{i}.png" for i in range(12)]
    (stage.out / "00001.parquet").unlink()
    again = begin(tmp_path / "out", data)
    assert again.run(keys).shards == 1
    assert stage.tables()["key"].to_pylist() == [f"{i}.png" for i in range(12)]
    assert sum(path.stat().st_mtime_ns == at for path, at in before.items()) == 2
    assert list((stage.out / ".work").iterdir()) == []


def test_other_settings_or_data_are_refused(tmp_path: Path, data: Path) -> None:
    begin(tmp_path / "out", data, seed=1)
    with pytest.raises(DataError, match="seed"):
        begin(tmp_path / "out", data, seed=2)
    stage = begin(tmp_path / "out", data, seed=1)
    data.write_text("\n".join(data.read_text().splitlines()[:-1]))
    done = stage.run(keys)
    assert done.shards == 0
    assert "had 12 records" in done.failed["00000"]


def test_tars_are_shards_and_one_that_vanishes_is_named(tmp_path: Path, data: Path) -> None:
    shard(open_source(data), tmp_path / "tars", ShardConfig(per_shard=4))
    config = SourceConfig(path=str(tmp_path / "tars"))
    assert [s.name for s in divide(config, 1)] == ["00000", "00001", "00002"]
    stage = Stage.begin(tmp_path / "out", "keys", {}, config, 100)
    (tmp_path / "tars" / "00001.tar").unlink()
    done = Stage.begin(tmp_path / "out", "keys", {}, config, 100).run(keys)
    assert list(done.failed) == ["00001"]
    assert done.shards == 2
    assert [s.name for s in stage.missing()] == ["00001"]


def test_a_full_disk_ends_the_work_and_leaves_nothing_half(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = begin(tmp_path / "out", data)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("imglish.bootstrapping.stage.atomic.write_file", full)
        with pytest.raises(OSError, match="No space"):
            stage.run(keys)
    assert [path.name for path in stage.out.rglob("*") if path.is_file()] == ["stage.json"]
    assert stage.run(keys).shards == 3


def test_leases(tmp_path: Path) -> None:
    with Leases(tmp_path, 60) as one, Leases(tmp_path, 60) as two:
        assert one.take("a")
        assert not two.take("a")
        old = time.time() - 100  # as if its machine had died
        os.utime(tmp_path / "a.lease", (old, old))
        one.part("a").write_text("half")
        assert two.take("a")
        assert not one.part("a").exists()
        two.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lease_is_kept_alive(tmp_path: Path) -> None:
    with Leases(tmp_path, 1) as one, Leases(tmp_path, 60) as two:
        assert one.take("a")
        lease, old, ends = tmp_path / "a.lease", time.time() - 100, time.monotonic() + 60
        os.utime(lease, (old, old))
        while lease.stat().st_mtime < old + 50:
            assert time.monotonic() < ends
            time.sleep(0.02)
        assert not two.take("a")


WORKER = """
import sys, time
from pathlib import Path
import pyarrow as pa
from imglish.bootstrapping.stage import Stage
out, rank, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
def work(shard, records):
    (out / f"begun-{shard.name}-{rank}").touch()
    time.sleep(pause)
    return pa.table({"key": [record.key for record in records], "rank": [rank] * len(records)})
print(Stage.open(out).run(work, rank=rank, world=2))
"""


def test_the_shard_of_a_killed_worker_is_taken_over(tmp_path: Path, data: Path) -> None:
    """Of two real processes one is killed in the middle of a shard: no row is lost, none is there twice."""
    stage = begin(tmp_path / "out", data)

    def start(rank: int, pause: float) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", WORKER, str(stage.out), str(rank), str(pause)])

    doomed = start(0, 600)
    deadline = time.monotonic() + 60
    while not (stage.out / "begun-00000-0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    other = start(1, 0.01)
    while len(stage.missing()) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (stage.out / ".work" / "00000.lease").exists()  # the living one waits for it
    assert other.poll() is None
    doomed.send_signal(signal.SIGKILL)
    doomed.wait()
    assert other.wait(60) == 0
    assert stage.tables()["key"].to_pylist() == [f"{i}.png" for i in range(12)]
    assert set(stage.tables()["rank"].to_pylist()) == {1}
    assert list((stage.out / ".work").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_workers_killed_at_random_moments_lose_no_row_and_write_none_twice(
    tmp_path: Path, data: Path, seed: int
) -> None:
    """Two processes at a time, each killed after a random while and started anew, until two came to their end."""
    stage = Stage.begin(tmp_path / "out", "keys", {}, SourceConfig(path=str(data)), 1)
    rng = np.random.default_rng(seed)
    running: dict[int, subprocess.Popen[bytes]] = {}
    ended, kills, deadline = set[int](), 0, time.monotonic() + 900
    while ended != {0, 1}:
        assert time.monotonic() < deadline
        for rank in {0, 1} - ended - set(running):
            command = [sys.executable, "-c", WORKER, str(stage.out), str(rank), "0.1"]
            running[rank] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(float(rng.uniform(0.05, 1.5)))
        for rank, process in list(running.items()):
            if process.poll() is None and kills < 6 and rng.random() < 0.5:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                del running[rank]
            elif process.poll() is not None:
                assert process.returncode == 0
                ended.add(rank)
                del running[rank]
    assert kills
    assert stage.tables()["key"].to_pylist() == [f"{i}.png" for i in range(12)]
    assert not list((stage.out / ".work").glob("*.lease"))
    assert {path.name for path in stage.out.glob("*.parquet")} == {f"{shard.name}.parquet" for shard in stage.shards}
