from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import pytest

from imglish.data.scene_drawing import SceneImage, draw
from imglish.data.scene_words import Wording, say
from imglish.data.scene_world import (
    COLOURS,
    Mention,
    Person,
    Scene,
    describe,
    swapped_description,
    true_of,
)
from imglish.data.scenes import SceneBenchmark, SceneConfig, SceneSource, Split, _parallel_descriptions

CONFIG = SceneConfig(scenes=400, pairs=30)
SCENE = Scene((Person("woman", "black", "white", hat="red"), Person("man", "blue", "green", bag="red")), look=5)
SPLITS: tuple[Split, ...] = ("seen", "heldout")


@cache
def source() -> SceneSource:
    return SceneSource(CONFIG)


@cache
def benchmark(split: Split) -> SceneBenchmark:
    return source().evaluation(split)


def test_equal_configs_give_equal_data() -> None:
    one, two = (SceneSource(SceneConfig(scenes=20, pairs=3, seed=seed)).training() for seed in (4, 4))
    assert one == two
    assert [r.captions for r in one] != [r.captions for r in SceneSource(SceneConfig(scenes=20, seed=5)).training()]
    fewer = SceneSource(SceneConfig(scenes=10, pairs=3, seed=4)).training()
    assert fewer == one[:10]


def test_the_default_scenes_stay_what_they_are() -> None:
    """What the quickstart trains on: more people, things and noise must not change it."""
    said = [(record.captions, record.swapped) for record in SceneSource(SceneConfig(scenes=50)).training()]
    found = hashlib.sha256(repr(said).encode()).hexdigest()
    assert found[:16] == "8c90e991438fd939"


def test_pictures_are_drawn_alike_and_differ_between_scenes() -> None:
    pictures = [np.asarray(draw(scene)) for scene in source().training_scenes()[:20]]
    assert all(p.shape == (48, 48, 3) for p in pictures)
    assert np.array_equal(pictures[0], draw(source().training_scenes()[0]))
    assert len({p.tobytes() for p in pictures}) == 20
    assert SceneImage(SCENE, 64)().size == (64, 64)


@pytest.mark.parametrize("garment", ["top", "trousers", "hat", "shoes", "bag"])
def test_every_garment_is_visible_in_its_colour(garment: str) -> None:
    """Recolouring one garment changes a good part of the picture, and towards that colour."""
    dressed = Person("man", "black", "black", "black", "black", "black")
    plain = np.asarray(draw(Scene((dressed, dressed), 3))).astype(int)
    red = np.asarray(draw(Scene((dressed, dressed), 3).recoloured([(0, garment, "red")]))).astype(int)  # type: ignore[list-item]
    changed = np.abs(red - plain).max(axis=2) > 60
    assert changed.sum() >= 12
    assert (red[changed][:, 0] > red[changed][:, 1] + 50).mean() > 0.8


def test_training_neither_shows_nor_names_a_held_out_pair() -> None:
    scenes = source().training_scenes()
    assert not any(person.pairs_up(CONFIG.held_out) for scene in scenes for person in scene.people)
    pairs = {(p.top, p.trousers) for scene in scenes for p in scene.people}
    assert len(pairs) > 40  # all 56 others can occur
    held_out = [q.texts for q in benchmark("heldout").queries if len(q.worn) == 2]
    assert len(held_out) == 8
    texts = [t for record in source().training() for t in (*record.captions, *record.swapped)]
    for query in held_out:
        assert not any(query["en"] in text or query["zh"] in text for text in texts)


def test_captions_are_true_swapped_ones_false_by_one_binding() -> None:
    rng = np.random.default_rng(0)
    omitted = 0
    for scene in source().training_scenes():
        description = describe(scene, rng, 0.4)
        wrong = swapped_description(description, scene, rng, CONFIG.held_out)
        assert true_of(description, scene)
        assert not true_of(wrong, scene)
        assert not any(mention.pairs_up(CONFIG.held_out) for mention in wrong)
        said, missaid = ([item for mention in d for item in mention.worn] for d in (description, wrong))
        assert 1 <= sum(a != b for a, b in zip(said, missaid, strict=True)) <= 2
        omitted += len(said) < sum(len(person.worn()) for person in scene.people)
        assert [m.kind for m in description] == [m.kind for m in wrong]
    assert omitted > 300


def test_every_training_caption_has_a_different_swapped_one_in_both_languages() -> None:
    for record in source().training()[:100]:
        assert len(record.captions) == len(record.swapped) == 4
        assert all(one != other for one, other in zip(record.captions, record.swapped))
        chinese = ["\u4e00" <= text[0] <= "\u9fff" for text in record.captions]
        assert chinese == [False, False, True, True]


@pytest.mark.parametrize(
    ("description", "truth"),
    [
        ((Mention(None, (("top", "black"), ("trousers", "white"))),), True),
        ((Mention(None, (("top", "white"), ("trousers", "black"))),), False),
        ((Mention(None, (("top", "black"), ("trousers", "green"))),), False),
        ((Mention("man", (("top", "black"),)),), False),
        ((Mention("man", (("bag", "red"),)), Mention("woman", (("hat", "red"),))), True),
        ((Mention(None, (("top", "black"),)), Mention(None, (("hat", "red"),))), False),  # would be one person twice
        ((Mention(None, (("shoes", "red"),)),), False),
    ],
)
def test_truth(description: tuple[Mention, ...], truth: bool) -> None:
    assert true_of(description, SCENE) is truth


def test_words() -> None:
    description = (
        Mention("woman", (("hat", "orange"), ("top", "black"), ("bag", "red"))),
        Mention(None, (("trousers", "white"),)),
    )
    plain, bare = Wording(bare=False, joint=0.3, style=0.2), Wording(bare=True, joint=0.3, style=0.9)
    assert say(description, "en", plain) == (
        "a woman in an orange hat and a black top with a red bag and someone in white trousers"
    )
    assert say(description, "en", bare) == (
        "a woman wearing an orange hat and a black top with a red bag; white trousers"
    )
    assert say(description, "zh", plain) == "戴橙色帽子、穿黑色上衣、背红色包的女人和穿白色裤子的人"
    assert say(description, "zh", bare) == "一个女人戴橙色帽子、穿黑色上衣、背红色包；白色裤子"


@pytest.mark.parametrize("split", SPLITS)
def test_quadruples_agree_with_what_the_pictures_show(split: Split) -> None:
    made = benchmark(split)
    assert len(made.quadruples) == 60
    assert len(made.records) == len(made.scenes) == 60
    assert len({frozenset(scene.people) for scene in made.scenes}) == 60
    shorter = 0
    for number, quadruple in enumerate(made.quadruples):
        first = 2 * (number // 2)
        one, two = made.scenes[first : first + 2]
        assert quadruple.pictures == tuple(made.records[first : first + 2])
        full = [r.captions[("en", "zh").index(quadruple.language)] for r in quadruple.pictures]
        shorter += sum(map(len, quadruple.captions)) < sum(map(len, full))
        for part in (0, 1):  # the same garments, the same colours
            shown = [sorted(item[part] for p in scene.people for item in p.worn()) for scene in (one, two)]
            assert shown[0] == shown[1]
        changed = [(p, q) for p, q in zip(one.people, two.people) if p != q]
        assert len(changed) == (1 if quadruple.kind == "within" else 2)
        if quadruple.language == "en":
            words = [sorted(c.replace(" an ", " a ").replace(",", "").split()) for c in quadruple.captions]
            assert words[0] == words[1]
        else:
            assert sorted(quadruple.captions[0]) == sorted(quadruple.captions[1])
        assert quadruple.captions[0] != quadruple.captions[1]
    assert shorter > 40  # they leave things out as the training's captions do


@pytest.mark.parametrize("omission", [0.0, 0.65, 1.0])
@pytest.mark.parametrize("split", SPLITS)
def test_parallel_descriptions_are_true_of_their_own_scene_alone(split: Split, omission: float) -> None:
    made = benchmark(split)
    rng = np.random.default_rng(0)
    for one, two in zip(made.scenes[::2], made.scenes[1::2], strict=True):
        first, second = _parallel_descriptions((one, two), rng, omission)
        truth = [[true_of(d, scene) for scene in (one, two)] for d in (first, second)]
        assert truth == [[True, False], [False, True]]
        assert [[g for g, _ in mention.worn] for mention in first] == [[g for g, _ in m.worn] for m in second]
        if omission == 0:
            assert sum(len(mention.worn) for mention in first) == sum(len(p.worn()) for p in one.people)


def test_splits_show_their_colour_pairs() -> None:
    def shows(scene: Scene) -> bool:
        return any(person.pairs_up(CONFIG.held_out) for person in scene.people)

    assert not any(map(shows, benchmark("seen").scenes))
    made = benchmark("heldout")
    assert all(map(shows, made.scenes[::2]))
    for index, quadruple in enumerate(made.quadruples[::2]):
        assert quadruple.kind != "within" or shows(made.scenes[2 * index + 1])
    assert {quadruple.kind for quadruple in made.quadruples} == {"within", "between"}


@pytest.mark.parametrize("split", SPLITS)
def test_full_captions_fit_their_own_picture_alone(split: Split) -> None:
    made = benchmark(split)
    for number, scene in enumerate(made.scenes):
        full = tuple(Mention(person.kind, tuple(person.worn())) for person in scene.people)
        exact = [i for i, other in enumerate(made.scenes) if set(other.people) == set(scene.people)]
        assert exact == [number]
        assert true_of(full, scene)


@pytest.mark.parametrize("split", SPLITS)
def test_queries_name_their_relevant_pictures(split: Split) -> None:
    made = benchmark(split)
    assert made.queries
    for query in made.queries:
        assert query.relevant == tuple(i for i, scene in enumerate(made.scenes) if query.fits(scene))
        assert query.relevant
    if split == "heldout":
        assert {"en": "black top, white trousers", "zh": "黑色上衣，白色裤子"} in [q.texts for q in made.queries]


@pytest.mark.parametrize(
    "options",
    [{"omission": 2.0}, {"scenes": 0}, {"held_out": (("red", "pink"),)}, {"languages": ("fr",)}, {"languages": ()}],
)
def test_impossible_settings(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SceneConfig(**options)  # type: ignore[arg-type]


def test_all_colours_can_be_said() -> None:
    description = tuple(Mention(None, (("top", colour),)) for colour in COLOURS)
    assert all(colour in say(description, "en", Wording(False, 0, 0)) for colour in COLOURS)
    assert len(set(say(description, "zh", Wording(True, 0, 0)).split("；"))) == len(COLOURS)


def test_fewer_colours_are_all_that_is_drawn_and_said() -> None:
    colours = ("red", "blue", "black", "white")
    config = SceneConfig(scenes=60, pairs=6, colours=colours, held_out=(("black", "white"),))
    source = SceneSource(config)
    scenes = [*source.training_scenes(), *source.evaluation("heldout").scenes]
    assert {colour for scene in scenes for person in scene.people for _, colour in person.worn()} == set(colours)
    said = " ".join(c for record in source.training() for c in (*record.captions, *record.swapped))
    assert not any(colour in said for colour in ("green", "purple", "yellow", "orange", "绿", "紫", "黄", "橙"))
    with pytest.raises(ValueError, match="held_out"):
        SceneConfig(colours=colours)
