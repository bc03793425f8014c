"""The Multiway Transformer of BEiT-3: one body for pictures, texts and pairs, experts by modality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from imglish.data.batch import PatchMasks, TextBatch
from imglish.models.beit import replace_patches
from imglish.models.capabilities import EncodedTexts, ImageMemory
from imglish.models.expert_sizes import PairSizes
from imglish.nn.embed import PatchEmbed
from imglish.nn.experts import ExpertBlockConfig, Experts, FusedQkv
from imglish.nn.packing import BY_MODALITY, SHARED, Packing, Read
from imglish.nn.segments import Segments, upload_index


@dataclass(frozen=True)
class MultiwayConfig(PairSizes):
    """Sizes of the body; the defaults are the released base model.

    attention: "by_modality" as released, "shared" as in the paper; fused_layers: none as released, 3 in the paper.
    """

    norm_eps: float = 1e-5
    vocab_size: int = 64010
    max_length: int = 1022
    attention: Literal["by_modality", "shared"] = "by_modality"

    def block(self, layer: int) -> ExpertBlockConfig:
        """Layer number ``layer``: what belongs to a modality and what is shared."""
        attention = SHARED if self.attention == "shared" else BY_MODALITY
        return replace(self.sized(layer, attention, self.feed_forward(layer)), sub_norm=True)


class Multiway(nn.Module):
    """Embeddings, Multiway blocks and final norms: pictures, texts and pairs to states. Heads are built on it."""

    def __init__(self, config: MultiwayConfig, final_norm: bool = True) -> None:
        super().__init__()
        self.config = config
        width = config.width
        image = config.image
        self.patch_embed = PatchEmbed(config.patch, width, image.mean, image.std, size=image.size)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.words = nn.Embedding(config.vocab_size, width)
        self.image_positions = nn.Parameter(torch.zeros(config.tokens, width))
        self.text_positions = nn.Parameter(torch.zeros(config.max_length, width))
        self.blocks = nn.ModuleList(config.block(layer).build() for layer in range(config.depth))
        self.norm = Experts(BY_MODALITY, lambda: nn.LayerNorm(width, eps=config.norm_eps)) if final_norm else None
        init_multiway(self, width)
        for table in (self.class_token, self.mask_token, self.image_positions, self.text_positions):
            nn.init.trunc_normal_(table, std=0.02)

    def picture_rows(self, images: Tensor, masked: PatchMasks | None = None) -> Tensor:
        """``(B, 3, H, W)`` uint8 or normalised -> ``(B, L, D)``, class token first; ``masked`` patches hidden."""
        patches = self.patch_embed(images)
        if masked is not None:
            patches = replace_patches(patches, masked, self.mask_token)
        head = self.class_token.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return torch.cat([head, patches], dim=1) + self.image_positions

    def text_rows(self, texts: TextBatch, positions: Tensor | None = None) -> Tensor:
        """Packed texts -> ``(T, D)``; positions: int64 ``(T,)`` of the tokens where they do not begin at zero."""
        if positions is None:
            if texts.segments.longest > self.config.max_length:
                raise ValueError(
                    f"a text has {texts.segments.longest} tokens, the model takes {self.config.max_length}: "
                    "tokenize with a smaller max_length"
                )
            positions = texts.segments.positions(texts.ids.device)
        rows: Tensor = self.words(texts.ids) + self.text_positions[positions]
        return rows

    def transform(self, rows: Tensor, packing: Packing, read: Read | None = None) -> Tensor:
        """All layers and the final norms over ``rows (T, D)``; returns ``(T, D)``, or the M rows of ``read``."""
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            rows = block(rows, packing, None, read if layer == last else None)
        return self.normed(rows, packing if read is None else read.packing)

    def normed(self, rows: Tensor, packing: Packing) -> Tensor:
        """The final norm of each modality, where there is one."""
        return rows if self.norm is None else self.norm(rows, packing)

    def project_images(self, tokens: Tensor) -> ImageMemory:
        """The input rows ``tokens (B, L, D)`` themselves: pair sequences are read from the first layer on."""
        return ImageMemory(((tokens.flatten(0, 1),),), Segments.equal(tokens.shape[0], tokens.shape[1]))

    def pooled(
        self, memory: ImageMemory, texts: EncodedTexts, image_index: Sequence[int], text_index: Sequence[int]
    ) -> Tensor:
        """Class token of the picture, then first token of the text, of each pair after all layers, ``(P, 2 D)``."""
        if texts.rows is None:
            raise ValueError("pairs need texts.rows: encode the texts with this model")
        ((rows,),), device = memory.layers, texts.rows.device
        pictures = rows[upload_index(memory.segments.rows_of(image_index), device)]
        words = texts.rows[upload_index(texts.segments.rows_of(text_index), device)]
        states = self.pairs(pictures.unflatten(0, (len(image_index), -1)), words, texts.segments.select(text_index))
        return states.flatten(1)

    def pairs(self, pictures: Tensor, rows: Tensor, segments: Segments) -> Tensor:
        """Class token of the picture and first token of the text of B pairs after all layers, ``(B, 2, D)``.

        pictures: ``(B, L, D)``; rows: ``(T, D)`` of the B texts ``segments``. Only these 2 B rows pass the last layer.
        """
        packing = Packing(fused_image=Segments.equal(*pictures.shape[:2]), fused_text=segments)
        starts = torch.cat(
            [packing.fused_image.starts(rows.device), segments.starts(rows.device) + packing.fused_image.total]
        )
        one = Segments.equal(segments.count, 1)
        read = Read(starts, Packing(fused_image=one, fused_text=one))
        states = self.transform(torch.cat([pictures.flatten(0, 1), rows]), packing, read)
        return states.unflatten(0, (2, -1)).transpose(0, 1)


def init_multiway(module: nn.Module, width: int) -> None:
    """Deviation 0.02 at width 768, larger for smaller models; the released code scales no layer after that."""
    std = 0.02 * math.sqrt(768 / width)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, FusedQkv):
            nn.init.trunc_normal_(part.weight, std=std)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
