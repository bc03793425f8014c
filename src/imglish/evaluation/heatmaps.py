"""Heat maps over the pictures that they are about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from imglish.data.aspect import AspectTransform
from imglish.data.images import ImageTransform
from imglish.evaluation.explain import Explanation
from imglish.evaluation.grounding import Box, enlarge

FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei")
"""The first of these that are installed draw the words; the others have Chinese characters."""


def over_picture(heat_hw: Tensor, size: tuple[int, int], transform: ImageTransform | AspectTransform) -> Tensor:
    """A heat map ``(h, w)`` in the pixels ``(height, width)`` of its picture, bicubic, not negative; zero where
    ``transform`` cut the picture off, so that the model did not see it. size: (width, height)."""
    width, height = size
    left, upper, right, lower = 0, 0, width, height
    if isinstance(transform, ImageTransform):
        left, upper, right, lower = (round(edge) for edge in transform.box(width, height, None))
    heat = torch.zeros(height, width)
    heat[upper:lower, left:right] = enlarge(heat_hw, right - left, lower - upper).clamp(min=0)
    return heat


def marked(
    image: Image.Image,
    heat_hw: Tensor,
    transform: ImageTransform | AspectTransform,
    boxes: Sequence[Box],
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """The picture under a heat map, with frames; boxes in pixels of a picture of ``size`` (default: of this one)."""
    heat = over_picture(heat_hw, image.size, transform)
    colours = matplotlib.colormaps["jet"]((heat / heat.max().clamp(min=1e-12)).numpy())
    shown = Image.blend(image, Image.fromarray((255 * colours[..., :3]).astype(np.uint8)), 0.5)
    canvas = ImageDraw.Draw(shown)
    across, down = (own / given for own, given in zip(image.size, size or image.size, strict=True))
    for left, top, width, height in boxes:
        corners = (left * across, top * down, (left + width) * across, (top + height) * down)
        canvas.rectangle(corners, outline=(255, 255, 255), width=max(2, image.width // 150))
    return shown


def draw(
    image: Image.Image, explanation: Explanation, transform: ImageTransform | AspectTransform, path: Path, title: str
) -> None:
    """Write a picture: the image, the map of the whole text, the map of each word, five in a row.

    Each map is drawn from nothing to its own highest point; the number behind a word is that point as a share of the
    highest of all words: a word with a small one hardly mattered, whatever its map looks like.
    """
    highest = float(explanation.maps.max()) if len(explanation.maps) else 0.0
    panels: list[tuple[str, Tensor | None]] = [("", None), ("whole text", explanation.whole)]
    for word, one in zip(explanation.words, explanation.maps, strict=True):
        share = float(one.max()) / highest if highest > 0 else 0.0
        panels.append((f"{word}  {share:.2f}", one))
    installed = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
    across = min(5, len(panels))
    down = -(-len(panels) // across)
    with matplotlib.rc_context({"font.family": [font for font in FONTS if font in installed]}):
        cell = image.height / image.width
        figure = Figure(figsize=(2.4 * across, (2.4 * cell + 0.35) * down + 0.4), layout="constrained")
        figure.suptitle(title, fontsize=10)
        grid: Any = figure.subplots(down, across, squeeze=False)
        for place in grid.flat:
            place.axis("off")
        for place, (name, one) in zip(grid.flat, panels, strict=False):
            place.imshow(np.asarray(image))
            place.set_title(name, fontsize=9)
            if one is not None:
                heat = over_picture(one, image.size, transform)
                place.imshow(heat.numpy(), cmap="jet", alpha=0.5, vmin=0, vmax=max(float(heat.max()), 1e-12))
        figure.savefig(path, dpi=110)
