"""Drawn scenes with captions, and a benchmark of who wears what: data of any size without a download.

Seeded scenes of people in coloured garments, and a few things; English and Chinese captions in shuffled order that
often leave things out; some colour pairs of top and trousers never occur in training. For evaluation each scene has a
distractor with the same garments and colours but two of them exchanged, and captions that differ by that exchange alone
(after Winoground, Thrush et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import numpy as np

from imglish.data.records import Record
from imglish.data.scene_drawing import SceneImage
from imglish.data.scene_noise import CaptionNoise, NoiseKind, beside, one_thing
from imglish.data.scene_words import LANGUAGES, Language, Wording, say, say_query
from imglish.data.scene_world import (
    COLOURS,
    SMALL,
    Colour,
    Description,
    Garment,
    Item,
    Kind,
    Mention,
    Pair,
    Person,
    Scene,
    Thing,
    describe,
    pick,
    random_person,
    random_things,
    shuffled,
    swapped_description,
    true_of,
)

Split = Literal["seen", "heldout"]
Swap = Literal["within", "between"]


@dataclass(frozen=True)
class SceneConfig:
    """Settings of the drawn data.

    scenes: training pictures; size: their side in pixels; captions: per picture and language; omission: chance that a
    caption leaves out a garment (or whether it is a man or a woman); small_objects: chance of each of hat, shoes,
    bag; held_out: colour pairs of top and trousers, either way round, that training neither shows nor names;
    pairs: scenes with a distractor in each evaluation split; languages: of captions and queries;
    colours: of garments and objects, fewer make the question easier; people, things: fewest and most in a picture;
    noise: training captions that are not what they should be.
    """

    seed: int = 0
    scenes: int = 20_000
    size: int = 48
    captions: int = 2
    omission: float = 0.4
    small_objects: float = 0.4
    held_out: tuple[Pair, ...] = (("black", "white"), ("red", "blue"), ("green", "purple"), ("yellow", "orange"))
    pairs: int = 200
    languages: tuple[Language, ...] = LANGUAGES
    colours: tuple[Colour, ...] = COLOURS
    people: tuple[int, int] = (2, 2)
    things: tuple[int, int] = (0, 0)
    noise: CaptionNoise = field(default_factory=CaptionNoise)

    def __post_init__(self) -> None:
        for name, value in (("omission", self.omission), ("small_objects", self.small_objects)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a chance, not {value}")
        for name, count in (("scenes", self.scenes), ("size", self.size), ("captions", self.captions)):
            if count < 1:
                raise ValueError(f"{name} is {count}")
        for name, limits, least, most in (("people", self.people, 1, 4), ("things", self.things, 0, 3)):
            if not least <= limits[0] <= limits[1] <= most:
                raise ValueError(f"{name}: from {limits[0]} to {limits[1]}; possible are {least} to {most}")
        if len(self.colours) <= max(self.people[1], self.things[1]):
            raise ValueError(f"colours: {len(self.colours)} are not more than the people and things that may wear them")
        for pair in self.held_out:
            if pair[0] == pair[1] or not set(pair) <= set(self.colours):
                raise ValueError(f"held_out: {pair} is not a pair of two of the colours {', '.join(self.colours)}")
        if not self.languages or not set(self.languages) <= set(LANGUAGES):
            raise ValueError(f"languages: {self.languages}; known: {', '.join(LANGUAGES)}")


@dataclass(frozen=True)
class SceneQuadruple:
    """Two pictures and two captions: ``captions[i]`` is true of ``pictures[i]`` and false of the other. The captions
    leave out as much as those of the training, but never what was exchanged.

    kind: two garments of one person exchange colours (``within``), or one garment of both people (``between``).
    """

    pictures: tuple[Record, Record]
    captions: tuple[str, str]
    kind: Swap
    language: Language


@dataclass(frozen=True)
class SceneQuery:
    """A search for one person with these garments. texts: by language; relevant: numbers of the records that fit."""

    texts: dict[Language, str]
    worn: tuple[tuple[Item, Colour], ...]
    relevant: tuple[int, ...]

    def fits(self, scene: Scene) -> bool:
        return true_of((Mention(None, self.worn),), scene)


@dataclass(frozen=True)
class SceneBenchmark:
    """An evaluation split: scene 2i and its distractor 2i + 1, in ``scenes`` and ``records`` alike. Captions of records
    leave nothing out, one in each language, so each is true of its own picture alone."""

    records: list[Record]
    scenes: list[Scene]
    quadruples: list[SceneQuadruple]
    queries: list[SceneQuery]


@dataclass(frozen=True)
class SceneCaption:
    """A training caption; swapped: another that is false of the picture; noise: what is wrong with the caption."""

    text: str
    swapped: str
    language: Language
    noise: NoiseKind = ""


class _Part(IntEnum):
    TRAINING = 0
    SEEN = 1
    HELD_OUT = 2


class _Use(IntEnum):
    """What random numbers of a scene are for; one stream each."""

    LOOKS = 0
    WORDS = 1
    NOISE = 2


class SceneSource:
    """Makes the records. Pictures are drawn when they are asked for; equal configs give equal data."""

    def __init__(self, config: SceneConfig = SceneConfig()) -> None:
        self.config = config

    def training(self) -> list[Record]:
        """The training records: captions of all languages, and for each one a swapped one that is false."""
        return [self.training_record(index) for index in range(self.config.scenes)]

    def training_record(self, index: int) -> Record:
        """Training record ``index``, the same whatever else is asked for."""
        captions = self.training_captions(index)
        return Record(
            f"scene-{index:05d}",
            SceneImage(self.training_scene(index), self.config.size),
            tuple(caption.text for caption in captions),
            index,
            tuple(caption.swapped for caption in captions),
        )

    def training_scenes(self) -> list[Scene]:
        """What the training pictures show, in the order of :meth:`training`."""
        return [self.training_scene(index) for index in range(self.config.scenes)]

    def training_scene(self, index: int) -> Scene:
        """What training picture ``index`` shows."""
        return self._scene(_Part.TRAINING, index)

    def evaluation(self, split: Split = "seen") -> SceneBenchmark:
        """Pictures, quadruples and queries. ``seen``: colour pairs of the training (in new scenes); ``heldout``: in
        every quadruple the first picture, and with a ``within`` swap the second too, shows a held-out pair."""
        part = _Part.SEEN if split == "seen" else _Part.HELD_OUT
        if split == "heldout" and not self.config.held_out:
            raise ValueError("no colour pairs are held out")
        scenes: list[Scene] = []
        records: list[Record] = []
        quadruples: list[SceneQuadruple] = []
        taken: set[frozenset[Person]] = set()
        index = 0
        while len(quadruples) < self.config.pairs * len(self.config.languages):
            if index > 100 * self.config.pairs + 1000:
                raise ValueError(f"pairs: there are not {self.config.pairs} such scenes that differ; ask for fewer")
            rng = self._rng(part, index, _Use.WORDS)
            scene = self._scene(part, index)
            kind: Swap = "within" if index % 2 == 0 or len(scene.people) == 1 else "between"
            distractor = self._distractor(scene, kind, split, rng)
            index += 1
            shown = {frozenset(s.people) for s in (scene, distractor) if s is not None}
            if distractor is None or len(shown) < 2 or shown & taken:
                continue
            taken |= shown
            made = self._quadruples(split, len(records), (scene, distractor), kind, rng)
            records += made[0].pictures
            scenes += [scene, distractor]
            quadruples += made
        return SceneBenchmark(records, scenes, quadruples, self._queries(split, scenes))

    def _rng(self, part: _Part, index: int, use: _Use) -> np.random.Generator:
        key = np.array([self.config.seed % 2**64, part], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, index, use], dtype=np.uint64)))

    def _scene(self, part: _Part, index: int) -> Scene:
        rng = self._rng(part, index, _Use.LOOKS)
        config = self.config
        count = _between(config.people, rng)
        people = [random_person(rng, config.small_objects, config.held_out, config.colours) for _ in range(count)]
        if part == _Part.HELD_OUT:
            top, trousers = shuffled(pick(self.config.held_out, rng), rng)
            first = people[0]
            people[0] = Person(first.kind, top, trousers, first.hat, first.shoes, first.bag)
        things = random_things(rng, _between(config.things, rng), config.colours)
        return Scene(tuple(people), look=int(rng.integers(2**62)), things=things)

    def training_captions(self, index: int) -> list[SceneCaption]:
        """The captions of training picture ``index``, language after language."""
        config, scene = self.config, self.training_scene(index)
        rng = self._rng(_Part.TRAINING, index, _Use.WORDS)
        captions: list[SceneCaption] = []
        for language in config.languages:
            for _ in range(config.captions):
                description = describe(scene, rng, config.omission)
                wrong = swapped_description(description, scene, rng, config.held_out, config.colours)
                wording = Wording.random(rng)
                captions.append(
                    SceneCaption(say(description, language, wording), say(wrong, language, wording), language)
                )
        return self._noisy(captions, index) if config.noise.any else captions

    def _noisy(self, captions: list[SceneCaption], index: int) -> list[SceneCaption]:
        config, scene = self.config, self.training_scene(index)
        rng = self._rng(_Part.TRAINING, index, _Use.NOISE)
        found = []
        for caption in captions:
            kind = config.noise.draw(rng)
            if not kind:
                found.append(caption)
                continue
            said = describe(scene, rng, config.omission)
            wording = Wording.random(rng)
            if kind == "partial":
                said = one_thing(said, rng)
            elif kind == "wrong":
                said = swapped_description(said, scene, rng, config.held_out, config.colours)
            elif kind == "irrelevant":
                said = self._elsewhere(scene, rng)
            text = say(said, caption.language, wording)
            if kind == "irrelevant" and rng.random() < 0.5:
                text = beside(caption.language, rng)
            wrong = swapped_description(said, scene, rng, config.held_out, config.colours)
            found.append(SceneCaption(text, say(wrong, caption.language, wording), caption.language, kind))
        return found

    def _elsewhere(self, scene: Scene, rng: np.random.Generator) -> Description:
        """A description of another training scene that is false of this one."""
        while True:
            other = self.training_scene(int(rng.integers(2**40, 2**41)))  # none of those that are shown
            description = describe(other, rng, self.config.omission)
            if not true_of(description, scene):
                return description

    def _distractor(self, scene: Scene, kind: Swap, split: Split, rng: np.random.Generator) -> Scene | None:
        """The scene with two colours exchanged, or None where that changes nothing or leaves the split."""
        count = len(scene.people)
        if kind == "within":
            number = 0 if split == "heldout" else int(rng.random() * count)
            person = scene.people[number]
            other = scene.recoloured([(number, "top", person.trousers), (number, "trousers", person.top)])
        else:
            first, second = (0, 1) if count == 2 else sorted(shuffled(range(count), rng)[:2])
            one, two = scene.people[first], scene.people[second]
            garments: list[Garment] = ["top", "trousers"]
            garments += [g for g in SMALL if one.colour(g) and two.colour(g) and split == "seen"]
            garment = pick(garments, rng)
            other = scene.recoloured([(first, garment, two.colour(garment)), (second, garment, one.colour(garment))])
        if split == "seen" and any(person.pairs_up(self.config.held_out) for person in other.people):
            return None
        return None if set(other.people) == set(scene.people) else other

    def _quadruples(
        self, split: Split, first: int, scenes: tuple[Scene, Scene], kind: Swap, rng: np.random.Generator
    ) -> list[SceneQuadruple]:
        """One quadruple a language; the pair of records is the same in all."""
        full = self._said(_parallel_descriptions(scenes, rng), rng)
        short = self._said(_parallel_descriptions(scenes, rng, self.config.omission), rng)
        pictures = tuple(
            Record(
                f"{split}-{first + i:04d}",
                SceneImage(scene, self.config.size),
                tuple(full[language][i] for language in self.config.languages),
                image_id=first + i,
            )
            for i, scene in enumerate(scenes)
        )
        return [SceneQuadruple((pictures[0], pictures[1]), short[lang], kind, lang) for lang in self.config.languages]

    def _said(
        self, contents: tuple[Description, Description], rng: np.random.Generator
    ) -> dict[Language, tuple[str, str]]:
        wording = Wording.random(rng)
        return {
            lang: (say(contents[0], lang, wording), say(contents[1], lang, wording)) for lang in self.config.languages
        }

    def _queries(self, split: Split, scenes: Sequence[Scene]) -> list[SceneQuery]:
        """Top and trousers for every colour pair of the split, and with each small object where a picture fits."""
        colours = self.config.colours
        pairs = [(a, b) for a in colours for b in colours if a != b]
        held_out = {frozenset(pair) for pair in self.config.held_out}
        queries = []
        for top, trousers in pairs:
            if (frozenset((top, trousers)) in held_out) != (split == "heldout"):
                continue
            base: tuple[tuple[Item, Colour], ...] = (("top", top), ("trousers", trousers))
            wearers = [p for scene in scenes for p in scene.people if (p.top, p.trousers) == (top, trousers)]
            small = [item for person in wearers for item in person.worn() if item[0] in SMALL]
            for worn in (base, *((*base, item) for item in small[:1])):
                mention = (Mention(None, worn),)
                relevant = tuple(i for i, scene in enumerate(scenes) if true_of(mention, scene))
                if relevant:
                    texts = {language: say_query(worn, language) for language in LANGUAGES}
                    queries.append(SceneQuery(texts, worn, relevant))
        return queries


def _parallel_descriptions(
    scenes: tuple[Scene, Scene], rng: np.random.Generator, omission: float = 0.0
) -> tuple[Description, Description]:
    """Descriptions of a scene and its distractor, naming people and garments in the same order; each is false of the
    other scene. What was exchanged is always named; the rest, and who is a man or a woman, is left out with chance
    ``omission``, less where the two could then not be told apart."""
    while True:
        mentions: list[tuple[Mention, Mention]] = []
        for number in shuffled(range(len(scenes[0].everyone)), rng):
            one, two = (scene.everyone[number] for scene in scenes)
            kind = one.kind if rng.random() >= omission else None
            garments = shuffled([item for item, _ in one.worn()], rng)
            order = [g for g in garments if rng.random() >= omission or one.colour(g) != two.colour(g)]
            if order:
                mentions.append((_mention(one, kind, order), _mention(two, kind, order)))
        first, second = tuple(pair[0] for pair in mentions), tuple(pair[1] for pair in mentions)
        if not true_of(first, scenes[1]) and not true_of(second, scenes[0]):
            return first, second
        omission *= 0.9


def _mention(one: Person | Thing, kind: Kind | None, order: Sequence[Item]) -> Mention:
    colours = dict(one.worn())
    return Mention(kind, tuple((item, colours[item]) for item in order))


def _between(limits: tuple[int, int], rng: np.random.Generator) -> int:
    """A number from the first to the last; nothing is drawn where there is no choice."""
    return limits[0] if limits[0] == limits[1] else int(rng.integers(limits[0], limits[1] + 1))
