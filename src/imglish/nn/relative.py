"""Relative positions as learned biases of the attention scores (BEiT, section 2.3; VLMo, section 3.1).

The picture's patches have one bias for each offset on the grid, the text's tokens one for each distance; class tokens
have their own, and so have text to picture and picture to text, which know no distance.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.nn.experts import Packing


class RelativeBias(nn.Module):
    """One table for all layers and heads: ``(rows, layers * heads)``, zero at the start.

    grid: patches a side; text: longest text that the table has distances for (0: pictures only, as in BEiT). Rows:
    (2 grid - 1)^2 offsets, class to patch, patch to class, class to class; then text to picture, picture to text;
    then 2 text - 3 distances of the text and three again for its first token.
    """

    def __init__(self, grid: int, text: int, heads: int, layers: int) -> None:
        super().__init__()
        self.grid, self.text, self.heads, self.layers = grid, text, heads, layers
        self.offsets = (2 * grid - 1) ** 2 + 3
        rows = self.offsets + (2 + 2 * text if text else 0)
        self.table = nn.Parameter(torch.zeros(rows, layers * heads))
        self._indices: dict[tuple[int, int, torch.device], Tensor] = {}

    def forward(self, packing: Packing) -> list[list[Tensor]]:
        """For each layer, for each of ``packing.groups``: ``(heads, L, L)``, the picture in front of the text.

        The table is read once for all layers. Pictures must have grid * grid + 1 tokens, texts at most ``text``.
        """
        groups = []
        for group in packing.groups.list:
            if group.image not in (0, self.grid**2 + 1):
                raise ValueError(f"a picture has {group.image} tokens, the table is made for {self.grid**2 + 1}")
            if group.text > self.text:
                raise ValueError(f"a text has {group.text} tokens, the table is made for {self.text}")
            groups.append(self.pairwise(group.image > 0, group.text))
        return [list(layer) for layer in zip(*groups, strict=True)] if groups else [[] for _ in range(self.layers)]

    def pairwise(self, image: bool, text: int) -> tuple[Tensor, ...]:
        """Each layer's bias ``(heads, L, L)`` of a picture (if any) with a text of ``text`` tokens."""
        device = self.table.device
        key = (int(image), text, device)
        if key not in self._indices:
            index = relative_index(self.grid if image else 0, text, self.offsets, self.table.shape[0])
            self._indices[key] = torch.from_numpy(index).to(device)
        found = F.embedding(self._indices[key], self.table)  # (L, L, layers * heads)
        return found.permute(2, 0, 1).unflatten(0, (self.layers, self.heads)).unbind(0)


def image_index(grid: int) -> np.ndarray:
    """Rows of the table for the tokens of a picture, class token first; int64 ``(1 + grid^2, 1 + grid^2)``."""
    places = np.stack(np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")).reshape(2, -1)
    offset = places[:, :, None] - places[:, None, :] + grid - 1
    offsets = (2 * grid - 1) ** 2 + 3
    index = np.empty((grid**2 + 1,) * 2, dtype=np.int64)
    index[1:, 1:] = offset[0] * (2 * grid - 1) + offset[1]
    index[0, :], index[:, 0], index[0, 0] = offsets - 3, offsets - 2, offsets - 1
    return index


def relative_index(grid: int, text: int, offsets: int, rows: int) -> np.ndarray:
    """Rows of a table with ``rows`` rows, ``offsets`` of them for pictures; int64 ``(L, L)``, query by key.

    grid: patches a side, 0 for no picture; text: tokens of the text.
    """
    image = grid**2 + 1 if grid else 0
    index = np.empty((image + text,) * 2, dtype=np.int64)
    if image:
        index[:image, :image] = image_index(grid)
    if not text:
        return index
    longest = (rows - offsets - 2) // 2
    words = np.arange(text - 1)
    between = index[image:, image:]
    between[1:, 1:] = words[None, :] - words[:, None] + longest - 2 + offsets + 2
    between[0, :], between[:, 0], between[0, 0] = rows - 3, rows - 2, rows - 1
    index[image:, :image] = offsets
    index[:image, image:] = offsets + 1
    return index
