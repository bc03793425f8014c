"""Descriptions of scenes in English and Chinese words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from imglish.data.scene_world import THINGS, Colour, Description, Item, Kind, Mention

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

_ZH_COLOUR: dict[Colour, str] = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "black": "黑色",
    "white": "白色",
}
_ZH_ITEM: dict[Item, str] = {
    "hat": "帽子",
    "top": "上衣",
    "trousers": "裤子",
    "shoes": "鞋子",
    "bag": "包",
    "ball": "球",
    "box": "箱子",
    "balloon": "气球",
}
_ZH_VERB: dict[Item, str] = {"hat": "戴", "top": "穿", "trousers": "穿", "shoes": "穿", "bag": "背"}
_ZH_KIND: dict[Kind | None, str] = {"man": "男人", "woman": "女人", None: "人"}
_EN_KIND: dict[Kind | None, str] = {"man": "a man", "woman": "a woman", None: "someone"}
_EN_BETWEEN = ("; ", " and ", " next to ", " beside ", ", near ")
_ZH_BETWEEN = ("；", "和", "，旁边是", "，还有")


@dataclass(frozen=True)
class Wording:
    """How a description is put into words, whatever it says. bare: garments alone where the kind is not named."""

    bare: bool
    joint: float
    style: float

    @staticmethod
    def random(rng: np.random.Generator) -> Wording:
        chance, joint, style = rng.random(3)
        return Wording(bool(chance < 0.3), float(joint), float(style))


def say(description: Description, language: Language, wording: Wording) -> str:
    """A caption. Descriptions alike in all but colours come out alike in all but colours (and "a" or "an")."""
    phrase, joints = (_english, _EN_BETWEEN) if language == "en" else (_chinese, _ZH_BETWEEN)
    joint = joints[0] if wording.bare else joints[int(wording.joint * len(joints))]
    return joint.join(phrase(mention, wording) for mention in description)


def say_query(worn: Sequence[tuple[Item, Colour]], language: Language) -> str:
    """Garments alone, as one types a search: ``black top, white trousers``."""
    if language == "en":
        return ", ".join(f"{colour} {garment}" for garment, colour in worn)
    return "，".join(_ZH_COLOUR[colour] + _ZH_ITEM[item] for item, colour in worn)


def _english(mention: Mention, wording: Wording) -> str:
    if wording.bare and mention.kind is None:
        return say_query(mention.worn, "en")
    if mention.worn[0][0] in THINGS:
        return _with_article(*mention.worn[0])
    clothes = [_with_article(garment, colour) for garment, colour in mention.worn if garment != "bag"]
    parts = [_EN_KIND[mention.kind]]
    if clothes:
        listed = clothes[0] if len(clothes) == 1 else f"{', '.join(clothes[:-1])} and {clothes[-1]}"
        parts.append(f"{'in' if wording.style < 0.5 else 'wearing'} {listed}")
    for place, (garment, colour) in enumerate(mention.worn):
        if garment == "bag":  # said where it stands: first, or after the clothes
            parts.insert(1 if place == 0 else len(parts), f"with {_with_article(garment, colour)}")
    return " ".join(parts)


def _with_article(garment: Item, colour: Colour) -> str:
    if garment in ("trousers", "shoes"):
        return f"{colour} {garment}"
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {garment}"


def _chinese(mention: Mention, wording: Wording) -> str:
    if wording.bare and mention.kind is None:
        return say_query(mention.worn, "zh")
    if mention.worn[0][0] in THINGS:
        return f"一个{_ZH_COLOUR[mention.worn[0][1]]}的{_ZH_ITEM[mention.worn[0][0]]}"
    parts: list[str] = []
    verb = ""
    for garment, colour in mention.worn:
        new = "" if _ZH_VERB[garment] == verb else _ZH_VERB[garment]
        verb = _ZH_VERB[garment]
        parts.append(new + _ZH_COLOUR[colour] + _ZH_ITEM[garment])
    clothes = "、".join(parts)
    return f"{clothes}的{_ZH_KIND[mention.kind]}" if wording.style < 0.5 else f"一个{_ZH_KIND[mention.kind]}{clothes}"
