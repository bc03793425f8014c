"""BEiT (Bao et al. 2022, "BEiT: BERT Pre-Training of Image Transformers"): masked image modelling on visual tokens.

picture, some patches replaced by [MASK] -> ViT with relative positions -> head -> codes of the masked patches
picture, whole                           -> visual tokenizer (frozen) ----------> their true codes
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import Batch, PatchMasks
from imglish.models.capabilities import EncodedImages
from imglish.models.expert_sizes import HALF, PictureSizes
from imglish.models.visual_codes import CodeTeacher
from imglish.models.vit import ImageInput
from imglish.nn.embed import PatchEmbed
from imglish.nn.experts import ExpertBlockConfig, FusedQkv
from imglish.nn.packing import SHARED, Packing, Read
from imglish.nn.relative import RelativeBias
from imglish.nn.segments import Segments
from imglish.objectives.codes import mim_loss


@dataclass(frozen=True)
class BeitConfig(PictureSizes):
    """Sizes and objective; the defaults are the published base model.

    codes: vocabulary of the visual tokenizer; layer_scale: initial value (0.1 base, 1e-5 large). Positions are relative
    biases of the attention, one table for all layers.
    """

    codes: int = 8192
    layer_scale: float = 0.1

    family: ClassVar[str] = "beit"
    mim: ClassVar[bool] = True

    def block(self, layer: int) -> ExpertBlockConfig:
        """Layer number ``layer``: one expert for everything."""
        return replace(self.sized(layer, SHARED, SHARED), qkv_bias="qv", layer_scale=self.layer_scale)

    def build(self) -> Beit:
        return Beit(self)


class BeitBody(nn.Module):
    """Patches, class token and blocks; tables of relative positions: one for all layers (pre-training), or each layer
    its own (``own_tables``; BEiT's fine-tuning)."""

    family = "beit"

    def __init__(self, config: BeitConfig, own_tables: bool = False) -> None:
        super().__init__()
        self.config = config
        image = config.image
        self.patch_embed = PatchEmbed(config.patch, config.width, image.mean, image.std, size=image.size)
        self.class_token = nn.Parameter(torch.zeros(config.width))
        count = config.depth if own_tables else 1
        tables = [RelativeBias(config.grid, 0, config.heads, layers=1) for _ in range(count)]
        self.relative = nn.ModuleList(tables) if own_tables else tables[0]
        self.blocks = nn.ModuleList(config.block(layer).build() for layer in range(config.depth))

    def rows(self, patches: Tensor) -> tuple[Tensor, Packing]:
        """Input rows ``(T, D)`` of pictures of patches ``(B, P, D)``, class token first, and their packing."""
        head = self.class_token.to(patches.dtype).expand(patches.shape[0], 1, -1)
        rows = torch.cat([head, patches], dim=1)
        return rows.flatten(0, 1), Packing(image=Segments.equal(rows.shape[0], rows.shape[1]))

    def transform(self, rows: Tensor, packing: Packing, read: Read | None = None) -> Tensor:
        """Through all blocks; ``read``: the last one computes these rows only."""
        tables = self.relative if isinstance(self.relative, nn.ModuleList) else [self.relative]
        biases = [table(packing)[0] for table in tables]
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            rows = block(rows, packing, biases[layer % len(biases)], read if layer == last else None)
        return rows


class Beit(BeitBody):
    """Encodes pictures, fills in the codes of masked patches; ``losses`` is one training step."""

    learns_from = "a visual tokenizer (dvae, vqkd)"

    def __init__(self, config: BeitConfig) -> None:
        super().__init__(config)
        self.mask_token = nn.Parameter(torch.zeros(config.width))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.codes)
        _init(self)

    def make_teacher(self, tokenizer: nn.Module | None = None) -> CodeTeacher:
        """The frozen visual tokenizer whose codes are to be predicted."""
        return CodeTeacher(tokenizer, self.config.codes)

    # ---- encoder --------------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> EncodedImages:
        """``(B, 3, H, W)`` uint8 or normalised -> features ``(B, D)``, the mean of the patches, and tokens."""
        tokens = self.tokens(images)
        return EncodedImages(F.normalize(tokens[:, 1:].mean(1).float(), dim=-1), tokens)

    def tokens(self, images: Tensor, masked: PatchMasks | None = None) -> Tensor:
        """States of all tokens after the last norm, class token first, ``(B, L, D)``; ``masked`` patches hidden."""
        rows, packing = self.embed(images, masked)
        states: Tensor = self.norm(self.transform(rows, packing))
        return states.unflatten(0, (packing.count, -1))

    def embed(self, images: Tensor, masked: PatchMasks | None = None) -> tuple[Tensor, Packing]:
        """Input rows ``(T, D)`` of the pictures, masked patches replaced by the mask token, and their packing."""
        patches = self.patch_embed(images)
        return self.rows(patches if masked is None else replace_patches(patches, masked, self.mask_token))

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, teacher: CodeTeacher | None = None, feature_grads: Any = None) -> dict[str, Tensor]:
        return self.losses(batch, teacher)

    def losses(self, batch: Batch, teacher: CodeTeacher | None = None, feature_grads: Any = None) -> dict[str, Tensor]:
        """Masked image modelling (equation 1); texts are not looked at."""
        if teacher is None or batch.patches is None:
            raise ValueError(
                "BEiT trains on masked patches and the codes of a visual tokenizer: pass make_teacher(...)"
            )
        if not isinstance(batch.images, Tensor):
            raise ValueError("BEiT takes pictures of one size")
        codes = teacher.codes(batch.images, (self.config.grid, self.config.grid)).flatten()[batch.patches.rows]
        count = batch.mean(lambda b: b.masked_patches)
        return self.mim(self.fill_patches(batch.images, batch.patches), codes, count)

    def mim(self, logits: Tensor, codes: Tensor, count: float | None = None) -> dict[str, Tensor]:
        """Loss and accuracy of ``logits (M, K)`` against the true codes ``(M,)``; count: see :func:`mim_loss`."""
        accuracy = (logits.argmax(1) == codes).float().mean()
        return {"mim": mim_loss(logits, codes, count), "metric/mim_accuracy": accuracy.detach()}

    def fill_patches(self, images: Tensor, masked: PatchMasks) -> Tensor:
        """Logits over codes ``(M, K)`` of the masked patches; the last block computes these M rows only."""
        rows, packing = self.embed(images, masked)
        read = Read(token_rows(masked), Packing(image=Segments(masked.counts)))
        logits: Tensor = self.head(self.norm(self.transform(rows, packing, read)))
        return logits


def replace_patches(patches: Tensor, masked: PatchMasks, mask_token: Tensor) -> Tensor:
    """Patch embeddings ``(B, P, D)`` with those of ``masked`` replaced by the mask token."""
    if masked.patches != patches.shape[1]:
        raise ValueError(f"masks are of pictures of {masked.patches} patches, these have {patches.shape[1]}")
    flat = patches.flatten(0, 1)
    tokens = mask_token.to(flat.dtype).expand(masked.rows.shape[0], -1)
    return flat.index_copy(0, masked.rows, tokens).unflatten(0, patches.shape[:2])


def token_rows(masked: PatchMasks) -> Tensor:
    """Row numbers of masked patches among the tokens of their pictures, each with a class token in front; ``(M,)``."""
    return masked.rows + masked.rows.div(masked.patches, rounding_mode="floor") + 1


def _init(model: Beit) -> None:
    """Deviation 0.02 at width 768; matrices that write into the residual are divided by sqrt(2 * layer)."""
    std = 0.02 * math.sqrt(768 / model.config.width)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=std)
            nn.init.zeros_(part.bias)
        if isinstance(part, FusedQkv):
            nn.init.trunc_normal_(part.weight, std=std)
    for number, block in enumerate(model.blocks, 1):
        for name, weight in block.named_parameters():
            if name in ("attn.out.all.weight", "ffn.all.fc2.weight"):
                weight.data.div_(math.sqrt(2 * number))
    for token in (model.class_token, model.mask_token):
        nn.init.trunc_normal_(token, std=0.02)


def beit_base() -> BeitConfig:
    """The published base model: 92.0 M parameters with its head."""
    return BeitConfig()


def beit_large() -> BeitConfig:
    """The published large model: 311.5 M parameters with its head."""
    return BeitConfig(width=1024, depth=24, heads=16, hidden=4096, layer_scale=1e-5)


def beit_small() -> BeitConfig:
    """For thousands of real photographs and CPUs; 5 x 5 patches, 256 codes."""
    image = ImageInput(80, HALF, HALF)
    return BeitConfig(image, codes=256, width=192, depth=4, heads=3, hidden=768, drop_path=0.0)


def beit_tiny() -> BeitConfig:
    """For tests."""
    image = ImageInput(48, HALF, HALF)
    return BeitConfig(image, patch=8, codes=64, width=64, depth=3, heads=4, hidden=256, drop_path=0.0)


CONFIGS = {"beit-base": beit_base, "beit-large": beit_large, "beit-small": beit_small, "beit-tiny": beit_tiny}
