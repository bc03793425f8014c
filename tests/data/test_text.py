from __future__ import annotations

import pytest

from imglish.data.text import clean_caption, mentions_side


@pytest.mark.parametrize(
    "text", ["the man on the left", "Right-hand drive", "leftmost cup", "左边的人", "两人在右侧", "links im Bild"]
)
def test_words_for_sides_are_found(text: str) -> None:
    assert mentions_side(text)


@pytest.mark.parametrize("text", ["a bright cleft", "copyright", "the upright piano", "一个人", ""])
def test_other_words_are_not(text: str) -> None:
    assert not mentions_side(text)


def test_style_none_only_strips() -> None:
    assert clean_caption("  Two  dogs, one. \n", 2, "none") == "Two  dogs, one."
    assert clean_caption("...!", 30, "albef") == ""
