"""Bootstrapping on drawn scenes, where the truth about every caption is known: see :mod:`benchmarks.noise`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import imglish
from imglish.api import Model
from imglish.bootstrapping.loop import Step, loop_from, run_loop
from imglish.bootstrapping.quality import quality
from imglish.bootstrapping.stage import Stage
from imglish.data.images import ImageTransform, decode
from imglish.data.scene_folder import write_scenes
from imglish.data.scene_noise import CaptionNoise
from imglish.data.scene_world import COLOURS, GARMENTS, Scene
from imglish.data.scenes import SceneConfig, SceneSource
from imglish.evaluation.encoding import Machine, picture_loader
from imglish.evaluation.pairs import score_pairs
from imglish.evaluation.retrieval import RetrievalConfig, evaluate_retrieval
from imglish.generation.config import GenerationConfig
from imglish.training.stages import Stage as Training

STEPS = 200
WEB, CLEAN, TESTED = 2000, 400, 100  # pictures with noisy and with clean captions; tested pairs of pictures
ARMS = {
    "raw": "noisy",
    "filter only": "by-filter",
    "as many at random": "at-random",
    "captioner only": "by-captioner",
    "both": "by-both",
}
PARTS = {
    "no distillation": "no-distillation",
    "hard negatives": "hard",
    "hard negatives, no distillation": "hard-no-distillation",
}
HARD = (
    0.25  # share of the negatives in the arms with hard ones; with all of them matching does not start at this length
)
KINDS = ("wrong", "partial", "irrelevant")
THRESHOLDS = np.linspace(0, 1, 41)


def scenes(seed: int, count: int, rate: float = 0.0) -> SceneConfig:
    """One person in a picture, English captions, six colours."""
    part = rate / len(KINDS)
    return SceneConfig(
        seed=seed,
        scenes=count,
        size=32,
        captions=1,
        omission=0.2,
        small_objects=0.3,
        languages=("en",),
        colours=("red", "green", "blue", "yellow", "black", "white"),
        held_out=(),
        people=(1, 1),
        pairs=TESTED,
        noise=CaptionNoise(part, part, part),
    )


def run(out: Path, rate: int, seed: int, steps: int) -> None:
    """The arms of one rate and seed that have no result yet, and what these are made from."""
    arms = ARMS | (PARTS if rate == 50 else {})
    files = {arm: out / "results" / f"scenes-{rate}-{seed}-{stage}.json" for arm, stage in arms.items()}
    missing = {arm: stage for arm, stage in arms.items() if not files[arm].exists()}
    if not missing:
        return
    torch.set_num_threads(1)
    folder = out / f"scenes-{rate}-{seed}"
    web = scenes(10 * seed + 1, WEB, rate / 100)
    sources = data(folder / "data", web, scenes(10 * seed + 2, CLEAN))
    *others, drawn = loop_from(recipe_of(folder / "run", sources, seed, steps))
    loop = [*others, replace(drawn, needs=("kept-filter",))]  # of which it has the number of captions
    wanted = needed(loop, missing.values())
    finish([step for step in wanted if step.name != drawn.name])
    if drawn.name in missing.values():
        draw(folder_of(loop, "kept-filter") / "keep.jsonl", sources, np.random.default_rng([seed, rate]))
        finish([drawn])
    tested = SceneSource(scenes(7, 1)).evaluation("seen")
    (out / "results").mkdir(parents=True, exist_ok=True)
    for arm, stage in missing.items():
        found = {"rate": rate, "seed": seed, "arm": arm, "steps": steps}
        found |= measure(imglish.load(folder_of(loop, stage) / "model", "cpu"), tested.records, tested.scenes)
        if arm == "both":
            found["filter"] = quality_of(folder_of(loop, "scores"), SceneSource(web))
        files[arm].write_text(json.dumps(found, indent=1))
        shown = {name: round(value, 3) for name, value in found.items() if isinstance(value, float)}
        print(f"{rate} % noise, seed {seed}, {arm}: {shown}", flush=True)


def needed(loop: Sequence[Step], names: Iterable[str]) -> list[Step]:
    """The stages of these names, and all that they are made from."""
    found = set(names)
    for step in reversed(loop):
        if step.name in found:
            found.update(step.needs)
    return [step for step in loop if step.name in found]


def finish(steps: Sequence[Step]) -> None:
    for result in run_loop(steps):
        if result.stopped is not None:
            raise SystemExit(f"stopped by {result.stopped}; the same command continues")


def data(folder: Path, web: SceneConfig, clean: SceneConfig) -> dict[str, dict[str, str]]:
    """The noisy and the clean pictures as folders, and a mixture of both; where :func:`draw` puts a part of it."""
    found = {}
    for name, config in (("web", web), ("clean", clean)):
        if not (folder / name).exists():
            write_scenes(config, folder / name)
        place = {"path": str((folder / name / "captions.jsonl").resolve()), "split": "train"}
        found[name] = place | {"images": str((folder / name / "images").resolve())}
    (folder / "all.yaml").write_text(yaml.safe_dump({"sources": [found["web"], found["clean"]]}))
    return found | {name: {"path": str((folder / f"{name}.yaml").resolve())} for name in ("all", "drawn")}


def draw(kept: Path, data: dict[str, dict[str, str]], rng: np.random.Generator) -> None:
    """As many of the noisy pictures, each of one caption, as a keep-list has, and the clean ones beside them."""
    web = data["web"]
    lines = Path(web["path"]).read_text(encoding="utf-8").splitlines(keepends=True)
    lines = [line for line in lines if json.loads(line)["split"] == web["split"]]
    count = len(kept.read_text(encoding="utf-8").splitlines())
    chosen = np.sort(rng.choice(len(lines), count, replace=False)).tolist()
    mixture = Path(data["drawn"]["path"])
    part = mixture.with_suffix(".jsonl")
    part.write_text("".join(lines[number] for number in chosen), encoding="utf-8")
    mixture.write_text(yaml.safe_dump({"sources": [web | {"path": str(part)}, data["clean"]]}))
    print(f"{count} of {len(lines)} captions drawn at random", flush=True)


def recipe_of(out: Path, data: dict[str, dict[str, str]], seed: int, steps: int) -> dict[str, Any]:
    """The loop, with all of its endings. The clean pairs are part of what every arm trains on, as in the paper."""
    clean = {"train": data["clean"]["path"], "images": data["clean"]["images"], "split": "train"}
    model: dict[str, Any] = {
        "name": "blip-tiny",
        "embed_dim": 32,
        "max_length": 32,
        "heads": 2,
        "depth": 2,
        "vision": {"image": {"size": 32}, "patch": 8, "heads": 2, "depth": 2},
        "teacher": {"queue_size": 0, "momentum": 0.95, "ramp_epochs": 2},
        "hard_negatives": 0.0,
        "embedding_std": 0.2,
    }
    short = {"schedule": {"steps": max(steps // 2, 4), "warmup_steps": steps // 20}, "optimiser": {"lr": 1e-3}}
    alone = {**model["teacher"], "alpha": 0.0}
    kept = {"of": "scores", "beside": [data["clean"]], "truth": data["web"]["path"]}
    train: dict[str, Any] = {"model": model, "data": {"train": data["all"]["path"]}}
    stages: dict[str, Any] = {
        "noisy": train,
        "captioner": {"model": {"init": "noisy", "itc": False, "itm": False}, "data": clean, **short},
        "filter": {"model": {"init": "noisy", "lm": False}, "data": clean, **short},
        "captions": {"caption": {"model": "captioner", "data": data["web"], "writing": {"seed": seed}, "batch": 64}},
        "scores": {"score": {"model": "filter", "of": "captions", "batch": 64}},
        "kept-filter": {"filter": {**kept, "rules": {"texts": "web"}}},
        "kept-captioner": {"filter": {**kept, "rules": {"min_itm": None}}},
        "kept-both": {"filter": kept},
        "by-filter": {"model": model, "data": {"train": "kept-filter"}},
        "by-captioner": {"model": model, "data": {"train": "kept-captioner"}},
        "by-both": {"model": model, "data": {"train": "kept-both"}},
        "no-distillation": {**train, "model": {**model, "teacher": alone}},
        "hard": {**train, "model": {**model, "hard_negatives": HARD}},
        "hard-no-distillation": {**train, "model": {**model, "hard_negatives": HARD, "teacher": alone}},
        "at-random": {"model": model, "data": {"train": data["drawn"]["path"]}},
    }
    return {"output": str(out), "shared": shared(seed, steps), "stages": stages}


def shared(seed: int, steps: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "data": {"crop": None, "flip": False, "cache": True, "workers": 0},
        "tokenizer": {"vocab_size": 200, "append_sep": True},
        "batch": {"size": 32},
        "optimiser": {"lr": 2e-3, "temperature_lr": 1e-4, "weight_decay": 0.02},
        "schedule": {"steps": steps, "warmup_steps": steps // 10},
        "compute": {"device": "cpu", "threads": 1},
        "checkpoint": {"every_steps": None, "every_minutes": None, "keep": 1},
        "log": {"every": 50},
    }


def folder_of(loop: Sequence[Step], name: str) -> Path:
    step = next(step for step in loop if step.name == name)
    return Path(step.recipe.output) if isinstance(step, Training) else step.out


def measure(model: Model, records: Sequence[Any], shown: Sequence[Scene]) -> dict[str, float]:
    """Of a model on tested pictures, each followed by its distractor: recall by towers (mean of R@1, 5, 10, both ways);
    area under the curve of ITM for the right caption against that of the distractor (swapped) and of another picture
    (other); share of greedy captions that are true, and how many things they name."""
    machine = Machine(progress=False)
    load = picture_loader(ImageTransform(model.config.image.size))
    found = evaluate_retrieval(
        model.network, model.tokenizer, records, RetrievalConfig(rerank=0, machine=machine), load
    )
    count = torch.arange(len(records))
    pairs = torch.stack([count, count ^ 1, (count + len(records) // 2) % len(records)])
    captions = [record.captions[0] for record in records]
    scored = score_pairs(
        model.network,
        model.tokenizer,
        records,
        captions,
        count.expand_as(pairs),
        pairs,
        load,
        machine,
    )
    assert scored.fusion is not None
    right, swapped, other = scored.fusion.double().numpy()
    drawn = [decode(record.image, name=record.key) for record in records]
    stream = model.caption_stream(drawn, GenerationConfig(min_length=5), block=64)
    written = [one.captions[0].text for one in stream]
    said = [said_of(text) for text in written]
    return {
        "recall": found.towers["r_mean"] if found.towers else float("nan"),
        "itm swapped": auc(right, swapped),
        "itm other": auc(right, other),
        "true captions": float(np.mean([true(*one, scene) for one, scene in zip(said, shown, strict=True)])),
        "things named": float(np.mean([len(worn) for _, worn in said])),
    }


def auc(right: np.ndarray, wrong: np.ndarray) -> float:
    labels = np.r_[np.ones(len(right), bool), np.zeros(len(wrong), bool)]
    return quality(np.r_[right, wrong], labels, [0.5]).auc


def said_of(text: str) -> tuple[str | None, list[tuple[str, str]]]:
    """Who is said to be there, and with which (garment, colour)."""
    kind = re.search(r"\b(man|woman)\b", text)
    worn = re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(GARMENTS)})\b", text)
    return (kind[1] if kind else None), [(item, colour) for colour, item in worn]


def true(kind: str | None, worn: list[tuple[str, str]], scene: Scene) -> bool:
    """Whether a caption describes the scene's one person, and nothing of it is false."""
    person = scene.people[0]
    return bool(worn) and kind in (None, person.kind) and all(person.colour(item) == c for item, c in worn)  # type: ignore[arg-type]


def quality_of(scores: Path, source: SceneSource) -> dict[str, Any]:
    """The filter against the truth: of web texts by kind of noise, of synthetic ones by what they say."""
    table = Stage.open(scores).tables()
    numbers = [int(key.split("-")[-1].split(".")[0]) for key in table["key"].to_pylist()]
    web = np.array(table["origin"].to_pylist()) == "web"
    noise = np.array([source.training_captions(n)[0].noise for n in numbers])
    good = np.array([true(*said_of(t), source.training_scene(n)) for t, n in zip(table["text"].to_pylist(), numbers)])
    found: dict[str, Any] = {"synthetic true": float(good[~web].mean()), "web noise": float((noise[web] != "").mean())}
    for name in ("itm", "itc"):
        values = table[name].to_numpy()
        for kind in ("any", *KINDS):
            chosen = web & ((noise == "") | (noise == kind) if kind != "any" else web)
            if (noise[chosen] != "").any():
                found[f"{name} {kind}"] = quality(values[chosen], noise[chosen] == "", [0.5]).auc
        if good[~web].any() and not good[~web].all():
            found[f"{name} synthetic"] = quality(values[~web], good[~web], [0.5]).auc
    itm = table["itm"].to_numpy()
    if (noise[web] != "").any():
        curve = quality(itm[web], noise[web] == "", THRESHOLDS)
        found["curve"] = {
            "threshold": curve.thresholds.tolist(),
            "precision": [None if np.isnan(p) else float(p) for p in curve.precision],
            "recall": curve.recall.tolist(),
        }
    kept = itm >= 0.5
    found |= {"web kept": float(kept[web].mean()), "synthetic kept": float(kept[~web].mean())}
    words = np.array([len(text.split()) for text in table["text"].to_pylist()])
    for name, chosen in (("kept", web & kept), ("dropped", web & ~kept)):
        found[f"noise {name}"] = float((noise[chosen] != "").mean()) if chosen.any() else None
        found[f"words {name}"] = float(words[chosen].mean()) if chosen.any() else None
    found["kept synthetic true"] = float(good[~web & kept].mean()) if (~web & kept).any() else None
    return found
