"""Found pictures in terminals that can show some: those of kitty, of iTerm2, and those that read sixels.

What a terminal can do is told by its environment alone: asking it would wait for an answer that others never give.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping
from itertools import groupby
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from imglish.search.engine import Index
from imglish.search.results import Results
from imglish.search.sheet import picture

Protocol = Literal["kitty", "iterm2", "sixel"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
SIDE = 150  # pixels of a picture
ACROSS = 5
_GAP = 4
_CHUNK = 4096  # characters of one command of kitty's
_PROGRAMS: dict[str, Protocol] = {
    "ghostty": "kitty",
    "iTerm.app": "iterm2",
    "WezTerm": "iterm2",
    "mintty": "iterm2",
    "contour": "sixel",
}
_TERMS: dict[str, Protocol] = {"xterm-kitty": "kitty", "foot": "sixel", "mlterm": "sixel"}


def protocol_of(environment: Mapping[str, str]) -> Protocol | None:
    """How the terminal shows pictures; None where it is not known to, as behind tmux and screen, which keep them."""
    term = environment.get("TERM", "")
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return None
    if "KITTY_WINDOW_ID" in environment:
        return "kitty"
    program = environment.get("TERM_PROGRAM", "") or environment.get("LC_TERMINAL", "").replace("iTerm2", "iTerm.app")
    if program in _PROGRAMS:
        return _PROGRAMS[program]
    return next((kind for name, kind in _TERMS.items() if term == name or term.startswith(name + "-")), None)


def contact_strip(index: Index, results: Results) -> Image.Image:
    """The found pictures with their places, five in a row."""
    down = -(-len(results.hits) // ACROSS)
    across = min(ACROSS, len(results.hits))
    strip = Image.new("RGB", (across * (SIDE + _GAP), down * (SIDE + _GAP)))
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(16)
    for number, hit in enumerate(results.hits):
        left, top = number % ACROSS * (SIDE + _GAP), number // ACROSS * (SIDE + _GAP)
        small = picture(index, hit.key)
        small.thumbnail((SIDE, SIDE))
        strip.paste(small, (left + (SIDE - small.width) // 2, top + (SIDE - small.height) // 2))
        box = draw.textbbox((left + 4, top + 2), str(hit.rank), font)
        draw.rectangle((box[0] - 3, box[1] - 2, box[2] + 3, box[3] + 2), fill="black")
        draw.text((left + 4, top + 2), str(hit.rank), "white", font)
    return strip


def drawn(image: Image.Image, protocol: Protocol) -> str:
    """What a terminal is sent to show ``image``."""
    if protocol == "sixel":
        return _sixels(image) + "\n"
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = b64encode(buffer.getvalue()).decode()
    if protocol == "iterm2":
        return f"\x1b]1337;File=inline=1;size={len(buffer.getvalue())}:{data}\a\n"
    parts = [data[low : low + _CHUNK] for low in range(0, len(data), _CHUNK)]
    heads = ["a=T,f=100,", *[""] * (len(parts) - 1)]
    more = [1] * (len(parts) - 1) + [0]
    return "".join(f"\x1b_G{head}m={m};{part}\x1b\\" for head, m, part in zip(heads, more, parts, strict=True)) + "\n"


def _sixels(image: Image.Image) -> str:
    """Bands of six rows, of each band the pixels of one colour after the other."""
    flat = image.quantize(255)
    pixels, palette = np.asarray(flat), np.array(flat.getpalette()).reshape(-1, 3) * 100 // 255
    said = [f'\x1bPq"1;1;{image.width};{image.height}']
    said += [f"#{colour};2;{red};{green};{blue}" for colour, (red, green, blue) in enumerate(palette.tolist())]
    for top in range(0, image.height, 6):
        band = pixels[top : top + 6]
        weights = 1 << np.arange(len(band))
        for colour in np.unique(band).tolist():
            bits = (weights[:, None] * (band == colour)).sum(0)
            runs = [(chr(63 + bit), len(list(run))) for bit, run in groupby(bits.tolist())]
            said.append(f"#{colour}" + "".join(f"!{n}{c}" if n > 3 else c * n for c, n in runs) + "$")
        said.append("-")
    return "".join([*said, "\x1b\\"])
