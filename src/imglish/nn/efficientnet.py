"""EfficientNet (Tan & Le 2019): inverted bottlenecks with depthwise convolutions, widened and deepened together.

The image tower of ALIGN and WenLan. Padding is TensorFlow's "same", as in the published networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.nn.embed import normalise

# stage of B0 (table 1): blocks, kernel, stride, expansion, channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM = 32
EPS, MOMENTUM = 1e-3, 0.01


def channels(count: int, factor: float) -> int:
    """``count`` times the width factor, rounded to a multiple of 8 that is at least 90 % of it."""
    wanted = count * factor
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


class _Convolution(nn.Module):
    """Convolution with "same" padding, batch norm, and swish unless ``linear``."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.linear = kernel, stride, linear
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=EPS, momentum=MOMENTUM)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel > 1:
            (top, bottom), (left, right) = (self._same(side) for side in x.shape[2:])
            x = F.pad(x, (left, right, top, bottom))
        x = self.norm(self.conv(x))
        return x if self.linear else F.silu(x)

    def _same(self, side: int) -> tuple[int, int]:
        """Padding with which ``side`` cells become ceil(side / stride), the odd one behind."""
        total = max((math.ceil(side / self.stride) - 1) * self.stride + self.kernel - side, 0)
        return total // 2, total - total // 2


class _SqueezeExcite(nn.Module):
    """A gate for each channel, made of the means of all channels (Hu et al. 2018)."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, width, 1)
        for layer in (self.reduce, self.expand):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return x * gate


class InvertedBottleneck(nn.Module):
    """Widen, convolve each channel by itself, gate, narrow; with a residual where nothing changes its shape."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.widen = _Convolution(inputs, width) if expansion > 1 else nn.Identity()
        self.depthwise = _Convolution(width, width, kernel, stride, groups=width)
        self.gate = _SqueezeExcite(width, max(1, inputs // 4))
        self.narrow = _Convolution(width, outputs, linear=True)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.narrow(self.gate(self.depthwise(self.widen(x))))
        return x + out if self.residual else out


class EfficientNet(nn.Module):
    """Pictures to one vector: stem, seven stages, perhaps a last convolution, mean over all cells.

    width_factor, depth_factor: of channels and of blocks, 1 and 1 in B0, 2.0 and 3.1 in B7; top: channels of a last
    1x1 convolution before they are widened (1280 as published), or None. ``outputs``: width of the vector. uint8
    pictures are normalised by ``mean`` and ``std``. In training mode batch norm uses this rank's batch.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        width_factor: float,
        depth_factor: float,
        top: int | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        inputs = channels(STEM, width_factor)
        self.stem = _Convolution(3, inputs, 3, 2)
        blocks: list[nn.Module] = []
        for count, kernel, stride, expansion, width in STAGES:
            outputs = channels(width, width_factor)
            for number in range(math.ceil(count * depth_factor)):
                blocks.append(InvertedBottleneck(inputs, outputs, kernel, stride if number == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.outputs = inputs if top is None else channels(top, width_factor)
        self.top = nn.Identity() if top is None else _Convolution(inputs, self.outputs)
        self.register_buffer("mean", torch.tensor(mean, device="cpu").view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std, device="cpu").view(3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` of any size -> ``(B, outputs)``."""
        pixels = normalise(images, self.mean, self.std, self.stem.conv.weight.dtype)
        cells: Tensor = self.top(self.blocks(self.stem(pixels)))
        return cells.mean((2, 3))
