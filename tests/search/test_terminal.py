"""Pictures in a terminal: what is sent is read back."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from imglish.search.terminal import Protocol, drawn, protocol_of
from tests.search.samples import picture


@pytest.mark.parametrize(
    "environment, protocol",
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),  # over ssh
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "foot-extra"}, "sixel"),
        ({"TERM": "mlterm-256color"}, "sixel"),
        ({"TERM": "football"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "tmux", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "tmux-socket,1,0"}, None),
        ({"TERM": "screen", "LC_TERMINAL": "iTerm2"}, None),
        ({}, None),
    ],
)
def test_terminals_are_known_by_their_environment(environment: dict[str, str], protocol: Protocol | None) -> None:
    assert protocol_of(environment) == protocol


def test_kitty_and_iterm2_get_the_picture_as_it_is() -> None:
    image = picture(3, 90)
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", drawn(image, "kitty"))
    assert len(parts) > 1
    assert all(len(data) <= 4096 for _, data in parts)
    assert parts[0][0] == "a=T,f=100,m=1"
    assert [head for head, _ in parts[1:]] == ["m=1"] * (len(parts) - 2) + ["m=0"]
    inline = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+):([^\a]*)\a\n", drawn(image, "iterm2"))
    assert inline is not None
    for data in ("".join(data for _, data in parts), inline.group(2)):
        file = base64.b64decode(data)
        assert len(file) == int(inline.group(1))
        assert (np.asarray(Image.open(io.BytesIO(file))) == np.asarray(image)).all()


def test_sixels_give_the_picture_in_255_colours() -> None:
    image = picture(4, 40)  # not a multiple of six rows
    said = drawn(image, "sixel")
    body = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)(.*)\x1b\\\n', said, re.DOTALL)
    assert body is not None
    width, height = int(body.group(1)), int(body.group(2))
    assert (width, height) == image.size
    seen = np.full((height, width, 3), -1)
    colours: dict[int, list[int]] = {}
    left, top, colour = 0, 0, 0
    for token in re.finditer(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)(.)|([$-])|([?-~])", body.group(3)):
        if token[1]:
            colours[int(token[1])] = [int(token[i]) for i in (2, 3, 4)]
        elif token[5]:
            colour = int(token[5])
        elif token[8]:
            left, top = 0, top + 6 * (token[8] == "-")
        else:
            run = int(token[6] or 1)
            for row in range(6):
                if (ord(token[7] or token[9]) - 63) >> row & 1:
                    seen[top + row, left : left + run] = colours[colour]
            left += run
    wanted = np.asarray(image.quantize(255).convert("RGB")).astype(int) * 100 // 255
    assert (seen == wanted).all()
