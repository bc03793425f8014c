"""Flickr8k with part of its captions shuffled among photographs: filters against the known truth (benchmarks.noise)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imglish.bootstrapping.jobs import ScoreJob
from imglish.bootstrapping.quality import quality, read_truth, truth_of
from imglish.bootstrapping.stage import Stage
from imglish.data.sources import SourceConfig
from imglish.training.config import read_recipe
from imglish.training.trainer import train

SCORED = 1000  # photographs of each split whose captions are scored
EPOCHS = 3
RECIPE = Path("recipes/flickr8k-blip.yaml")


def run(out: Path, flickr: Path, rate: int, clean_model: Path | None) -> None:
    """A filter that is trained on the noisy captions themselves scores training and validation pairs; one that was
    trained on clean captions scores validation pairs."""
    torch.set_num_threads(1)
    folder = out / f"flickr-{rate}"
    rows = [json.loads(line) for line in (flickr / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    for split in ("train", "val"):
        own = [row for row in rows if row["split"] == split]
        noisy = shuffled(own, rate / 100, np.random.default_rng(rate))
        write(folder / f"{split}.jsonl", noisy)
        write(folder / f"{split}-scored.jsonl", noisy[:SCORED])
    model = folder / "train" / "model"
    if not model.exists():
        overrides = [
            f"data.train={folder / 'train.jsonl'}",
            f"data.images={flickr / 'images'}",
            f"output={folder / 'train'}",
            f"schedule.epochs={EPOCHS}",
            "schedule.warmup_steps=50",
            "model.hard_negatives=0",
            "validation.data=null",
        ]
        result = train(read_recipe(RECIPE, overrides))
        if result.stopped is not None:
            raise SystemExit(f"stopped by {result.stopped}; the same command continues")
    judged = [("noisy", model, "train"), ("noisy", model, "val")]
    judged += [("clean", clean_model, "val")] if clean_model is not None else []
    for trained, path, split in judged:
        file = out / "results" / f"flickr-{rate}-{trained}-{split}.json"
        if file.exists():
            continue
        found = judge(folder, path, trained, split, flickr / "images")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"rate": rate, "trained": trained, "split": split, **found}, indent=1))
        print(f"{rate} % shuffled, trained on {trained} captions, {split}: {found['itm']['auc']}", flush=True)


def shuffled(rows: list[dict[str, Any]], rate: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows of which a share of all captions has changed places with captions of other photographs; ``noise`` says
    which."""
    places = [(number, place) for number, row in enumerate(rows) for place in range(len(row["captions"]))]
    moved = [places[i] for i in rng.permutation(len(places))[: round(rate * len(places))].tolist()]
    made = [{**row, "captions": list(row["captions"]), "noise": [""] * len(row["captions"])} for row in rows]
    for (number, place), (other, there) in zip(moved, moved[1:] + moved[:1]):
        if number != other:  # else it stays where it is, and is clean
            made[number]["captions"][place] = rows[other]["captions"][there]
            made[number]["noise"][place] = "shuffled"
    return made


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def judge(folder: Path, model: Path, trained: str, split: str, images: Path) -> dict[str, Any]:
    """Precision, recall and area under the curve of ITM and ITC, of keeping what is as good as each threshold."""
    data = folder / f"{split}-scored.jsonl"
    out = folder / f"scores-{trained}-{split}"
    source = SourceConfig(path=str(data), images=str(images))
    ScoreJob(model=str(model), data=source, per_shard=250).run(out, torch.device("cpu"))
    table = Stage.open(out).tables()
    clean, known = truth_of(table, read_truth(str(data)))
    found: dict[str, Any] = {"pairs": int(known.sum())}
    for name in ("itm", "itc"):
        values = table[name].to_numpy()[known]
        limits = np.linspace(0, 1, 41) if name == "itm" else np.quantile(values, np.linspace(0, 1, 41))
        curve = quality(values, clean[known], limits)
        found[name] = {
            "auc": curve.auc,
            "threshold": curve.thresholds.tolist(),
            "precision": [None if np.isnan(value) else float(value) for value in curve.precision],
            "recall": curve.recall.tolist(),
            "kept": curve.kept.tolist(),
        }
    return found
