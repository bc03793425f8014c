"""Scenes as small pictures: drawn larger with flat shapes, then averaged down."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from imglish.data.scene_world import GARMENTS, Colour, Garment, Person, Scene, Thing

Rgb = tuple[int, int, int]

_OVERSAMPLING = 3
_EYES: Rgb = (40, 30, 30)
_PAINT: dict[Colour, Rgb] = {
    "red": (208, 30, 38),
    "orange": (245, 132, 24),
    "yellow": (247, 219, 50),
    "green": (36, 146, 62),
    "blue": (32, 84, 204),
    "purple": (132, 52, 164),
    "black": (24, 24, 28),
    "white": (246, 246, 244),
}
_SKIN: tuple[Rgb, ...] = ((244, 208, 176), (222, 176, 138), (172, 118, 82), (122, 80, 56))
_HAIR: tuple[Rgb, ...] = ((48, 34, 28), (96, 62, 36), (150, 110, 62), (70, 70, 74))
_WALL: tuple[Rgb, ...] = ((160, 178, 188), (182, 172, 156), (150, 170, 156), (176, 164, 178), (168, 168, 168))
_FLOOR: tuple[Rgb, ...] = ((134, 124, 110), (122, 132, 116), (128, 126, 132))


@dataclass(frozen=True)
class SceneImage:
    """A scene as an image source: called, it draws itself. Equal scenes give equal pictures."""

    scene: Scene
    size: int

    def __call__(self) -> Image.Image:
        return draw(self.scene, self.size)


def draw(scene: Scene, size: int = 48) -> Image.Image:
    """The scene as an RGB picture of side ``size``."""
    rng = np.random.Generator(np.random.Philox(key=np.array([scene.look, 0x5CE4E], dtype=np.uint64)))
    side = size * _OVERSAMPLING
    image = Image.new("RGB", (side, side), _shade(_WALL[int(rng.random() * len(_WALL))], rng, 14))
    canvas = ImageDraw.Draw(image)
    horizon = side * (0.70 + 0.14 * rng.random())
    canvas.rectangle((0, horizon, side, side), fill=_shade(_FLOOR[int(rng.random() * len(_FLOOR))], rng, 14))
    mirrored = rng.random() < 0.5
    side_of_bag = 0
    count = len(scene.people)
    first, apart = (0.27, 0.46) if count == 2 else (0.5 / count, 1 / count)
    smaller = min(1.0, 2.2 / count)
    for number, person in enumerate(reversed(scene.people) if mirrored else scene.people):
        stature = side * (0.80 + 0.11 * rng.random()) * smaller
        centre = side * (first + apart * number + 0.04 * (rng.random() - 0.5))
        foot = side * (0.975 - 0.03 * rng.random())
        # Two bags never meet in the middle, where one would hide the other.
        side_of_bag = 1 if side_of_bag == 1 else 1 - 2 * int(rng.random() * 2)
        _Figure(canvas, centre, foot, stature, side_of_bag, rng).draw(person)
    gaps = [first + apart * (number - 0.5) for number in range(count + 1)]
    for thing, gap in zip(scene.things, rng.permutation(gaps)):
        _draw_thing(canvas, thing, side, min(max(gap, 0.09), 0.91), smaller, rng)
    return image.reduce(_OVERSAMPLING)


def _draw_thing(
    canvas: ImageDraw.ImageDraw, thing: Thing, side: int, x: float, smaller: float, rng: np.random.Generator
) -> None:
    """A ball or a box on the floor, or a balloon in the air, ``x`` of the width from the left."""
    fill = _shifted(_PAINT[thing.paint], rng.integers(-12, 13, 3).tolist())
    edge = _darker(fill, 0.6)
    half = side * (0.065 + 0.012 * rng.random()) * max(smaller, 0.75)
    middle = side * (x + 0.02 * (rng.random() - 0.5))
    if thing.what == "balloon":
        top = side * (0.04 + 0.05 * rng.random())
        canvas.line((middle, top + 2.3 * half, middle, top + 5 * half), fill=edge, width=max(side // 90, 1))
        canvas.ellipse((middle - half, top, middle + half, top + 2.4 * half), fill=fill, outline=edge)
        return
    floor = side * (0.975 - 0.03 * rng.random())
    place = (middle - half, floor - 2 * half, middle + half, floor)
    if thing.what == "ball":
        canvas.ellipse(place, fill=fill, outline=edge)
    else:
        canvas.rectangle(place, fill=fill, outline=edge)


class _Figure:
    """Draws one person; lengths are shares of the stature, x from the middle of the body, y upwards from the soles."""

    def __init__(
        self,
        canvas: ImageDraw.ImageDraw,
        centre: float,
        foot: float,
        stature: float,
        bag_side: int,
        rng: np.random.Generator,
    ) -> None:
        self.canvas, self.centre, self.foot, self.stature, self.bag_side = canvas, centre, foot, stature, bag_side
        self.skin = _shade(_SKIN[int(rng.random() * len(_SKIN))], rng, 8)
        self.hair = _shade(_HAIR[int(rng.random() * len(_HAIR))], rng, 8)
        self.shades: dict[Garment, list[int]] = dict(zip(GARMENTS, rng.integers(-12, 13, (5, 3)).tolist()))

    def draw(self, person: Person) -> None:
        if person.kind == "woman":  # long hair, behind the shoulders
            self._box(-0.125, 0.70, 0.125, 0.93, self.hair, round_by=0.07)
        self._legs(person)
        self._arms_and_top(person)
        self._head(person)
        if person.bag is not None:
            self._bag(self._paint("bag", person.bag))

    def _legs(self, person: Person) -> None:
        cloth = self._paint("trousers", person.trousers)
        for side in (-1, 1):
            inner, outer = sorted((0.012 * side, 0.135 * side))
            self._box(inner, 0.06, outer, 0.44, cloth)
            toe, heel = sorted((0.0 * side, 0.165 * side))
            shoe = self._paint("shoes", person.shoes) if person.shoes is not None else self.skin
            self._box(toe + 0.008, 0.0, heel - 0.008, 0.075 if person.shoes else 0.05, shoe)
        self._box(-0.135, 0.37, 0.135, 0.46, cloth)

    def _arms_and_top(self, person: Person) -> None:
        cloth = self._paint("top", person.top)
        sleeve = _darker(cloth, 0.86)
        for side in (-1, 1):
            inner, outer = sorted((0.13 * side, 0.215 * side))
            self._box(inner, 0.37, outer, 0.45, self.skin)
            self._box(inner, 0.42, outer, 0.735, sleeve)
        self._box(-0.15, 0.43, 0.15, 0.745, cloth)

    def _head(self, person: Person) -> None:
        self._box(-0.04, 0.73, 0.04, 0.78, self.skin)
        self._oval(-0.095, 0.755, 0.095, 0.955, self.skin)
        self._half(-0.10, 0.78, 0.10, 0.97, self.hair)
        for side in (-1, 1):
            self._oval(0.043 * side - 0.017, 0.835, 0.043 * side + 0.017, 0.869, _EYES)
        if person.hat is not None:
            cloth = self._paint("hat", person.hat)
            self._box(-0.165, 0.885, 0.165, 0.925, _darker(cloth, 0.88))
            self._box(-0.105, 0.905, 0.105, 1.02, cloth, round_by=0.04)

    def _bag(self, cloth: Rgb) -> None:
        inner, outer = sorted((0.12 * self.bag_side, 0.29 * self.bag_side))
        middle = (inner + outer) / 2
        self._line(middle - 0.05, 0.33, middle, 0.42, _darker(cloth, 0.7))
        self._line(middle + 0.05, 0.33, middle, 0.42, _darker(cloth, 0.7))
        self._box(inner, 0.19, outer, 0.345, cloth, round_by=0.025, outline=_darker(cloth, 0.6))

    def _paint(self, garment: Garment, colour: Colour) -> Rgb:
        return _shifted(_PAINT[colour], self.shades[garment])

    def _place(self, left: float, low: float, right: float, high: float) -> tuple[float, float, float, float]:
        x, y = self.centre, self.foot
        s = self.stature
        return x + left * s, y - high * s, x + right * s, y - low * s

    def _box(
        self,
        left: float,
        low: float,
        right: float,
        high: float,
        fill: Rgb,
        *,
        round_by: float = 0.0,
        outline: Rgb | None = None,
    ) -> None:
        place = self._place(left, low, right, high)
        if not round_by:
            self.canvas.rectangle(place, fill=fill)
            return
        self.canvas.rounded_rectangle(place, radius=round_by * self.stature, fill=fill, outline=outline)

    def _oval(self, left: float, low: float, right: float, high: float, fill: Rgb) -> None:
        self.canvas.ellipse(self._place(left, low, right, high), fill=fill)

    def _half(self, left: float, low: float, right: float, high: float, fill: Rgb) -> None:
        """The upper half of an oval: hair on the skull."""
        self.canvas.pieslice(self._place(left, low, right, high), 180, 360, fill=fill)

    def _line(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb) -> None:
        s = self.stature
        start, end = (self.centre + x0 * s, self.foot - y0 * s), (self.centre + x1 * s, self.foot - y1 * s)
        self.canvas.line((*start, *end), fill=fill, width=max(int(0.018 * s), 1))


def _shade(colour: Rgb, rng: np.random.Generator, by: int) -> Rgb:
    return _shifted(colour, rng.integers(-by, by + 1, 3).tolist())


def _shifted(colour: Rgb, by: list[int]) -> Rgb:
    red, green, blue = (min(max(c + s, 0), 255) for c, s in zip(colour, by))
    return red, green, blue


def _darker(colour: Rgb, factor: float) -> Rgb:
    red, green, blue = (int(c * factor) for c in colour)
    return red, green, blue
