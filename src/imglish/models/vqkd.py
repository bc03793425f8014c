"""The visual tokenizer of BEiT v2 (Peng et al. 2022): codes that let a decoder restore a frozen teacher's features.

picture -> ViT -> vectors of few dimensions -> nearest code of each (a codebook on the sphere) -> ViT -> features
picture -> teacher (frozen) ------------------------------------------------------------------> cosine distance
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import Batch
from imglish.models.dvae import resize
from imglish.models.vit import ImageInput, VisionTransformer, VitConfig
from imglish.nn.blocks import BlockConfig
from imglish.nn.segments import Segments
from imglish.objectives.codes import code_usage, cosine_distance
from imglish.objectives.gather import gather


@dataclass(frozen=True)
class VqKdConfig:
    """Sizes and objective; the defaults are the published tokenizer with CLIP-B/16 as teacher.

    decoder_depth: blocks of the decoder, as wide as the encoder's; codes, code_width: entries of the codebook and their
    dimensions; teacher_width: of the teacher's tokens; decay: of the codebook's moving average; commitment: weight of
    the distance between vectors and their codes; kmeans: rounds of k-means that make the first codebook; restart: codes
    whose moving share of the batch falls below this part of an even share begin anew at a vector of the batch (0: none
    does, as published; small data collapse without it).
    """

    vision: VitConfig = field(default_factory=VitConfig)
    decoder_depth: int = 3
    codes: int = 8192
    code_width: int = 32
    teacher_width: int = 768
    decay: float = 0.99
    commitment: float = 1.0
    kmeans: int = 10
    restart: float = 0.0

    family: ClassVar[str] = "vqkd"

    @property
    def image(self) -> ImageInput:
        return self.vision.image

    @property
    def grid(self) -> int:
        """Codes a side of the picture."""
        return self.vision.image.size // self.vision.patch

    def __post_init__(self) -> None:
        if not self.vision.class_token:
            raise ValueError("vision.class_token must be true: the encoder of VQ-KD has one")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}, it must lie in 0..1, below 1")
        if not 0 <= self.restart < 1:
            raise ValueError(f"restart is {self.restart}, a part of the even share between 0 and 1")

    def build(self) -> VqKd:
        return VqKd(self)


class VqKd(nn.Module):
    """Turns pictures into codes; ``losses`` is one training step."""

    family = "vqkd"
    learns_from = "a model with an image tower (CLIP, ALBEF)"
    codebook: Tensor
    shares: Tensor
    started: Tensor

    def __init__(self, config: VqKdConfig) -> None:
        super().__init__()
        self.config = config
        vision, width = config.vision, config.vision.width
        self.encoder = vision.build()
        self.to_code = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.code_width))
        self.from_code = nn.Linear(config.code_width, width)
        self.positions = nn.Parameter(torch.zeros(config.grid**2, width))
        block = BlockConfig(width, vision.heads, int(width * vision.mlp_ratio), norm_eps=vision.norm_eps)
        self.decoder = nn.ModuleList(block.build() for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=vision.norm_eps)
        self.to_feature = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.teacher_width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02 * (768 / width) ** 0.5)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.register_buffer("codebook", F.normalize(torch.randn(config.codes, config.code_width), dim=1))
        self.register_buffer("shares", torch.full((config.codes,), 1 / config.codes))
        self.register_buffer("started", torch.tensor(False))

    def make_teacher(self, source: nn.Module | None = None) -> Distillation:
        """What the tokenizer learns from: the image tower of ``source``, which stays as it is."""
        return Distillation(source, self.config)

    # ---- codes ----------------------------------------------------------------------------------------------------

    @property
    def codes(self) -> int:
        """Size of the vocabulary."""
        return self.config.codes

    @torch.no_grad()
    def tokenize(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pictures uint8 ``(B, 3, H, W)`` -> the nearest code of each patch, int64 ``(B, rows * columns)``."""
        side = self.config.grid
        if grid != (side, side):
            raise ValueError(f"this tokenizer has {side} x {side} codes a picture, {grid[0]} x {grid[1]} are wanted")
        size = self.config.image.size
        pixels = images if images.shape[2:] == (size, size) else resize(images, (size, size)).mul_(255).byte()
        return self.nearest(self.encode(pixels)).unflatten(0, (len(images), -1))

    def encode(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> unit vectors of the patches, float32 ``(B * h * w, code_width)``."""
        patches = self.encoder(images)[:, 1:].flatten(0, 1)
        return F.normalize(self.to_code(patches).float(), dim=1)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Unit vectors ``(T, C)`` -> the code of largest cosine, int64 ``(T,)``."""
        return (vectors.detach() @ self.codebook.T).argmax(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors of codes ``(B * h * w, C)``, picture behind picture -> the teacher's features of the patches."""
        cells = self.config.grid**2
        segments = Segments.equal(codes.shape[0] // cells, cells)
        rows = (self.from_code(codes).unflatten(0, (-1, cells)) + self.positions).flatten(0, 1)
        for block in self.decoder:
            rows = block(rows, segments)
        features: Tensor = self.to_feature(self.norm(rows))
        return features

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(
        self, batch: Batch, teacher: Distillation | None = None, feature_grads: Any = None
    ) -> dict[str, Tensor]:
        return self.losses(batch, teacher)

    def losses(self, batch: Batch, teacher: Distillation | None = None, feature_grads: Any = None) -> dict[str, Tensor]:
        """Distillation through the codes (equation 3); texts are not looked at. The codebook moves in
        :meth:`Distillation.update`, gradients pass it straight through."""
        if teacher is None:
            raise ValueError("VQ-KD learns from a frozen teacher: pass model.make_teacher(image tower)")
        if not isinstance(batch.images, Tensor):
            raise ValueError("a visual tokenizer trains on pictures of one size")
        vectors = self.encode(batch.images)
        chosen = self.nearest(vectors)
        codes = self.codebook[chosen]
        if self.training:
            teacher.remember(vectors.detach(), chosen)
        through = vectors + (codes - vectors).detach()
        target = teacher.features(batch.images)
        return {
            "distillation": cosine_distance(self.decode(through.to(self.from_code.weight.dtype)), target),
            "commitment": self.config.commitment * F.mse_loss(vectors, codes),
            "metric/code_usage": code_usage(chosen, self.codes),
        }


class Distillation:
    """The frozen teacher, and the codebook's update from the vectors of the step."""

    def __init__(self, source: nn.Module | None, config: VqKdConfig) -> None:
        tower = getattr(source, "vision", None)
        if not isinstance(tower, VisionTransformer):
            found = "none is named" if source is None else f"{type(source).__name__} has none"
            raise ValueError(f"VQ-KD distils the image tower (a vision Transformer) of a model, and {found}")
        theirs = tower.config
        if theirs.image.size // theirs.patch != config.grid:
            raise ValueError(
                f"the teacher has {theirs.image.size // theirs.patch} patches a side, the tokenizer {config.grid}: "
                "change vision.image.size or vision.patch"
            )
        if theirs.width != config.teacher_width:
            raise ValueError(f"teacher_width is {config.teacher_width}, the teacher's tokens have {theirs.width}")
        self.config = config
        self.model = tower.eval().requires_grad_(False)
        self._pending: list[tuple[Tensor, Tensor]] = []

    def at(self, epochs: float) -> None:
        """Nothing here depends on the progress of training."""

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The teacher's patch tokens ``(B * h * w, D)`` of pictures uint8 ``(B, 3, H, W)``."""
        size = self.model.config.image.size
        if images.shape[2:] != (size, size):
            images = resize(images, (size, size)).mul_(255).byte()
        tokens: Tensor = self.model(images)
        return tokens[:, int(self.model.config.class_token) :].flatten(0, 1)

    def remember(self, vectors: Tensor, chosen: Tensor) -> None:
        """Keep a part's vectors ``(T, C)`` and codes ``(T,)`` for :meth:`update`."""
        self._pending.append((vectors, chosen))

    @torch.no_grad()
    def update(self, model: VqKd) -> None:
        """After the optimiser's step: codes move towards the mean of the vectors that chose them, over all ranks."""
        if not self._pending:
            return
        vectors = gather(torch.cat([v for v, _ in self._pending]))
        chosen = gather(torch.cat([c for _, c in self._pending]))
        self._pending = []
        book, decay = model.codebook, self.config.decay
        if not bool(model.started):  # once in a run
            book.copy_(kmeans(vectors, book.shape[0], self.config.kmeans))
            model.started.fill_(True)
            return
        means, counts = _means(vectors, chosen, book.shape[0])
        moved = F.normalize(torch.lerp(means, book, decay), dim=1)
        book.copy_(torch.where((counts > 0)[:, None], moved, book))
        model.shares.lerp_(counts / counts.sum(), 1 - decay)
        if self.config.restart > 0:
            _restart(model, vectors, self.config.restart / book.shape[0])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the teacher is frozen and the codebook belongs to the model."""


def _means(vectors: Tensor, chosen: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Unit mean vector ``(K, C)`` of those that chose each code, and how many did, float ``(K,)``."""
    sums = vectors.new_zeros(codes, vectors.shape[1]).index_add_(0, chosen, vectors)
    return F.normalize(sums, dim=1), torch.bincount(chosen, minlength=codes).to(vectors.dtype)


def kmeans(vectors: Tensor, codes: int, rounds: int) -> Tensor:
    """``codes`` unit vectors ``(K, C)`` by k-means with cosines over ``vectors (T, C)``; the same for the same input.

    It starts at vectors spread evenly over the input; with fewer than K of them, at noisy copies.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.linspace(0, vectors.shape[0] - 1, codes).round().long().to(vectors.device)
    noise = torch.randn(codes, vectors.shape[1], generator=generator).to(vectors)
    centres = F.normalize(vectors[start] + 1e-3 * noise, dim=1)
    for _ in range(rounds):
        means, counts = _means(vectors, (vectors @ centres.T).argmax(1), codes)
        centres = torch.where((counts > 0)[:, None], means, centres)
    return centres


def _restart(model: VqKd, vectors: Tensor, least: float) -> None:
    """Codes of a smaller moving share than ``least`` begin anew where the codebook fits the batch worst."""
    dead = model.shares < least
    order = (vectors @ model.codebook.T).amax(1).argsort()  # worst first
    place = (dead.cumsum(0) - 1).clamp(min=0) % order.shape[0]
    model.codebook.copy_(torch.where(dead[:, None], vectors[order[place]], model.codebook))
    model.shares.masked_fill_(dead, 1 / model.codes)


def vqkd_base() -> VqKdConfig:
    """The published tokenizer."""
    return VqKdConfig()


def vqkd_small() -> VqKdConfig:
    """For a teacher like clip-small or albef-small (80 px, 5 x 5 patches), on CPUs."""
    vision = VitConfig(image=ImageInput(80), patch=16, width=192, depth=3, heads=3)
    return VqKdConfig(vision, decoder_depth=1, codes=256, code_width=16, teacher_width=192, decay=0.95, restart=0.1)


def vqkd_tiny() -> VqKdConfig:
    """For tests."""
    vision = VitConfig(image=ImageInput(48), patch=8, width=64, depth=2, heads=4)
    return VqKdConfig(vision, decoder_depth=1, codes=32, code_width=8, teacher_width=64, restart=0.05)


CONFIGS = {"vqkd-base": vqkd_base, "vqkd-small": vqkd_small, "vqkd-tiny": vqkd_tiny}
