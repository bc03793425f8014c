"""Small data in every layout that can be read, made on the spot."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
from PIL import Image

CAPTIONS = (("a red dog", "一只红色的狗"), ("a cat, asleep",), ("two birds on a wire",))
NAMES = ("a.jpg", "b.jpg", "c.jpg")


def picture(number: int, size: tuple[int, int] = (24, 16), kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def pictures(folder: Path, names: Sequence[str] = NAMES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    return folder


def jsonl(folder: Path, rows: Sequence[Any] | None = None, name: str = "data.jsonl") -> Path:
    pictures(folder / "images")
    rows = [{"image": n, "captions": c} for n, c in zip(NAMES, CAPTIONS)] if rows is None else rows
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def csv_table(folder: Path) -> Path:
    pictures(folder / "images")
    rows = [f'{name},"{caption}"' for name, captions in zip(NAMES, CAPTIONS) for caption in captions]
    path = folder / "data.csv"
    path.write_text("\n".join(["image,caption", *rows]) + "\n", encoding="utf-8")
    return path


def tsv_with_bytes(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{c[0]}\t{base64.b64encode(picture(n)).decode()}" for n, c in enumerate(CAPTIONS)]
    path = folder / "data.tsv"
    path.write_text("\n".join(["caption\tbase64", *rows]) + "\n", encoding="utf-8")
    return path


def json_list(folder: Path) -> Path:
    pictures(folder / "images")
    path = folder / "list.json"
    path.write_text(json.dumps([{"image": n, "caption": list(c), "image_id": n} for n, c in zip(NAMES, CAPTIONS)]))
    return path


def coco(folder: Path) -> Path:
    pictures(folder / "val2017")
    images = [{"id": i + 7, "file_name": name, "height": 16, "width": 24} for i, name in enumerate(NAMES)]
    notes = [{"image_id": i + 7, "id": i, "caption": c} for i, captions in enumerate(CAPTIONS) for c in captions]
    path = folder / "annotations" / "captions_val2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))
    return path


def karpathy(folder: Path) -> Path:
    pictures(folder / "images" / "val2014")
    splits = ("train", "restval", "test")
    images = [
        {"filepath": "val2014", "filename": n, "split": s, "sentences": [{"raw": c, "tokens": c.split()} for c in cs]}
        for n, cs, s in zip(NAMES, CAPTIONS, splits)
    ]
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def folder_with_metadata(folder: Path) -> Path:
    pictures(folder)
    rows = [f'{name},"{caption}"' for name, captions in zip(NAMES, CAPTIONS) for caption in captions]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]), encoding="utf-8")
    return folder


def folder_with_texts(folder: Path) -> Path:
    pictures(folder)
    for name, captions in zip(NAMES, CAPTIONS):
        (folder / name).with_suffix(".txt").write_text("\n".join(captions), encoding="utf-8")
    return folder


def folder_of_classes(folder: Path) -> Path:
    return pictures(folder, ("red_fox/1.jpg", "red_fox/2.jpg", "wolf/1.jpg"))


def tar(path: Path, members: Sequence[tuple[str, bytes]] | Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def samples(first: int = 0) -> list[tuple[str, bytes]]:
    """Members as img2dataset writes them: picture, text, JSON."""
    found = []
    for number, captions in enumerate(CAPTIONS):
        key = f"{first:05d}{number:04d}"
        text = {"key": key, "caption": captions[0], "status": "success", "width": 24, "height": 16}
        found += [(f"{key}.jpg", picture(number)), (f"{key}.txt", captions[0].encode())]
        found.append((f"{key}.json", json.dumps(text).encode()))
    return found


def tars(folder: Path, count: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        tar(folder / f"{number:05d}.tar", samples(number))
        keys = [f"{number:05d}{i:04d}" for i in range(len(CAPTIONS))]
        table = pa.table({"key": keys, "caption": [c[0] for c in CAPTIONS], "better": [f"better {k}" for k in keys]})
        pa.parquet.write_table(table, folder / f"{number:05d}.parquet")
    return folder


def parquet(folder: Path) -> Path:
    """As on the Hugging Face hub: pictures as bytes in a struct, a file for each split."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, own in (("train", slice(0, 2)), ("test", slice(2, 3))):
        numbers = list(range(3))[own]
        rows = {
            "image": [{"bytes": picture(n), "path": NAMES[n]} for n in numbers],
            "caption": [list(CAPTIONS[n]) for n in numbers],
        }
        pa.parquet.write_table(pa.table(rows), folder / "data" / f"{split}-00000-of-00001.parquet", row_group_size=1)
    return folder


def arrow(folder: Path) -> Path:
    """As ``datasets.Dataset.save_to_disk`` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"image": [{"bytes": picture(n), "path": None} for n in range(3)], "text": [c[0] for c in CAPTIONS]}
    table = pa.table(rows)
    path = str(folder / "data-00000-of-00001.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def lines(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "texts.txt"
    path.write_text("\n\n".join(c[0] for c in CAPTIONS), encoding="utf-8")
    return path


def mixture(folder: Path) -> Path:
    jsonl(folder / "one")
    tars(folder / "two")
    path = folder / "mixture.yaml"
    path.write_text("sources:\n- {path: one/data.jsonl, weight: 2}\n- {path: two, weight: 0.5}\n")
    return path


PAIRS: dict[str, Callable[[Path], Path]] = {
    "jsonl": jsonl,
    "csv": csv_table,
    "tsv with bytes": tsv_with_bytes,
    "list": json_list,
    "coco": coco,
    "karpathy": karpathy,
    "metadata": folder_with_metadata,
    "texts beside": folder_with_texts,
    "classes": folder_of_classes,
    "tars": tars,
    "parquet": parquet,
    "arrow": arrow,
    "mixture": mixture,
}
