"""Sources under the training loader: the same samples for any number of workers and processes, from any place on."""

from __future__ import annotations

import csv
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from imglish.data.batch import Batch
from imglish.data.dataset import PairDataset
from imglish.data.errors import DataError, Errors
from imglish.data.images import ImageTransform
from imglish.data.loader import Position, training_batches
from imglish.data.sources import open_source
from imglish.data.tokenizers import Tokenizer
from imglish.training.config import recipe_from
from imglish.training.settings import SettingsError
from imglish.training.trainer import train
from tests.data.sources import layouts
from tests.data.sources.layouts import CAPTIONS, PAIRS, picture

TRANSFORM = ImageTransform(16, crop_scale=(0.3, 1.0), flip=True)


def dataset(path: Path, captions: str = "one") -> PairDataset:
    texts = [text for several in CAPTIONS for text in several]
    tokenizer = Tokenizer.train_wordpiece(texts * 3, 60, max_length=20)
    return PairDataset(open_source(path), TRANSFORM, tokenizer, captions=captions)  # type: ignore[arg-type]


def same(one: Batch, two: Batch) -> bool:
    assert isinstance(one.images, torch.Tensor)
    assert isinstance(two.images, torch.Tensor)
    return one.keys == two.keys and torch.equal(one.images, two.images) and torch.equal(one.texts.ids, two.texts.ids)


@pytest.mark.parametrize("layout", ["tars", "mixture", "parquet", "tsv with bytes"])
def test_workers_ranks_and_resumes_change_nothing(layout: str, tmp_path: Path) -> None:
    made = dataset(PAIRS[layout](tmp_path))
    size = 2
    whole = list(islice(training_batches(made, size, seed=5), 9))
    for workers in (1, 2):
        for (batch, at), (other, there) in zip(whole, training_batches(made, size, seed=5, workers=workers)):
            assert at == there
            assert same(batch, other)
    for (batch, _), (other, _) in zip(whole[4:], training_batches(made, size, whole[3][1], seed=5)):
        assert same(batch, other)
    halves = [training_batches(made, size, seed=5, rank=rank, world_size=2) for rank in (0, 1)]
    for (batch, _), (left, _), (right, _) in zip(whole, *halves):
        assert batch.keys == left.keys + right.keys


def test_an_epoch_of_a_mixture_is_as_its_weights_say(tmp_path: Path) -> None:
    made = dataset(layouts.mixture(tmp_path))  # three records twice, half of six
    assert len(made) == 9
    first = [Counter(made.sample(5, epoch, place).key for place in range(9)) for epoch in range(2)]
    for counts in first:
        assert [counts[name] for name in layouts.NAMES] == [2, 2, 2]
        assert sum(counts.values()) == 9
    assert {key for counts in first for key in counts} == {record.key for record in made.records}
    ids = [record.image_id for record in made.records]
    assert len(set(ids)) == len(ids)
    twice = [place for place in range(9) if made.sample(5, 0, place).key == "a.jpg"]
    one, two = (made.sample(5, 0, place).draws for place in twice)
    assert (one != two).all()  # the second time is another sample
    everything = dataset(tmp_path / "mixture.yaml", "all")
    assert len(everything) == 2 * 4 + 3
    for epoch in range(3):
        assert Counter(everything.sample(0, epoch, place).key for place in range(8))["a.jpg"] == 4


def pairs(folder: Path, count: int = 40, bad: int = 1) -> Path:
    """Pictures with captions, the first ``bad`` of them broken, one not there, one row without a caption."""
    rows = [{"image": f"{i}.jpg", "caption": f"{CAPTIONS[i % 3][0]} {i}"} for i in range(count)]
    rows += [{"image": "gone.jpg", "caption": "not there"}, {"image": "0.jpg"}]
    path = layouts.jsonl(folder, rows)
    for i in range(count):
        (folder / "images" / f"{i}.jpg").write_bytes(b"broken" if i < bad else picture(i))
    return path


def recipe(folder: Path, path: Path, share: float, **data: object) -> dict[str, object]:
    return {
        "model": {"name": "clip-tiny"},
        "output": str(folder / "run"),
        "data": {"train": str(path), "workers": 0, "source": {"max_errors": share}, **data},
        "tokenizer": {"vocab_size": 60, "append_sep": True},
        "batch": {"size": 8},
        "schedule": {"steps": 11, "warmup_steps": 2},
        "log": {"every": 5},
    }


def test_a_run_names_what_it_could_not_use(tmp_path: Path) -> None:
    result = train(recipe_from(recipe(tmp_path, pairs(tmp_path / "d"), 0.2)))
    with (tmp_path / "run" / "errors.csv").open(newline="") as file:
        found = sorted((row["reason"], row["key"].rsplit("/", 1)[-1]) for row in csv.DictReader(file))
    assert found == [("missing", "gone.jpg"), ("no caption", "data.jsonl:42"), ("not a picture", "0.jpg")]
    assert result.events[-2 if result.events[-1]["event"] == "end" else -1]["unreadable"] == {
        "missing": 1,
        "not a picture": 1,
    }


def test_a_run_stops_at_too_many(tmp_path: Path) -> None:
    path = pairs(tmp_path / "d", bad=6)
    with pytest.raises(DataError, match=r"5 of 41 pictures cannot be used .* more than the allowed share of 10\.00%"):
        train(recipe_from(recipe(tmp_path, path, 0.1)))
    assert len((tmp_path / "run" / "errors.csv").read_text().splitlines()) >= 5
    with pytest.raises(SettingsError, match=r"data\.train: 1 of 42 records cannot be used \(1 no caption\)"):
        train(recipe_from(recipe(tmp_path / "other", path, 0.01)))


@pytest.mark.parametrize("layout", ["tars", "mixture", "folder"])
def test_recipes_take_any_layout(layout: str, tmp_path: Path) -> None:
    path = layouts.folder_with_texts(tmp_path / "d") if layout == "folder" else PAIRS[layout](tmp_path / "d")
    options = recipe(tmp_path, path, 0.01) | {"batch": {"size": 2}, "schedule": {"steps": 3, "warmup_steps": 1}}
    options["validation"] = {"data": str(path), "source": {"kind": None}, "every": 1}
    result = train(recipe_from(options))
    assert result.step == 3
    assert result.best


def test_wrong_settings_of_a_source_are_named(tmp_path: Path) -> None:
    path = pairs(tmp_path)
    for source, message in (
        ({"kind": "photos"}, r"data\.source\.kind"),
        ({"max_errors": 3}, r"data\.source: .*it is a share"),
        ({"template": "no place"}, r"data\.source: .*has no {}"),
        ({"caption_field": ["x"]}, r"data\.source\.caption_field: .*did you mean caption_fields"),
    ):
        with pytest.raises(SettingsError, match=message):
            recipe_from(recipe(tmp_path, path, 0.1) | {"data": {"train": str(path), "source": source}})
    with pytest.raises(SettingsError, match=r"data\.train: .*no caption in 'title'"):
        train(
            recipe_from(
                recipe(tmp_path, path, 0.1) | {"data": {"train": str(path), "source": {"caption_fields": ["title"]}}}
            )
        )


def test_a_file_that_vanishes_while_a_run_goes_on(tmp_path: Path) -> None:
    path = pairs(tmp_path, bad=0)
    errors = Errors(0.5)
    batches = training_batches(dataset_of(path), 8, Position(), seed=1, errors=errors)
    next(batches)
    for number in range(5):
        (tmp_path / "images" / f"{number}.jpg").unlink()
    for _, at in batches:
        if at.epoch == 2:
            break
    assert errors.counts["missing"] == 6


def dataset_of(path: Path) -> PairDataset:
    tokenizer = Tokenizer.train_wordpiece(["a red dog"] * 3, 60, max_length=20)
    return PairDataset(open_source(path, max_errors=0.5), TRANSFORM, tokenizer)
