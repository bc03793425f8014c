"""Scenes with more people and things, noisy captions, and scenes written to a folder and read back."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imglish.cli import main
from imglish.data.errors import DataError
from imglish.data.images import decode
from imglish.data.scene_drawing import draw
from imglish.data.scene_folder import write_scenes
from imglish.data.scene_noise import CaptionNoise
from imglish.data.scene_words import Wording, say
from imglish.data.scene_world import Mention, Person, Scene, Thing, describe, swapped_description, true_of
from imglish.data.scenes import SceneConfig, SceneSource
from imglish.data.sources import open_source
from imglish.data.sources.drawn import TrainingScenes

CROWD = SceneConfig(scenes=120, size=64, people=(1, 4), things=(0, 3), pairs=12)
NOISE = CaptionNoise(wrong=0.2, partial=0.1, irrelevant=0.3)
NOISY = SceneConfig(scenes=300, size=32, noise=NOISE, pairs=2)


# ---- more people, and things ----------------------------------------------------------------------------------------


def test_people_and_things_are_as_many_as_wanted() -> None:
    scenes = SceneSource(CROWD).training_scenes()
    assert {len(scene.people) for scene in scenes} == {1, 2, 3, 4}
    assert {len(scene.things) for scene in scenes} == {0, 1, 2, 3}
    assert all(len(set(scene.things)) == len(scene.things) for scene in scenes)
    assert not any(person.pairs_up(CROWD.held_out) for scene in scenes for person in scene.people)


def test_every_person_and_thing_is_seen() -> None:
    """Recolouring any of them changes the picture."""
    for count in (1, 2, 3, 4):
        people = (Person("man", "black", "black"),) * count
        things = (Thing("ball", "black"), Thing("box", "black"), Thing("balloon", "black"))[: min(count + 1, 3)]
        scene = Scene(people, 7, things)
        plain = np.asarray(draw(scene, 64)).astype(int)
        for number in range(count):
            changed = np.abs(np.asarray(draw(scene.recoloured([(number, "top", "red")]), 64)) - plain).max(2) > 60
            assert changed.sum() >= 20
        for number, thing in enumerate(things):
            other = (*things[:number], Thing(thing.what, "red"), *things[number + 1 :])
            changed = np.abs(np.asarray(draw(Scene(people, 7, other), 64)) - plain).max(2) > 60
            assert changed.sum() >= 10, (count, thing)


def test_descriptions_of_crowds_are_true_and_swapped_ones_false() -> None:
    rng = np.random.default_rng(0)
    named = Counter[str]()
    for scene in SceneSource(CROWD).training_scenes():
        description = describe(scene, rng, 0.3)
        assert true_of(description, scene)
        assert not true_of(swapped_description(description, scene, rng, CROWD.held_out), scene)
        named.update(item for mention in description for item, _ in mention.worn)
    assert {"ball", "box", "balloon"} <= set(named)


def test_each_mention_needs_one_of_its_own() -> None:
    scene = Scene((Person("man", "red", "blue"),), 0, (Thing("ball", "red"),))
    ball = Mention(None, (("ball", "red"),))
    assert true_of((ball, Mention("man", (("top", "red"),))), scene)
    assert not true_of((ball, ball), scene)
    assert not true_of((Mention("man", (("ball", "red"),)),), scene)


def test_words_for_things() -> None:
    description = (Mention(None, (("ball", "orange"),)), Mention("woman", (("top", "red"),)))
    assert say(description, "en", Wording(False, 0.3, 0.1)) == "an orange ball and a woman in a red top"
    assert say(description, "en", Wording(True, 0.3, 0.1)) == "orange ball; a woman in a red top"
    assert say(description, "zh", Wording(False, 0.3, 0.1)) == "一个橙色的球和穿红色上衣的女人"
    assert say(description, "zh", Wording(True, 0.3, 0.1)) == "橙色球；穿红色上衣的女人"


@pytest.mark.parametrize("split", ["seen", "heldout"])
def test_distractors_of_crowds(split: Any) -> None:
    made = SceneSource(CROWD).evaluation(split)
    assert len(made.quadruples) == 24
    for number, quadruple in enumerate(made.quadruples):
        one, two = made.scenes[2 * (number // 2) : 2 * (number // 2) + 2]
        changed = sum(p != q for p, q in zip(one.people, two.people, strict=True))
        assert changed == (1 if quadruple.kind == "within" else 2)
        assert one.things == two.things
        assert quadruple.captions[0] != quadruple.captions[1]
    alone = SceneSource(SceneConfig(people=(1, 1), pairs=6)).evaluation(split)
    assert {quadruple.kind for quadruple in alone.quadruples} == {"within"}


def test_settings_that_cannot_be_met() -> None:
    for options, name in (
        ({"people": (0, 2)}, "people"),
        ({"things": (2, 1)}, "things"),
        ({"people": (1, 5)}, "people"),
    ):
        with pytest.raises(ValueError, match=name):
            SceneConfig(**options)  # type: ignore[arg-type]
    few: Any = {"colours": ("red", "blue"), "held_out": ()}
    with pytest.raises(ValueError, match="colours: 2 are not more"):
        SceneConfig(**few)
    scarce = SceneConfig(people=(1, 1), small_objects=0, colours=("red", "blue"), held_out=(), pairs=100)
    with pytest.raises(ValueError, match="there are not 100 such scenes"):
        SceneSource(scarce).evaluation("seen")
    with pytest.raises(ValueError, match="noise"):
        CaptionNoise(wrong=0.7, partial=0.4)


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_noise_comes_at_its_rates_and_is_named() -> None:
    source = SceneSource(NOISY)
    captions = [caption for number in range(300) for caption in source.training_captions(number)]
    shares = {kind: count / len(captions) for kind, count in Counter(c.noise for c in captions).items()}
    assert shares == pytest.approx({"": 0.4, "wrong": 0.2, "partial": 0.1, "irrelevant": 0.3}, abs=0.04)
    partial = [c.text for c in captions if c.noise == "partial" and c.language == "en"]
    assert max(len(text.split()) for text in partial) <= 5
    irrelevant = {c.text for c in captions if c.noise == "irrelevant"}
    assert any("IMG_" in text for text in irrelevant)
    assert any("trousers" in text for text in irrelevant)
    assert all(c.text != c.swapped for c in captions)
    assert source.training_record(3).captions == tuple(c.text for c in source.training_captions(3))


def test_captions_without_noise_stay_as_they_are() -> None:
    clean = SceneSource(SceneConfig(scenes=300, size=32, pairs=2))
    noisy = SceneSource(NOISY)
    for number in range(50):
        for one, other in zip(clean.training_captions(number), noisy.training_captions(number), strict=True):
            assert (one == other) == (other.noise == "")
    assert clean.training_scene(5) == noisy.training_scene(5)


# ---- a source without files, and a folder ---------------------------------------------------------------------------


def test_streamed_scenes_are_the_listed_ones() -> None:
    config = SceneConfig(scenes=30, size=16, pairs=1)
    streamed: Any = pickle.loads(pickle.dumps(TrainingScenes(config)))
    assert list(streamed) == SceneSource(config).training()
    assert streamed[7].captions == SceneSource(config).training()[7].captions
    assert streamed.caption_counts().tolist() == [4] * 30
    endless = TrainingScenes(SceneConfig(scenes=10**9))
    assert len(endless) == 10**9
    assert endless[123_456_789].key == "scene-123456789"


def test_scenes_are_a_source_by_name() -> None:
    path = "scenes:{scenes: 9, size: 20, people: [1, 3], pairs: 2, seed: 4, noise: {wrong: 0.5}}"
    config = SceneConfig(scenes=9, size=20, people=(1, 3), pairs=2, seed=4, noise=CaptionNoise(wrong=0.5))
    assert list(open_source(path)) == SceneSource(config).training()
    assert list(open_source(path, split="heldout")) == SceneSource(config).evaluation("heldout").records
    chinese = open_source(path, language="zh")
    assert chinese.caption_counts().tolist() == [2] * 9
    assert all("\u4e00" <= text[0] <= "\u9fff" for record in chinese for text in record.captions[:1] if len(text) > 6)
    assert len(open_source("scenes:")) == 20_000
    for wrong, message in (
        ("scenes:{hats: 3}", "no such settings: hats"),
        ("scenes:{people: 3}", "people|subscriptable|iterable"),
        ("scenes:7", "expected settings"),
        ("scenes:{a: ", "not YAML"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(wrong)
    with pytest.raises(DataError, match='no split "val"'):
        open_source(path, split="val")


def test_a_folder_reads_back_as_what_was_drawn(tmp_path: Path) -> None:
    config = SceneConfig(scenes=12, size=24, pairs=3, people=(1, 3), things=(0, 2), noise=NOISE)
    counts = write_scenes(config, tmp_path / "out")
    assert counts["pictures"] == 12 + 6 + 6
    source = SceneSource(config)
    for split, wanted in (
        ("train", source.training()),
        ("seen", source.evaluation("seen").records),
        ("heldout", source.evaluation("heldout").records),
    ):
        found = open_source(tmp_path / "out" / "captions.jsonl", split=split)
        assert [r.key for r in found] == [f"{split}/{r.key}.png" for r in wanted]
        assert [(r.captions, r.swapped) for r in found] == [(r.captions, r.swapped) for r in wanted]
        for one, other in zip(found, wanted, strict=True):
            assert np.array_equal(decode(one.image), decode(other.image))
    rows = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [row["noise"] for row in rows[:12]] == [[c.noise for c in source.training_captions(i)] for i in range(12)]
    assert rows[0]["languages"] == ["en", "en", "zh", "zh"]
    assert len(rows[0]["people"]) == len(source.training_scene(0).people)


def test_questions_and_searches_name_pictures_of_the_folder(tmp_path: Path) -> None:
    write_scenes(SceneConfig(scenes=2, size=16, pairs=4), tmp_path)
    lines = (tmp_path / "quadruples.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2 * 4
    for line in map(json.loads, lines):
        assert all((tmp_path / "images" / name).is_file() for name in line["images"])
        assert len(line["captions"]) == 2
    for line in map(json.loads, (tmp_path / "queries.jsonl").read_text().splitlines()):
        assert set(line["texts"]) == {"en", "zh"}
        assert all((tmp_path / "images" / name).is_file() for name in line["relevant"])


def test_equal_settings_give_equal_bytes(tmp_path: Path) -> None:
    config = SceneConfig(scenes=3, size=16, pairs=1, noise=NOISE)
    for name in ("one", "two"):
        write_scenes(config, tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 3 + 4 + 5
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "drawn")
    options = [
        "--scenes",
        "3",
        "--size",
        "16",
        "--pairs",
        "2",
        "--languages",
        "zh",
        "--colours",
        "red,blue,black,white",
    ]
    assert main(["data", "scenes", out, *options, "--people", "1-2", "--wrong", "0.5"]) == 0
    assert "11 pictures" in capsys.readouterr().out
    held = json.loads((tmp_path / "drawn" / "scenes.json").read_text())
    assert held["held_out"] == [["black", "white"], ["red", "blue"]]
    assert held["people"] == [1, 2]
    assert main(["data", "scenes", out, *options]) == 2
    assert "new or empty" in capsys.readouterr().err
    assert main(["data", "scenes", str(tmp_path / "other"), "--people", "9"]) == 2
    assert "people" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_frame_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 2
    assert main(["data", "--help"]) == 0
    assert "scenes" in capsys.readouterr().out
    assert main(["data", "inspcet"]) == 2
    assert "there is no job 'inspcet'" in capsys.readouterr().err
