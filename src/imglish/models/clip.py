"""CLIP (Radford et al. 2021): an image tower and a text tower that meet in a dot product; SigLIP is a setting of it.

picture -> ViT or ResNet -> one vector --+
                                         +--> similarity of every picture with every text -> ITC, sigmoid or hinges
text    -> Transformer   -> one vector --+

Older dual encoders with other towers or a momentum teacher are settings too: see :mod:`imglish.models.dual`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import Batch, TextBatch
from imglish.models.capabilities import Embedded, EncodedImages, EncodedTexts
from imglish.models.text_towers import BertConfig, BertTower, GruConfig, GruTower, TextConfig, TextTower
from imglish.models.vit import ImageInput, VisionTransformer, VitConfig
from imglish.nn.blocks import Activation, Block
from imglish.nn.efficientnet import EfficientNet
from imglish.nn.pool import LatentPool
from imglish.nn.resnet import ModifiedResNet
from imglish.objectives.itc import hinge_loss, itc_loss, siglip_loss
from imglish.objectives.momentum import MomentumTeacher, TeacherConfig, distilled_itc


@dataclass(frozen=True)
class ResNetConfig:
    """The modified ResNet; the defaults are RN50's. heads: of the attention pooling, whose width is 32 x ``width``."""

    image: ImageInput = field(default_factory=lambda: ImageInput(resize="center"))
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    width: int = 64
    heads: int = 32


@dataclass(frozen=True)
class EfficientNetConfig:
    """An EfficientNet, whose defaults are B0. width_factor, depth_factor: 2.0 and 3.1 in B7; top: channels of the last
    convolution, which is widened too, or None."""

    image: ImageInput = field(default_factory=lambda: ImageInput(resize="center"))
    width_factor: float = 1.0
    depth_factor: float = 1.0
    top: int | None = 1280


def clip_vit(
    image_size: int, patch: int, width: int, depth: int, heads: int, activation: Activation = "quick_gelu"
) -> VitConfig:
    """CLIP's variant of the vision Transformer: LayerNorm in front of the first block, no bias on the patches."""
    return VitConfig(
        image=ImageInput(image_size, resize="center"),
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        norm_eps=1e-5,
        activation=activation,
        patch_bias=False,
        norm_before=True,
    )


@dataclass(frozen=True)
class ClipConfig:
    """Sizes and objective; the defaults are ViT-B/32 as published.

    pool: the class token, the mean of the patches, or attention pooling by a learned query ("map"); a vision config
    with ``norm_after=False`` gets its last LayerNorm behind the pooling. image_projection: False leaves the pooled
    vector as it is. loss: "itc" (InfoNCE), "siglip" (sigmoid) or "hinge" (VSE++, with ``margin``). hardest: share
    of the hardest negative in the hinge loss (all of it in VSE++), the rest is the sum over all negatives. temperature:
    initial, learned; logit_bias: initial bias on the logits, learned, or None. chunk: rows of the similarity matrix
    computed at a time (None: all), so that memory does not grow with the square of the batch. teacher: momentum
    copies of both towers with a queue, whose features the ITC then compares with (WenLan), or None.
    """

    vision: VitConfig | ResNetConfig | EfficientNetConfig = field(
        default_factory=lambda: clip_vit(224, 32, 768, 12, 12)
    )
    text: TextConfig | BertConfig | GruConfig = field(default_factory=TextConfig)
    vocab_size: int = 49408
    max_length: int = 77
    embed_dim: int = 512
    pool: Literal["class", "mean", "map"] = "class"
    image_projection: bool = True
    loss: Literal["itc", "siglip", "hinge"] = "itc"
    temperature: float = 0.07
    logit_bias: float | None = None
    margin: float = 0.2
    hardest: float = 1.0
    chunk: int | None = 512
    teacher: TeacherConfig | None = None

    family: ClassVar[str] = "clip"

    @property
    def image(self) -> ImageInput:
        return self.vision.image

    @property
    def several_captions(self) -> bool:
        """Whether a batch may have several captions a picture."""
        return self.teacher is None

    def __post_init__(self) -> None:
        if isinstance(self.vision, VitConfig):
            if self.pool == "class" and not self.vision.class_token:
                raise ValueError('pool="class" needs vision.class_token=true')
            if not self.image_projection and self.vision.width != self.embed_dim:
                raise ValueError(f"without projection, vision.width {self.vision.width} must be embed_dim")
        if self.text.projection == "none" and self.text.width != self.embed_dim:
            raise ValueError(f"without projection, text.width {self.text.width} must be embed_dim {self.embed_dim}")
        if isinstance(self.text, TextConfig) and self.text.pool == "last" and not self.text.padded:
            raise ValueError('text.pool="last" is the last row of padded texts; unpadded texts end at "end"')
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, it must be positive")
        if not 0 <= self.hardest <= 1:
            raise ValueError(f"hardest is {self.hardest}, a share between 0 and 1")
        if self.teacher is not None and self.loss != "itc":
            raise ValueError(f'a momentum teacher goes with loss="itc", not with {self.loss!r}')

    def build(self) -> Clip:
        return Clip(self)


class Clip(nn.Module):
    """Encodes pictures and texts into one space; ``losses`` is one training step."""

    family = "clip"

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        vision = config.vision
        self.vision: VisionTransformer | ModifiedResNet | EfficientNet
        self.image_pool: nn.Module = nn.Identity()
        self.image_norm: nn.Module = nn.Identity()
        self.image_proj: nn.Module = nn.Identity()
        if isinstance(vision, VitConfig):
            self.vision = vision.build()
            if config.pool == "map":
                hidden = int(vision.width * vision.mlp_ratio)
                self.image_pool = LatentPool(vision.width, vision.heads, hidden, vision.norm_eps, vision.activation)
            if not vision.norm_after:
                self.image_norm = nn.LayerNorm(vision.width, eps=vision.norm_eps)
            if config.image_projection:
                self.image_proj = nn.Linear(vision.width, config.embed_dim, bias=False)
        elif isinstance(vision, EfficientNetConfig):
            image = vision.image
            self.vision = EfficientNet(vision.width_factor, vision.depth_factor, vision.top, image.mean, image.std)
            if config.image_projection:
                self.image_proj = nn.Linear(self.vision.outputs, config.embed_dim)
            elif self.vision.outputs != config.embed_dim:
                raise ValueError(f"without projection, embed_dim must be the tower's {self.vision.outputs}")
        else:  # the attention pooling of the ResNet projects already
            image = vision.image
            self.vision = ModifiedResNet(
                vision.layers, vision.width, vision.heads, config.embed_dim, image.size, image.mean, image.std
            )
        self.text: TextTower | BertTower | GruTower = config.text.build(config.vocab_size, config.max_length)
        self.text_proj: nn.Module = nn.Identity()
        if config.text.projection != "none":
            self.text_proj = nn.Linear(config.text.width, config.embed_dim, bias=config.text.projection == "bias")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias)) if config.logit_bias is not None else None
        _init(self)

    def make_teacher(self) -> MomentumTeacher[Clip] | None:
        """The momentum copy with its queue, where the configuration has one; CLIP has none."""
        teacher = self.config.teacher
        return None if teacher is None else MomentumTeacher(self, teacher, self.config.embed_dim)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the logit scale at most 100 (section 2.5); the trainer calls it after each step."""
        self.logit_scale.clamp_(0, math.log(100))

    # ---- encoders -------------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> EncodedImages:
        """``(B, 3, H, W)`` uint8 or normalised -> L2-normalised features ``(B, E)``, float32."""
        return EncodedImages(F.normalize(self.project_image(images).float(), dim=-1))

    def encode_texts(self, texts: TextBatch) -> EncodedTexts:
        """Packed texts, each up to its end token -> L2-normalised features ``(N, E)``, float32."""
        return EncodedTexts(F.normalize(self.project_text(texts).float(), dim=-1), texts.segments)

    def project_image(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> ``(B, E)`` before normalisation."""
        if not isinstance(self.vision, VisionTransformer):
            pooled = self.vision(images)
        elif self.config.pool == "class":
            pooled = self.vision(images, class_only=True)
        elif self.config.pool == "map":
            pooled = self.image_pool(self.vision(images))
        else:
            pooled = self.vision(images)[:, int(self.vision.config.class_token) :].mean(dim=1)
        projected: Tensor = self.image_proj(self.image_norm(pooled))
        return projected

    def project_text(self, texts: TextBatch) -> Tensor:
        """Packed texts -> ``(N, E)`` before normalisation."""
        projected: Tensor = self.text_proj(self.text.pooled(texts))
        return projected

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, teacher: Any = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]:
        return self.losses(batch, teacher, feature_grads)

    def embed(self, batch: Batch, teacher: Any = None) -> Embedded:
        """Features of both towers, and of the teacher's where there is one."""
        image, text = self.encode_images(batch.squares).features, self.encode_texts(batch.texts).features
        if self.config.teacher is None:
            return Embedded(image, text, batch.image_ids)
        with torch.no_grad():
            theirs = _needed(teacher).model
            image_m, text_m = theirs.encode_images(batch.squares), theirs.encode_texts(batch.texts)
        return Embedded(image, text, batch.image_ids, image_m.features, text_m.features)

    def contrast(self, embedded: Embedded, teacher: Any = None) -> dict[str, Tensor]:
        """The contrastive loss over the batch of all ranks; captions of one picture are positives of each other."""
        image, text, ids = embedded.image, embedded.text, embedded.image_ids
        scale, config = self.logit_scale.exp(), self.config
        if config.teacher is not None:
            found = distilled_itc(image, text, *embedded.momentum(), ids, 1 / scale, _needed(teacher))
            return {"itc": found.loss, "metric/logit_scale": scale.detach()}
        if config.loss == "itc":
            return {"itc": itc_loss(image, text, scale, ids, config.chunk), "metric/logit_scale": scale.detach()}
        if config.loss == "siglip":
            loss = siglip_loss(image, text, scale, self.logit_bias, ids, config.chunk)
            return {"siglip": loss, "metric/logit_scale": scale.detach()}
        return {"hinge": hinge_loss(image, text, config.margin, config.hardest, ids)}

    def losses(self, batch: Batch, teacher: Any = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]:
        """One training step's loss; with ``feature_grads`` a surrogate with these gradients (exact accumulation)."""
        embedded = self.embed(batch, teacher)
        return self.contrast(embedded, teacher) if feature_grads is None else embedded.surrogate(feature_grads)


def _needed(teacher: MomentumTeacher[Clip] | None) -> MomentumTeacher[Clip]:
    if teacher is None:
        raise ValueError("this configuration trains with its momentum teacher: pass model.make_teacher()")
    return teacher


@torch.no_grad()
def _init(model: Clip) -> None:
    """CLIP's initial weights (their section 2.5 and code) for both Transformers; other towers make their own."""
    towers: list[tuple[nn.ModuleList, int]] = []
    if isinstance(model.text, TextTower):
        towers.append((model.text.blocks, model.config.text.width))
        nn.init.normal_(model.text.words.weight, std=0.02)
        nn.init.normal_(model.text.positions, std=0.01)
    if isinstance(model.vision, VisionTransformer):
        width = model.vision.config.width
        towers.append((model.vision.blocks, width))
        nn.init.normal_(model.vision.positions, std=width**-0.5)
        if model.vision.class_token is not None:
            nn.init.normal_(model.vision.class_token, std=width**-0.5)
    for blocks, width in towers:
        residual = width**-0.5 * (2 * len(blocks)) ** -0.5
        for block in blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.out.weight, std=residual)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=residual)
            for layer in (block.attn.qkv, block.attn.out, block.mlp.fc1, block.mlp.fc2):
                nn.init.zeros_(layer.bias)
    for proj in (model.image_proj, model.text_proj):
        if isinstance(proj, nn.Linear):
            nn.init.normal_(proj.weight, std=proj.in_features**-0.5)
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)


# ---- named sizes --------------------------------------------------------------------------------------------------


def _clip(
    image: tuple[int, int, int, int, int] | ResNetConfig,
    text: tuple[int, int, int],
    embed_dim: int,
    activation: Activation = "quick_gelu",
    mlp_ratio: float = 4.0,
) -> ClipConfig:
    """image: (size, patch, width, depth, heads) or a ResNet; text: (width, depth, heads)."""
    vision: VitConfig | ResNetConfig
    if isinstance(image, ResNetConfig):
        vision = image
    else:
        vision = replace(clip_vit(*image, activation=activation), mlp_ratio=mlp_ratio)
    width, depth, heads = text
    return ClipConfig(vision, TextConfig(width, depth, heads, activation=activation), embed_dim=embed_dim)


def _resnet(layers: tuple[int, int, int, int], size: int, width: int, text: int, embed_dim: int) -> ClipConfig:
    vision = ResNetConfig(ImageInput(size, resize="center"), layers, width, heads=width * 32 // 64)
    return _clip(vision, (text, 12, text // 64), embed_dim)


def siglip_b_16() -> ClipConfig:
    """SigLIP ViT-B/16 at 224 px (Zhai et al. 2023) as open_clip and timm build it: 203.2 M parameters."""
    half = (0.5, 0.5, 0.5)
    return ClipConfig(
        vision=VitConfig(image=ImageInput(224, half, half), class_token=False),
        text=TextConfig(
            width=768,
            heads=12,
            norm_eps=1e-6,
            activation="gelu",
            causal=False,
            pool="last",
            padded=True,
            pad_id=1,
            projection="bias",
        ),
        vocab_size=32000,
        max_length=64,
        embed_dim=768,
        pool="map",
        image_projection=False,
        loss="siglip",
        temperature=0.1,
        logit_bias=-10.0,
    )


def clip_small() -> ClipConfig:
    """4.6 M parameters (4,000 words), for thousands of real photographs and CPUs."""
    vision = clip_vit(80, 16, 192, 4, 3, activation="gelu")
    text = TextConfig(192, 4, 3, activation="gelu")
    return ClipConfig(vision, text, vocab_size=4000, max_length=64, embed_dim=128)


def clip_tiny() -> ClipConfig:
    """For tests: seconds on one core."""
    vision = clip_vit(48, 8, 64, 3, 4, activation="gelu")
    text = TextConfig(64, 2, 4, activation="gelu")
    return ClipConfig(vision, text, vocab_size=500, max_length=48, embed_dim=64)


CONFIGS: dict[str, Callable[[], ClipConfig]] = {
    "clip-vit-b-32": lambda: _clip((224, 32, 768, 12, 12), (512, 12, 8), 512),
    "clip-vit-b-16": lambda: _clip((224, 16, 768, 12, 12), (512, 12, 8), 512),
    "clip-vit-l-14": lambda: _clip((224, 14, 1024, 24, 16), (768, 12, 12), 768),
    "clip-vit-l-14-336": lambda: _clip((336, 14, 1024, 24, 16), (768, 12, 12), 768),
    "clip-rn50": lambda: _resnet((3, 4, 6, 3), 224, 64, 512, 1024),
    "clip-rn101": lambda: _resnet((3, 4, 23, 3), 224, 64, 512, 512),
    "clip-rn50x4": lambda: _resnet((4, 6, 10, 6), 288, 80, 640, 640),
    "clip-rn50x16": lambda: _resnet((6, 8, 18, 8), 384, 96, 768, 768),
    "clip-rn50x64": lambda: _resnet((3, 15, 36, 10), 448, 128, 1024, 1024),
    # open_clip's own models: GELU, larger towers
    "openclip-vit-b-32": lambda: _clip((224, 32, 768, 12, 12), (512, 12, 8), 512, "gelu"),
    "openclip-vit-b-16": lambda: _clip((224, 16, 768, 12, 12), (512, 12, 8), 512, "gelu"),
    "openclip-vit-l-14": lambda: _clip((224, 14, 1024, 24, 16), (768, 12, 12), 768, "gelu"),
    "openclip-vit-h-14": lambda: _clip((224, 14, 1280, 32, 16), (1024, 24, 16), 1024, "gelu"),
    "openclip-vit-g-14": lambda: _clip((224, 14, 1408, 40, 16), (1024, 24, 16), 1024, "gelu", 4.3637),
    "openclip-vit-bigg-14": lambda: _clip((224, 14, 1664, 48, 16), (1280, 32, 20), 1280, "gelu", 4.9231),
    "siglip-b-16": siglip_b_16,
    "clip-small": clip_small,
    "clip-tiny": clip_tiny,
}
