"""The modified ResNet of CLIP (Radford et al. 2021, section 2.4): three-convolution stem, average pooling in front of
every stride (Zhang 2019), and attention pooling in place of the global average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.nn.embed import normalise

EXPANSION = 4
STRIDE = 32
"""Pixels a side of the picture per cell of the last feature map."""


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a residual; ``(B, inputs, H, W)`` -> ``(B, 4 width, H / stride, W / stride)``."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = width * EXPANSION
        self.conv1, self.bn1 = _convolution(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _convolution(width, width, 3), nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = _convolution(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            average = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
            self.shortcut = nn.Sequential(average, _convolution(inputs, outputs, 1), nn.BatchNorm2d(outputs))
        nn.init.zeros_(self.bn3.weight)  # every block starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = self.pool(F.relu(self.bn2(self.conv2(h)), inplace=True))
        return F.relu(self.bn3(self.conv3(h)) + self.shortcut(x), inplace=True)


class AttentionPool(nn.Module):
    """One head-wise attention whose only query is the mean of all cells; ``(B, C, h, w)`` -> ``(B, outputs)``."""

    def __init__(self, width: int, heads: int, outputs: int, cells: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} of the last feature map is not a multiple of {heads} heads")
        self.heads = heads
        self.positions = nn.Parameter(torch.empty(cells + 1, width).normal_(std=width**-0.5))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, outputs)
        for layer in (self.q, self.kv, self.out):
            nn.init.normal_(layer.weight, std=width**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        cells = x.flatten(2).transpose(1, 2)
        if cells.shape[1] + 1 != self.positions.shape[0]:
            raise ValueError(
                f"pictures give {cells.shape[1]} cells, the model has positions for {self.positions.shape[0] - 1}: "
                "resize them to the model's image size"
            )
        tokens = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1) + self.positions  # B 1+hw C
        q = self.q(tokens[:, :1]).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(2, (2, self.heads, -1)).transpose(1, 3).unbind(2)
        pooled: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))
        return pooled


class ModifiedResNet(nn.Module):
    """Pictures to one vector: stem, four stages, attention pooling.

    layers: blocks of each stage; width: channels after the stem (64 in RN50); uint8 pictures are normalised by
    ``mean`` and ``std`` (of 0..1 values), floats pass as they are. In training mode batch norm uses the statistics
    of this rank's batch.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        layers: Sequence[int],
        width: int,
        heads: int,
        outputs: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        half = width // 2
        convolutions = (_convolution(3, half, 3, stride=2), _convolution(half, half, 3), _convolution(half, width, 3))
        pieces = [(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True)) for conv in convolutions]
        self.stem = nn.Sequential(*(module for piece in pieces for module in piece), nn.AvgPool2d(2))
        inputs, stages = width, []
        for number, count in enumerate(layers):
            outer, stride = width * 2**number, 1 if number == 0 else 2
            blocks = [Bottleneck(inputs, outer, stride)]
            inputs = outer * EXPANSION
            blocks += [Bottleneck(inputs, outer) for _ in range(count - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.pool = AttentionPool(inputs, heads, outputs, cells=(image_size // STRIDE) ** 2)
        self.register_buffer("mean", torch.tensor(mean, device="cpu").view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std, device="cpu").view(3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, outputs)``."""
        first = self.stem[0]
        assert isinstance(first, nn.Conv2d)
        x = self.stem(normalise(images, self.mean, self.std, first.weight.dtype))
        for stage in self.stages:
            x = stage(x)
        pooled: Tensor = self.pool(x)
        return pooled
