"""Captions that are not what they should be, at chosen rates: what caption filters are tried on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from imglish.data.scene_words import Language
from imglish.data.scene_world import Description, Mention, pick

NoiseKind = Literal["", "wrong", "partial", "irrelevant"]
KINDS: tuple[NoiseKind, ...] = get_args(NoiseKind)

# What stands beside pictures on the web and does not describe them; # becomes a number.
_BESIDE: dict[Language, tuple[str, ...]] = {
    "en": (
        *("click to enlarge", "photo of the day", "IMG_#.JPG", "free shipping on orders over $#", "page # of #"),
        *("best price guaranteed, buy now", "image may be subject to copyright", "our team in #", "sale up to #% off"),
        *("untitled-#", "posted on # May by admin", "see more pictures like this"),
    ),
    "zh": (
        *("点击查看大图", "今日图片", "图片_#.jpg", "满#元包邮", "第#页，共#页"),
        *("最低价，立即购买", "图片可能受版权保护", "我们的团队，#年", "低至#折"),
        *("未命名-#", "#月发布", "查看更多类似图片"),
    ),
}


@dataclass(frozen=True)
class CaptionNoise:
    """Chances that a training caption is wrong (says a colour of something else), partial (names one single thing) or
    irrelevant (describes another picture, or is text from beside a picture)."""

    wrong: float = 0.0
    partial: float = 0.0
    irrelevant: float = 0.0

    def __post_init__(self) -> None:
        chances = (self.wrong, self.partial, self.irrelevant)
        if not all(0 <= chance <= 1 for chance in chances) or sum(chances) > 1:
            raise ValueError(f"noise: {chances} are not chances that add up to at most 1")

    @property
    def any(self) -> bool:
        return self.wrong + self.partial + self.irrelevant > 0

    def draw(self, rng: np.random.Generator) -> NoiseKind:
        """Which kind a caption has; the empty text is none."""
        place = rng.random()
        for kind, chance in (("wrong", self.wrong), ("partial", self.partial), ("irrelevant", self.irrelevant)):
            place -= chance
            if place < 0:
                return kind  # type: ignore[return-value]
        return ""


def one_thing(description: Description, rng: np.random.Generator) -> Description:
    """One garment or thing of what is described, and nothing about who wears it."""
    return (Mention(None, (pick([item for mention in description for item in mention.worn], rng),)),)


def beside(language: Language, rng: np.random.Generator) -> str:
    """Text that stands beside pictures."""
    text = pick(_BESIDE[language], rng)
    while "#" in text:
        text = text.replace("#", str(int(rng.integers(2, 100))), 1)
    return text
