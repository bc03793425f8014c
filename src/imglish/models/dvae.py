"""The discrete VAE of DALL-E (Ramesh et al. 2021, section 2.1 and appendix A): pictures as codes of a vocabulary.

picture -> convolutions -> logits over codes, one vector a cell -> Gumbel softmax -> convolutions -> picture
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import Batch
from imglish.models.vit import ImageInput
from imglish.nn.embed import normalise
from imglish.objectives.codes import code_usage, kl_to_uniform, logit_laplace, map_pixels, unmap_pixels, untold

PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # mean and deviation that leave pixels in 0..1


@dataclass(frozen=True)
class DVaeConfig:
    """Sizes and objective; the defaults are DALL-E's tokenizer (8 pixels a cell, 8192 codes).

    width: channels at full resolution, doubled by each of ``groups`` groups of ``blocks`` blocks, between which the
    resolution halves; start: channels that the decoder makes of a code; temperature: of the Gumbel softmax at the
    start and after ``anneal_epochs``; kl_weight: of each cell's divergence from even probabilities (beta), reached
    after ``kl_epochs``. Both change along half a cosine. information: weight of what codes do not tell about
    pictures at their places (0 as published; with small data and few steps they collapse to a handful without it).
    """

    image: ImageInput = field(default_factory=lambda: ImageInput(256, *PLAIN))
    codes: int = 8192
    width: int = 256
    start: int = 128
    groups: int = 4
    blocks: int = 2
    temperature: tuple[float, float] = (1.0, 1 / 16)
    anneal_epochs: float = 10.0
    kl_weight: float = 6.6
    kl_epochs: float = 1.0
    information: float = 0.0

    family: ClassVar[str] = "dvae"

    @property
    def cell(self) -> int:
        """Side in pixels of the square that one code stands for."""
        return int(2 ** (self.groups - 1))

    @property
    def grid(self) -> int:
        """Codes a side of the picture."""
        return self.image.size // self.cell

    def __post_init__(self) -> None:
        if self.width % 4:
            raise ValueError(f"width is {self.width}; blocks are a quarter as wide inside, so give a multiple of 4")
        if self.image.size % self.cell:
            raise ValueError(f"image.size {self.image.size} is not a multiple of a code's {self.cell} pixels")
        if min(self.temperature) <= 0 or min(self.anneal_epochs, self.kl_epochs) < 0:
            raise ValueError("temperatures must be positive, anneal_epochs and kl_epochs not negative")

    def build(self) -> DVae:
        return DVae(self)


class ConvBlock(nn.Module):
    """Residual block of four convolutions behind ReLUs, a quarter as wide inside; ``(B, C, H, W)``.

    The 1 x 1 convolution comes last in the encoder and first in the decoder. gain: factor of the branch, 1 / layers².
    """

    def __init__(self, inputs: int, outputs: int, gain: float, narrow_first: bool) -> None:
        super().__init__()
        hidden, self.gain = outputs // 4, gain
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        sizes = (1, 3, 3, 3) if narrow_first else (3, 3, 3, 1)
        channels = (inputs, hidden, hidden, hidden, outputs)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], k, padding=k // 2) for i, k in enumerate(sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv in self.convs:
            h = conv(F.relu(h))
        out: Tensor = self.shortcut(x) + self.gain * h
        return out


class DVae(nn.Module):
    """Turns pictures into codes and back; ``losses`` is one training step."""

    family = "dvae"
    mean: Tensor
    std: Tensor

    def __init__(self, config: DVaeConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * 2**i for i in range(config.groups)]
        gain = 1 / (config.groups * config.blocks) ** 2

        def groups(first: int, outputs: list[int], narrow_first: bool) -> Iterator[nn.Module]:
            for out in outputs:
                yield nn.ModuleList(
                    ConvBlock(first if i == 0 else out, out, gain, narrow_first) for i in range(config.blocks)
                )
                first = out

        self.read_pixels = nn.Conv2d(3, config.width, 7, padding=3)
        self.encoder = nn.ModuleList(groups(config.width, widths, narrow_first=False))
        self.to_codes = nn.Conv2d(widths[-1], config.codes, 1)
        self.from_codes = nn.Conv2d(config.codes, config.start, 1)
        self.decoder = nn.ModuleList(groups(config.start, widths[::-1], narrow_first=True))
        self.write_pixels = nn.Conv2d(config.width, 6, 1)
        self.register_buffer(
            "mean", torch.tensor(config.image.mean, device="cpu").view(3, 1, 1) * 255, persistent=False
        )
        self.register_buffer("std", torch.tensor(config.image.std, device="cpu").view(3, 1, 1) * 255, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.constant_(cast(Tensor, module.bias), 0.0)

    def make_teacher(self) -> Annealing:
        """What changes while the tokenizer trains: temperature and weight of the divergence."""
        return Annealing(self.config)

    # ---- codes ----------------------------------------------------------------------------------------------------

    @property
    def codes(self) -> int:
        """Size of the vocabulary."""
        return self.config.codes

    @torch.no_grad()
    def tokenize(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pictures uint8 ``(B, 3, H, W)`` -> the likeliest code of each cell, int64 ``(B, rows * columns)``.

        The pictures are resized so that they have ``grid`` cells: the published use is 112 pixels for 14 x 14.
        """
        pixels = resize(images, (grid[0] * self.config.cell, grid[1] * self.config.cell))
        return self.encode(pixels).argmax(1).flatten(1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in 0..1, ``(B, 3, H, W)`` -> logits over codes ``(B, K, h, w)``."""
        x = self.read_pixels(map_pixels(pixels))
        for i, group in enumerate(self.encoder):
            x = F.max_pool2d(x, 2) if i else x
            for block in group:  # type: ignore[attr-defined]
                x = block(x)
        logits: Tensor = self.to_codes(F.relu(x))
        return logits

    def decode(self, codes: Tensor) -> Tensor:
        """Weights over codes ``(B, K, h, w)``, one-hot or soft -> mean and log scale of pixels, ``(B, 6, H, W)``."""
        x = self.from_codes(codes)
        for i, group in enumerate(self.decoder):
            x = F.interpolate(x, scale_factor=2) if i else x
            for block in group:  # type: ignore[attr-defined]
                x = block(x)
        stats: Tensor = self.write_pixels(F.relu(x))
        return stats

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Pictures ``(B, 3, H, W)`` uint8 -> what their codes keep of them, floats in 0..1 of the same size."""
        pixels = self._pixels(images)
        chosen = F.one_hot(self.encode(pixels).argmax(1), self.codes).permute(0, 3, 1, 2)
        return unmap_pixels(torch.sigmoid(self.decode(chosen.to(pixels.dtype))[:, :3]))

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, teacher: Annealing | None = None, feature_grads: Any = None) -> dict[str, Tensor]:
        return self.losses(batch, teacher)

    def losses(self, batch: Batch, teacher: Annealing | None = None, feature_grads: Any = None) -> dict[str, Tensor]:
        """Reconstruction and divergence of the relaxed ELBO, both in nats a pixel value; texts are not looked at.

        The divergence is summed over cells and shared among the pixels of each, so that ``kl_weight`` is the beta of
        the paper whatever the sizes.
        """
        if teacher is None:
            raise ValueError("the temperature follows the progress of training: pass model.make_teacher()")
        if not isinstance(batch.images, Tensor):
            raise ValueError("a visual tokenizer trains on pictures of one size")
        pixels = self._pixels(batch.images)
        logits = self.encode(pixels).float()
        soft = F.gumbel_softmax(logits, tau=teacher.temperature, dim=1)
        mean, log_scale = self.decode(soft.to(pixels.dtype)).float().chunk(2, dim=1)
        values = 3 * self.config.cell**2  # of one cell
        losses = {
            "reconstruction": logit_laplace(map_pixels(pixels.float()), mean, log_scale),
            "divergence": teacher.kl_weight * kl_to_uniform(logits) / values,
            "metric/code_usage": code_usage(logits.detach().argmax(1), self.codes),
            "metric/pixel_error": (unmap_pixels(torch.sigmoid(mean)) - pixels).abs().mean().detach(),
        }
        if self.config.information > 0:
            losses["untold"] = self.config.information * untold(logits)
        return losses

    def _pixels(self, images: Tensor) -> Tensor:
        return normalise(images, self.mean, self.std, self.mean.dtype)


class Annealing:
    """Temperature of the Gumbel softmax and weight of the divergence, set by the progress of training."""

    def __init__(self, config: DVaeConfig) -> None:
        self.config = config
        self.at(0.0)

    def at(self, epochs: float) -> None:
        """Set both for a progress of ``epochs`` (fractional) since the start of training."""
        config = self.config
        first, last = config.temperature
        self.temperature = last + (first - last) * (1 - _along(epochs, config.anneal_epochs))
        self.kl_weight = config.kl_weight * _along(epochs, config.kl_epochs)

    def update(self, model: nn.Module) -> None:
        """Nothing is learned from the step."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: :meth:`at` is called before every step."""


def _along(epochs: float, whole: float) -> float:
    """From 0 to 1 along half a cosine over ``whole`` epochs."""
    return 0.5 * (1 - math.cos(math.pi * min(1.0, epochs / whole))) if whole > 0 else 1.0


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures uint8 ``(B, 3, H, W)`` -> floats in 0..1 of ``size``, bilinear, antialiased.

    A visual tokenizer reads pictures in a size and normalisation of its own, so it is given pixels as they are.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"a visual tokenizer reads uint8 pixels, not {images.dtype} ones normalised for another model")
    pixels = images.float() / 255
    if tuple(pixels.shape[2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


def dvae_base() -> DVaeConfig:
    """The published tokenizer."""
    return DVaeConfig()


def dvae_small() -> DVaeConfig:
    """256 codes of 8 x 8 pixels at 40 px, the size at which BEiT-small (80 px, 5 x 5 patches) has them, for CPUs.

    In a run of a thousand steps a temperature that falls to the published 1/16 makes codes noise for the decoder, and
    the codebook shrinks to a dozen codes.
    """
    return DVaeConfig(
        ImageInput(40, *PLAIN),
        codes=256,
        width=32,
        start=64,
        blocks=1,
        temperature=(1.0, 0.4),
        anneal_epochs=6.0,
        kl_weight=0.0,
        information=0.5,
    )


def dvae_tiny() -> DVaeConfig:
    """For tests."""
    return DVaeConfig(ImageInput(48, *PLAIN), codes=64, width=8, start=16, blocks=1, anneal_epochs=2, information=0.2)


CONFIGS = {"dvae-base": dvae_base, "dvae-small": dvae_small, "dvae-tiny": dvae_tiny}
