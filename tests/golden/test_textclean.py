"""Caption and question clean-up against the official functions of ALBEF and BLIP."""

from __future__ import annotations

from pathlib import Path

import pytest

from imglish.data.text import CaptionStyle, clean_caption, clean_question
from tests.golden.support import Case, cases

FOLDERS = cases("albef-textclean", "blip-textclean")


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_textclean(folder: Path) -> None:
    case = Case(folder)
    style: CaptionStyle = "albef" if folder.name.startswith("albef") else "blip"
    functions = {"pre_caption": clean_caption, "pre_question": clean_question}
    assert case.meta["pairs"], "a case without pairs checks nothing"
    for pair in case.meta["pairs"]:
        got = functions[pair["function"]](pair["input"], pair["max_words"], style)
        assert got == pair["output"], pair
