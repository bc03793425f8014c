"""The vision Transformer (Dosovitskiy et al. 2021) that CLIP, ALBEF, BLIP and CoCa share, by parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from imglish.data.images import ImageTransform
from imglish.nn.blocks import Activation, BlockConfig
from imglish.nn.embed import PatchEmbed
from imglish.nn.segments import Rows, Segments

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def check_channels(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Raises ``ValueError`` unless these are numbers of three channels, by the second of which can be divided."""
    if len(mean) != 3 or len(std) != 3 or not all(deviation > 0 for deviation in std):
        raise ValueError(f"mean {mean} and deviation {std}: expected three numbers each, deviations above 0")


@dataclass(frozen=True)
class ImageInput:
    """What a model expects of a picture: side in pixels, mean and standard deviation a channel (of 0..1 values).

    resize: how a picture becomes square in evaluation: "squash" the whole of it (ALBEF, BLIP), or "center", the
    centre of it (CLIP); crop: share of the sides, or with "center" of the shorter one, that stays;
    interpolation: of the resizing, with antialias.
    """

    size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize: Literal["squash", "center"] = "squash"
    crop: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is {self.crop}: the part of a picture that stays is a share in 0..1")
        check_channels(self.mean, self.std)

    def transform(self, crop_scale: tuple[float, float] | None = None, flip: bool = False) -> ImageTransform:
        """How a picture becomes such input; without ``crop_scale`` and ``flip`` as in evaluation."""
        return ImageTransform(self.size, self.resize, self.interpolation, self.crop, crop_scale, flip=flip)


@dataclass(frozen=True)
class VitConfig:
    """A vision Transformer; the defaults are ViT-B/16 as in ALBEF (DeiT), CLIP changes four of them.

    norm_before: LayerNorm in front of the first block (CLIP); norm_after: LayerNorm on the output tokens (False
    leaves it to the owner); patch_bias: CLIP's patch embedding has none; class_token: False leaves patches only;
    layer_scale: initial value, or None.
    """

    image: ImageInput = ImageInput()
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    activation: Activation = "gelu"
    patch_bias: bool = True
    norm_before: bool = False
    norm_after: bool = True
    class_token: bool = True
    layer_scale: float | None = None
    dropout: float = 0.0

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image.size // self.patch) ** 2 + self.class_token

    def build(self) -> VisionTransformer:
        return VisionTransformer(self)


class VisionTransformer(nn.Module):
    """Pictures to tokens, class token first. All pictures of a call have one size, so the packing is a free view."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        if config.image.size % config.patch:
            raise ValueError(f"image size {config.image.size} is not a multiple of patch size {config.patch}")
        self.config = config
        width = config.width
        image = config.image
        self.patch_embed = PatchEmbed(config.patch, width, image.mean, image.std, config.patch_bias, image.size)
        self.class_token = nn.Parameter(torch.zeros(width)) if config.class_token else None
        self.positions = nn.Parameter(torch.zeros(config.tokens, width))
        self.norm_before = nn.LayerNorm(width, eps=config.norm_eps) if config.norm_before else nn.Identity()
        block = BlockConfig(
            width=width,
            heads=config.heads,
            hidden=int(width * config.mlp_ratio),
            norm_eps=config.norm_eps,
            activation=config.activation,
            layer_scale=config.layer_scale,
            dropout=config.dropout,
        )
        self.blocks = nn.ModuleList(block.build() for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps) if config.norm_after else nn.Identity()
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` (uint8, or normalised floats) -> the rows of the first block, ``(B, L, D)``."""
        x = self.patch_embed(images)
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self.positions
        out: Tensor = self.norm_before(x)
        return out

    def forward(self, images: Tensor, class_only: bool = False) -> Tensor:
        """``(B, 3, H, W)`` -> tokens ``(B, L, D)``; ``class_only``: the class token alone, ``(B, D)``, whose last
        block computes that one row a picture."""
        if class_only and self.class_token is None:
            raise ValueError("this vision Transformer has no class token")
        x = self.embed(images)
        segments = Segments.equal(x.shape[0], x.shape[1])
        rows = x.flatten(0, 1)
        for block in self.blocks[:-1]:
            rows = block(rows, segments)
        read = Rows.first(segments, rows.device) if class_only else None
        rows = self.norm(self.blocks[-1](rows, segments, read=read))
        return rows if class_only else rows.unflatten(0, (segments.count, -1))
