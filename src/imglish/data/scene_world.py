"""The little world of the drawn scenes: people, their garments, a few things, colours, and what is said of them.

Nothing here knows a language: a :class:`Scene` is what a picture shows, a :class:`Mention` what a caption says of one
person or thing, and :func:`true_of` tells whether the one fits the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Any, Literal, TypeVar

import numpy as np

Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "black", "white"]
Garment = Literal["hat", "top", "trousers", "shoes", "bag"]
What = Literal["ball", "box", "balloon"]
Item = Garment | What
Kind = Literal["man", "woman"]
Pair = tuple[Colour, Colour]

COLOURS: tuple[Colour, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
GARMENTS: tuple[Garment, ...] = ("top", "trousers", "hat", "shoes", "bag")
SMALL: tuple[Garment, ...] = ("hat", "shoes", "bag")
THINGS: tuple[What, ...] = ("ball", "box", "balloon")
T = TypeVar("T")


@dataclass(frozen=True)
class Person:
    """One person; hat, shoes and bag may be absent."""

    kind: Kind
    top: Colour
    trousers: Colour
    hat: Colour | None = None
    shoes: Colour | None = None
    bag: Colour | None = None

    def colour(self, item: Item) -> Colour | None:
        colour: Colour | None = getattr(self, item, None)
        return colour

    def recoloured(self, garment: Garment, colour: Colour | None) -> Person:
        change: dict[str, Any] = {garment: colour}
        return replace(self, **change)

    def worn(self) -> list[tuple[Item, Colour]]:
        return [(garment, colour) for garment in GARMENTS if (colour := self.colour(garment)) is not None]

    def pairs_up(self, pairs: Sequence[Pair]) -> bool:
        """Whether top and trousers have the colours of one of the pairs, either way round."""
        return _paired(self.top, self.trousers, pairs)


@dataclass(frozen=True)
class Thing:
    """Something beside the people that has a colour; it is "worn" by itself."""

    what: What
    paint: Colour
    kind: None = None

    def colour(self, item: Item) -> Colour | None:
        return self.paint if item == self.what else None

    def worn(self) -> list[tuple[Item, Colour]]:
        return [(self.what, self.paint)]


@dataclass(frozen=True)
class Scene:
    """What a picture shows. look: the seed of all that captions never speak of (place, stature, skin, background)."""

    people: tuple[Person, ...]
    look: int
    things: tuple[Thing, ...] = ()

    @property
    def everyone(self) -> tuple[Person | Thing, ...]:
        """Whom or what a mention can be about."""
        return (*self.people, *self.things)

    def recoloured(self, changes: Sequence[tuple[int, Garment, Colour | None]]) -> Scene:
        """The same picture with other colours: (person, garment, colour)."""
        people = list(self.people)
        for number, garment, colour in changes:
            people[number] = people[number].recoloured(garment, colour)
        return replace(self, people=tuple(people))


@dataclass(frozen=True)
class Mention:
    """What a caption says of one person: perhaps the kind, and some garments with their colours, in this order. Of a
    thing: itself and its colour."""

    kind: Kind | None
    worn: tuple[tuple[Item, Colour], ...]

    def true_of(self, one: Person | Thing) -> bool:
        return self.kind in (None, one.kind) and all(one.colour(item) == c for item, c in self.worn)

    def pairs_up(self, pairs: Sequence[Pair]) -> bool:
        said = dict(self.worn)
        return "top" in said and "trousers" in said and _paired(said["top"], said["trousers"], pairs)


Description = tuple[Mention, ...]
"""Mentions of different people and things, at least one."""


def true_of(description: Description, scene: Scene) -> bool:
    """Whether people and things of the scene can be assigned to the mentions, each to another one."""
    return _assignable(description, scene.everyone)


def _assignable(description: Description, free: tuple[Person | Thing, ...]) -> bool:
    if not description:
        return True
    first, *rest = description
    return any(first.true_of(one) and _assignable(tuple(rest), free[:i] + free[i + 1 :]) for i, one in enumerate(free))


def describe(scene: Scene, rng: np.random.Generator, omission: float) -> Description:
    """A true description in random order. Each person's kind and each garment or thing is left out with chance
    ``omission``; a person of whom nothing would be said is left out, but one garment is always named."""
    mentions = []
    for one in shuffled(scene.everyone, rng):
        kind = one.kind if rng.random() >= omission else None
        worn = tuple(item for item in shuffled(one.worn(), rng) if rng.random() >= omission)
        if worn:
            mentions.append(Mention(kind, worn))
    if not mentions:
        person = pick(scene.people, rng)
        mentions.append(Mention(None, (pick(person.worn(), rng),)))
    return tuple(mentions)


def swapped_description(
    description: Description,
    scene: Scene,
    rng: np.random.Generator,
    never: Sequence[Pair],
    colours: Sequence[Colour] = COLOURS,
) -> Description:
    """The description with exactly one binding wrong: two of its colours exchanged, else one colour taken from another
    garment of the scene, else any other colour. It is false of the scene, and speaks of none of the ``never`` pairs."""
    for variant in chain(
        _exchanged(description, rng), _altered(description, _shown(scene), rng), _altered(description, colours, rng)
    ):
        if not true_of(variant, scene) and not any(mention.pairs_up(never) for mention in variant):
            return variant
    raise ValueError(f"no false variant of {description}")


def _exchanged(description: Description, rng: np.random.Generator) -> Iterator[Description]:
    """Two colours exchanged, of one person or of one garment, in random order."""
    places = [(m, i) for m, mention in enumerate(description) for i in range(len(mention.worn))]
    for one, two in shuffled(list(combinations(places, 2)), rng):
        first, second = (description[m].worn[i] for m, i in (one, two))
        if first[1] != second[1] and (one[0] == two[0] or first[0] == second[0]):
            yield _with_colour(_with_colour(description, one, second[1]), two, first[1])


def _altered(description: Description, colours: Sequence[Colour], rng: np.random.Generator) -> Iterator[Description]:
    """One colour replaced by one of ``colours``, in random order."""
    places = [(m, i) for m, mention in enumerate(description) for i in range(len(mention.worn))]
    for place, colour in shuffled([(place, colour) for place in places for colour in colours], rng):
        if description[place[0]].worn[place[1]][1] != colour:
            yield _with_colour(description, place, colour)


def _shown(scene: Scene) -> list[Colour]:
    return sorted({colour for one in scene.everyone for _, colour in one.worn()})


def _with_colour(description: Description, place: tuple[int, int], colour: Colour) -> Description:
    m, i = place
    kind, worn = description[m].kind, description[m].worn
    return (
        *description[:m],
        Mention(kind, (*worn[:i], (worn[i][0], colour), *worn[i + 1 :])),
        *description[m + 1 :],
    )


def random_person(
    rng: np.random.Generator, small_objects: float, never: Sequence[Pair], colours: Sequence[Colour] = COLOURS
) -> Person:
    """A person in some of ``colours``, top and trousers of none of the ``never`` pairs; each small object with that
    chance."""
    while True:
        small = {garment: pick(colours, rng) for garment in SMALL if rng.random() < small_objects}
        kind: Kind = "woman" if rng.random() < 0.5 else "man"
        person = Person(kind, pick(colours, rng), pick(colours, rng), **small)
        if not person.pairs_up(never):
            return person


def random_things(rng: np.random.Generator, count: int, colours: Sequence[Colour] = COLOURS) -> tuple[Thing, ...]:
    """Different things: no two of the same kind in the same colour."""
    things: list[Thing] = []
    while len(things) < count:
        thing = Thing(pick(THINGS, rng), pick(colours, rng))
        if thing not in things:
            things.append(thing)
    return tuple(things)


def pick(options: Sequence[T], rng: np.random.Generator) -> T:
    """One of the options, by one number of ``rng``."""
    return options[int(rng.random() * len(options))]


def shuffled(items: Sequence[T], rng: np.random.Generator) -> list[T]:
    """The items in a random order."""
    order = rng.random(len(items)).argsort()
    return [items[i] for i in order]


def _paired(one: Colour, two: Colour, pairs: Sequence[Pair]) -> bool:
    return (one, two) in pairs or (two, one) in pairs
