"""Relative positions as learned biases of the attention scores (BEiT, section 2.3; VLMo, section 3.1).

The picture's patches have one bias for each offset on the grid, the text's tokens one for each distance; class tokens
have their own, and so have text to picture and picture to text, which know no distance.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.nn.packing import Packing


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
        return found.permute(2, 0, 1).contiguous().unflatten(0, (self.layers, self.heads)).unbind(0)


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


def resize_relative(table: Tensor, before: int, after: int) -> Tensor:
    """A table made for ``before`` patches a side for ``after``, ``(rows, columns)`` -> ``(other rows, columns)``.

    Offsets are laid out on a geometric progression, finer near zero, such that the old ones reach as far as the new
    ones, and the cubic spline through the old values is read at the new offsets (BEiT's code; Dong et al. 2022 do the
    same). The last rows, of class tokens and texts, stay.
    """
    old, new = 2 * before - 1, 2 * after - 1
    if old == new:
        return table
    places = _progression(before, after)
    weights = spline_matrix(places, np.arange(new) - new // 2)
    image = table[: old * old].double().cpu().numpy().reshape(old, old, -1)
    grown = np.einsum("yi,xj,ijc->yxc", weights, weights, image).reshape(new * new, -1)
    return torch.cat([torch.from_numpy(grown).to(table), table[old * old :]])


def _progression(before: int, after: int) -> np.ndarray:
    """Where the old offsets lie among the new ones: symmetric, steps growing by one factor, the last at after // 2
    of the new table's width or just above; float64 ``(2 before - 1,)``."""
    reach = (2 * after - 1) // 2.0
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        factor = (low + high) / 2
        total = (1 - factor ** (before - 1)) / (1 - factor) if before > 1 else 0.0
        low, high = (low, factor) if total > reach else (factor, high)
    steps = np.cumsum(factor ** np.arange(before - 1))
    return np.concatenate([-steps[::-1], [0.0], steps])


def spline_matrix(places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Weights ``(wanted, places)`` that read the cubic spline through values at ``places`` (ascending, at least 4).

    The spline has continuous third derivatives at the second and the last but one place ("not a knot"), as
    interpolating B-splines have; outside of ``places`` it keeps its end values.
    """
    n = len(places)
    h = np.diff(places)
    identity = np.eye(n)
    slopes = np.diff(identity, axis=0) / h[:, None]
    system, right = np.zeros((n, n)), np.zeros((n, n))  # second derivatives at the places
    for i in range(1, n - 1):
        system[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        right[i] = 6 * (slopes[i] - slopes[i - 1])
    system[0, :3] = h[1], -(h[0] + h[1]), h[0]
    system[-1, -3:] = h[-1], -(h[-2] + h[-1]), h[-2]
    second = np.linalg.solve(system, right)
    x = np.clip(wanted, places[0], places[-1])
    i = np.clip(np.searchsorted(places, x, side="right") - 1, 0, n - 2)
    left, rest, width = (x - places[i])[:, None], (places[i + 1] - x)[:, None], h[i][:, None]
    ends = identity[i] * rest / width + identity[i + 1] * left / width
    bend = second[i] * (rest**3 / width - rest * width) + second[i + 1] * (left**3 / width - left * width)
    matrix: np.ndarray = ends + bend / 6
    return matrix
