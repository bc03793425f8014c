"""Any source as tar shards in the layout of img2dataset: pictures upright and small, captions, checksums.

Record i of the source goes to shard ``i // per_shard`` whatever fails, and files hold no times, so a run that is
stopped and started again ends with the same bytes. A shard is done when its ``_stats.json`` is there, written last.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from PIL import ExifTags, Image
from tqdm import tqdm

from imglish import atomic
from imglish.data.errors import FILE, DataError, Errors, Problem
from imglish.data.images import MAX_FILE, ImageError, decode_sized
from imglish.data.records import ImageSource, Record
from imglish.data.sources.base import digest
from imglish.data.sources.files import open_raw

MANIFEST = "shards.json"
SUMS = "SHA256SUMS"
VERSION = 1
ENDINGS = {"jpeg": "jpg", "webp": "webp", "png": "png"}


@dataclass(frozen=True)
class ShardConfig:
    """side: pictures are resized to this shorter side, smaller ones stay as they are (None: none is resized);
    per_shard: records of a shard; format, quality: of pictures that are written anew; sidecar: table of all records
    beside each tar (None: parquet where pyarrow is installed); workers: processes; max_errors: share of the records
    that may be unusable."""

    side: int | None = 288
    per_shard: int = 10_000
    format: Literal["jpeg", "webp", "png"] = "jpeg"
    quality: int = 95
    sidecar: Literal["parquet", "jsonl"] | None = None
    workers: int = 1
    max_errors: float = 0.01

    def __post_init__(self) -> None:
        for name, low, high in (
            ("side", 8, 100_000),
            ("per_shard", 1, 10**6),
            ("quality", 1, 100),
            ("workers", 1, 256),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise DataError(f"{name} is {value}: expected {low} to {high}")


@dataclass(frozen=True)
class ShardReport:
    """What was written to ``out``; errors: what could not be, also in ``out/errors.csv``."""

    out: Path
    shards: int
    written: int
    size: int
    errors: Errors


def shard(records: Sequence[Record], out: str | Path, config: ShardConfig = ShardConfig()) -> ShardReport:
    """Write ``records`` as tar shards to the folder ``out``, or go on where an earlier call was stopped.

    Each sample is a picture, ``.txt`` with its first caption and ``.json`` with all captions, sizes and sha256; beside
    each tar lie a table of its samples and ``_stats.json``. ``SHA256SUMS`` is for ``sha256sum -c``. Raises
    :class:`DataError` when ``out`` holds other shards or too many records are unusable, ``OSError`` of the disk.
    """
    if not len(records):
        raise DataError("there are no records to write")
    out = Path(out)
    sidecar = config.sidecar or _sidecar()
    _begin(out, records, config, sidecar)
    numbers = range(-(-len(records) // config.per_shard))
    errors = Errors(config.max_errors, out / FILE, "records")
    written = size = seen = 0
    sums = []
    with tqdm(total=len(records), unit="record", unit_scale=True, desc="shards") as bar:
        for number, stats in zip(numbers, _all(records, out, config, sidecar, numbers)):
            errors.extend(Problem(*problem) for problem in stats["problems"])
            seen += stats["count"]
            errors.check(seen, len(records))
            written, size = written + stats["successes"], size + stats["size"]
            sums.append(f"{stats['sha256']}  {_name(number)}.tar\n")
            bar.update(stats["count"])
    atomic.write_file(out / SUMS, lambda file: file.write("".join(sums).encode()))
    return ShardReport(out, len(numbers), written, size, errors)


def _name(number: int) -> str:
    return f"{number:05d}"


def _sidecar() -> Literal["parquet", "jsonl"]:
    from importlib.util import find_spec

    return "parquet" if find_spec("pyarrow") is not None else "jsonl"


def _begin(out: Path, records: Sequence[Record], config: ShardConfig, sidecar: str) -> None:
    """Say in the folder what it is to hold; a folder that holds something else is an error."""
    wanted = {"version": VERSION, "records": len(records), "digest": digest(records)}
    settings = {name: value for name, value in asdict(config).items() if name not in ("workers", "max_errors")}
    wanted |= settings | {"sidecar": sidecar}
    path = out / MANIFEST
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}; choose another folder") from error
        differ = [name for name in wanted if not isinstance(found, dict) or found.get(name) != wanted[name]]
        if differ:
            raise DataError(
                f"{out} holds shards of other records or settings ({', '.join(differ)} differ); choose another folder"
            )
        return
    if out.is_dir() and any(out.glob("*.tar")):
        raise DataError(f"{out} holds tar files that were not written by this command; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_file(path, lambda file: file.write(json.dumps(wanted, indent=1).encode()))


# ---- one shard ------------------------------------------------------------------------------------------------------

_Task = tuple[Sequence[Record], Path, ShardConfig, str]
_TASK: list[_Task] = []  # of a worker process


def _all(
    records: Sequence[Record], out: Path, config: ShardConfig, sidecar: str, numbers: range
) -> Iterator[dict[str, Any]]:
    task = (records, out, config, sidecar)
    if config.workers == 1 or len(numbers) == 1:
        yield from (_write_shard(task, number) for number in numbers)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(config.workers, mp_context=context, initializer=_take, initargs=(task,)) as pool:
        yield from pool.map(_write, numbers)


def _take(task: _Task) -> None:
    _TASK[:] = [task]


def _write(number: int) -> dict[str, Any]:
    return _write_shard(_TASK[0], number)


def _write_shard(task: _Task, number: int) -> dict[str, Any]:
    """Stats of the shard, which is written unless it is there."""
    records, out, config, sidecar = task
    name = _name(number)
    stats_path, tar_path = out / f"{name}_stats.json", out / f"{name}.tar"
    if (known := _stats(stats_path, tar_path)) is not None:
        return known
    own = range(number * config.per_shard, min((number + 1) * config.per_shard, len(records)))
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    hashes: list[str] = []

    def fill(file: BinaryIO) -> None:
        hashed = _Hashed(file)
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for place, i in enumerate(own):
                sample = _sample(records[i], f"{name}{place:05d}", config)
                if isinstance(sample, Problem):
                    problems.append(sample)
                else:
                    _add(tar, sample)
                    rows.append(sample.row)
        hashes.append(hashed.digest.hexdigest())

    atomic.write_file(tar_path, fill)
    _write_table(out / f"{name}.{sidecar}", rows)
    stats = {
        "count": len(own),
        "successes": len(rows),
        "size": tar_path.stat().st_size,
        "sha256": hashes[0],
        "problems": [[p.key, p.reason, p.message] for p in problems],
    }
    atomic.write_file(stats_path, lambda file: file.write(json.dumps(stats).encode()))
    return stats


def _stats(path: Path, tar: Path) -> dict[str, Any] | None:
    """What an earlier run said of a shard that is whole."""
    try:
        stats: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return stats if tar.stat().st_size == stats["size"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class _Sample:
    key: str
    picture: bytes | None
    ending: str
    row: dict[str, Any]


def _sample(record: Record, key: str, config: ShardConfig) -> _Sample | Problem:
    """The files of a record, or why there are none."""
    row: dict[str, Any] = {"key": key, "source": record.key, "captions": list(record.captions)}
    if record.swapped:
        row["swapped"] = list(record.swapped)
    if record.group:
        row["group"] = record.group
    if record.image is None:
        return _Sample(key, None, "", row)
    try:
        data, size, original = _picture(record.image, record.key, config)
    except ImageError as error:
        return Problem(record.key, error.reason, str(error))
    row |= {"width": size[0], "height": size[1], "original_width": original[0], "original_height": original[1]}
    row["sha256"] = hashlib.sha256(data).hexdigest()
    ending = "jpg" if data.startswith(b"\xff\xd8") else ENDINGS[config.format]
    return _Sample(key, data, ending, row)


def _picture(source: ImageSource, name: str, config: ShardConfig) -> tuple[bytes, tuple[int, int], tuple[int, int]]:
    """The file of the picture, its (width, height), and those it had. Raises :class:`ImageError`."""
    found = _raw(source, name)

    def wanted(width: int, height: int) -> tuple[float, float]:
        scale = 1.0 if config.side is None else min(1.0, config.side / min(width, height))
        return width * scale, height * scale

    image, original = decode_sized(found, wanted, name=name)
    across, down = wanted(*original)
    size = (max(1, round(across)), max(1, round(down)))
    if isinstance(found, bytes) and size == original and _as_is(found, config):
        return found, size, original
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, config.format, **({} if config.format == "png" else {"quality": config.quality}))
    return file.getvalue(), size, original


def _raw(source: ImageSource, name: str) -> bytes | Image.Image:
    """The bytes of a picture's file, or the picture where there is no file."""
    if callable(source):
        return source()
    if isinstance(source, bytes):
        return source
    try:
        with open_raw(str(source)) as file:
            data = file.read(MAX_FILE + 1)
    except FileNotFoundError as error:
        raise ImageError(f"{name}: the picture does not exist", "missing") from error
    except (OSError, DataError) as error:
        raise ImageError(f"{name}: cannot be read: {error}", "not readable") from error
    if len(data) > MAX_FILE:
        raise ImageError(f"{name}: the file is larger than {MAX_FILE >> 20} MiB", "too large")
    return data


def _as_is(data: bytes, config: ShardConfig) -> bool:
    """Whether a file that could be decoded is already what would be written: upright, of the format, in RGB or grey."""
    with Image.open(io.BytesIO(data)) as image:
        fits = image.format == config.format.upper() and image.mode in ("RGB", "L")
        return fits and image.getexif().get(ExifTags.Base.Orientation, 1) == 1


def _add(tar: tarfile.TarFile, sample: _Sample) -> None:
    captions = sample.row["captions"]
    files = [] if sample.picture is None else [(sample.ending, sample.picture)]
    files += [("txt", captions[0].encode())] if captions else []
    files.append(("json", json.dumps(sample.row, ensure_ascii=False).encode()))
    for ending, data in files:
        member = tarfile.TarInfo(f"{sample.key}.{ending}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic.write_file(path, lambda file: file.write(lines.encode()))
        return
    from imglish.data.sources.arrow import pyarrow

    arrow = pyarrow()
    texts = arrow.list_(arrow.string())
    kinds = {"captions": texts, "swapped": texts}
    kinds |= {name: arrow.int32() for name in ("width", "height", "original_width", "original_height")}
    names = (
        "key",
        "source",
        "captions",
        "swapped",
        "group",
        "width",
        "height",
        "original_width",
        "original_height",
        "sha256",
    )
    schema = arrow.schema([(name, kinds.get(name, arrow.string())) for name in names])
    table = arrow.Table.from_pylist(rows, schema=schema)
    atomic.write_file(path, lambda file: arrow.parquet.write_table(table, file))


class _Hashed(io.RawIOBase):
    """Passes what is written on to ``file`` and hashes it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)
