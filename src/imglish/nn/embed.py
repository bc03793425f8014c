"""Embeddings: patches of a picture, words of a text, positions of both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import TextBatch
from imglish.data.patches import PatchBatch
from imglish.nn.segments import upload_floats, upload_index


class PatchEmbed(nn.Module):
    """Non-overlapping patches to vectors (Dosovitskiy et al. 2021, equation 1), as one matrix product.

    uint8 pictures are normalised here, on their device: ``(pixel / 255 - mean) / std``; floats pass as they are. size:
    pixels a side that all pictures must have (None: any multiple of the patch).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        patch: int,
        width: int,
        mean: Sequence[float],
        std: Sequence[float],
        bias: bool = True,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.patch, self.size = patch, size
        self.weight = nn.Parameter(torch.empty(width, 3, patch, patch))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.register_buffer("mean", torch.tensor(mean, device="cpu").view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std, device="cpu").view(3, 1, 1) * 255, persistent=False)
        nn.init.trunc_normal_(self.weight, std=0.02)

    def rows(self, pixels: Tensor) -> Tensor:
        """Patches ``(T, 3, patch, patch)`` that are cut already -> ``(T, width)``."""
        flat = normalise(pixels, self.mean, self.std, self.weight.dtype).flatten(1)
        return F.linear(flat, self.weight.flatten(1), self.bias)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, h * w, width)``; H and W must be multiples of the patch."""
        p = self.patch
        if self.size is not None and images.shape[2:] != (self.size, self.size):
            high, wide = images.shape[2:]
            raise ValueError(f"pictures of {wide} x {high} pixels: resize them to {self.size} x {self.size}")
        if images.shape[2] % p or images.shape[3] % p:
            raise ValueError(f"picture of {tuple(images.shape[2:])} pixels does not divide into {p}-pixel patches")
        pixels = normalise(images, self.mean, self.std, self.weight.dtype)
        grid = pixels.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B 3 h p w p
        flat = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(flat, self.weight.flatten(1), self.bias)


def normalise(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 ``(B, 3, H, W)`` to ``(pixel - mean) / std`` (mean, std in 0..255); floats change dtype only."""
    if images.dtype == torch.uint8:
        mean, std = mean.to(images.device), std.to(images.device)  # they are real also in a model made on "meta"
        return ((images.to(mean.dtype) - mean) / std).to(dtype)
    return images.to(dtype)


def resize_grid(table_LD: Tensor, grid: tuple[int, int], prefix: int = 1, antialias: bool = False) -> Tensor:
    """Positions learned on a square grid, resampled to another grid (bicubic, corners not aligned).

    table: ``(prefix + n * n, D)``; the first ``prefix`` rows (class token) are kept. Returns
    ``(prefix + grid[0] * grid[1], D)``. ALBEF and BLIP resample without antialias, open_clip with it.
    """
    head, body = table_LD[:prefix], table_LD[prefix:]
    side = math.isqrt(body.shape[0])
    if side * side != body.shape[0]:
        raise ValueError(f"{body.shape[0]} positions are not a square grid")
    if grid == (side, side):
        return table_LD
    image = body.T.reshape(1, -1, side, side)
    image = F.interpolate(image.float(), grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([head, image[0].flatten(1).T.to(body.dtype)])


def grid_positions(table_LD: Tensor, pictures: PatchBatch) -> Tensor:
    """Positions learned on a square grid, for pictures of any shapes: ``(n * n, D)`` -> ``(T, D)``, a row a patch.

    Bilinear with aligned corners (ViLT): the corner patches of every picture have the positions of the grid's corners.
    Each row is a weighted sum of four rows of the table, so all shapes of a batch are one call.
    """
    side = math.isqrt(table_LD.shape[0])
    if side * side != table_LD.shape[0]:
        raise ValueError(f"{table_LD.shape[0]} positions are not a square grid")
    corners, weights = [], []
    for place in pictures.places():
        at = place * (side - 1)
        low = np.floor(at).astype(np.int64)
        corners.append((low, np.minimum(low + 1, side - 1)))
        weights.append((1 - (at - low), at - low))
    rows = [down * side + across for down in corners[0] for across in corners[1]]
    shares = [down * across for down in weights[0] for across in weights[1]]
    index, share = upload_index(np.stack(rows, 1), table_LD.device), upload_floats(np.stack(shares, 1), table_LD.device)
    return F.embedding_bag(index, table_LD, mode="sum", per_sample_weights=share.to(table_LD.dtype))


def resize_line(table_LD: Tensor, length: int) -> Tensor:
    """Positions of a text ``(L, D)`` resampled linearly to ``(length, D)``, as open_clip does."""
    if table_LD.shape[0] == length:
        return table_LD
    resized = F.interpolate(table_LD.T[None].float(), length, mode="linear", align_corners=False)
    return resized[0].T.to(table_LD.dtype)


class BertEmbedding(nn.Module):
    """Word + position (+ token type) embeddings, LayerNorm, dropout (Devlin et al. 2019); ``(T,)`` -> ``(T, D)``.

    All texts are of token type 0, so of a checkpoint's two type vectors only the first is ever used; both are
    kept for exchange with the official files. ``types=0`` builds without them (BLIP), ``max_length=None`` without
    positions (a model whose attention knows them, VLMo).
    """

    def __init__(
        self, vocab_size: int, max_length: int | None, width: int, norm_eps: float, dropout: float, types: int = 2
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, width)
        self.positions = None if max_length is None else nn.Embedding(max_length, width)
        self.types = nn.Embedding(types, width) if types else None
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, texts: TextBatch, positions: Tensor | None = None) -> Tensor:
        """positions: int64 ``(T,)`` of the tokens, where the texts are continued; default: counted from each start."""
        x = self.words(texts.ids)
        if self.positions is not None:
            x = x + self.positions(self._counted(texts) if positions is None else positions)
        if self.types is not None:
            x = x + self.types.weight[0]
        out: Tensor = self.dropout(self.norm(x))
        return out

    def _counted(self, texts: TextBatch) -> Tensor:
        assert self.positions is not None
        if texts.segments.longest > self.positions.num_embeddings:
            raise ValueError(
                f"a text has {texts.segments.longest} tokens, the model takes {self.positions.num_embeddings}: "
                "tokenize with a smaller max_length"
            )
        return texts.segments.positions(texts.ids.device)


class MlmHead(nn.Module):
    """BERT's masked-language head: dense, GELU, LayerNorm, then an output matrix (BERT: the word embeddings) + bias."""

    def __init__(self, width: int, vocab_size: int, norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, rows_MD: Tensor, words: Tensor) -> Tensor:
        """``(M, D)`` rows and the output matrix ``(V, D)`` -> logits ``(M, V)``. Give it masked rows only."""
        return F.linear(self.norm(F.gelu(self.dense(rows_MD))), words, self.bias)
