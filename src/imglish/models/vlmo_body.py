"""The one Transformer of VLMo and the ways through it: pictures alone, texts alone, pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from imglish.data.batch import TextBatch
from imglish.models.aligned import init_weights
from imglish.models.capabilities import EncodedTexts, ImageMemory
from imglish.models.expert_sizes import PairSizes
from imglish.nn.embed import BertEmbedding, PatchEmbed
from imglish.nn.experts import ExpertBlockConfig, FusedQkv
from imglish.nn.packing import SHARED, Packing, Read
from imglish.nn.relative import RelativeBias
from imglish.nn.segments import Segments, upload_index

TEXT, IMAGE = 0, 1
"""Rows of the table of token types."""


@dataclass(frozen=True)
class VlmoSizes(PairSizes):
    """The Transformer; the defaults are the published base model.

    text_distances: texts up to this length have distances in the relative table (with ``positions="absolute"`` there is
    none, positions are added to the embeddings); types: token types, one for texts, the others for pictures (two for
    NLVR2); drop_path: also dropout of the text embeddings; embedding_std: of words, positions and class token at the
    start.
    """

    fused_layers: int = 2
    text_distances: int = 196
    types: int = 2
    positions: Literal["relative", "absolute"] = "relative"
    layer_scale: float | None = 0.1
    text_norm_eps: float = 1e-12
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions == "relative" and self.max_length > self.text_distances:
            raise ValueError(f"max_length {self.max_length} is above text_distances = {self.text_distances}")

    def block(self, layer: int) -> ExpertBlockConfig:
        """Layer number ``layer``: shared attention, feed-forward by modality, with a VL expert on top."""
        sized = self.sized(layer, SHARED, self.feed_forward(layer))
        return replace(sized, qkv_bias="qv", layer_scale=self.layer_scale)


class VlmoBody(nn.Module):
    """Embeddings, blocks and final norm; a model adds heads, and calls :meth:`init` when it has them."""

    def __init__(self, config: VlmoSizes) -> None:
        super().__init__()
        self.config = config
        width, relative = config.width, config.positions == "relative"
        image = config.image
        self.patch_embed = PatchEmbed(config.patch, width, image.mean, image.std, size=image.size)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = None if relative else nn.Parameter(torch.zeros(config.tokens, width))
        self.embedding = BertEmbedding(
            config.vocab_size, None if relative else config.max_length, width, config.text_norm_eps, config.drop_path
        )
        self.types = nn.Embedding(config.types, width)
        self.relative = (
            RelativeBias(config.grid, config.text_distances, config.heads, config.depth) if relative else None
        )
        self.blocks = nn.ModuleList(config.block(layer).build() for layer in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)

    def init(self) -> None:
        """Weights at the start; branches end with smaller matrices higher up, by 1 / sqrt(2 l) (BEiT, section 2.5)."""
        config = self.config
        init_weights(self, config.width, config.embedding_std)
        std = 0.02 * math.sqrt(768 / config.width)
        with torch.no_grad():
            for table in (self.class_token, *(() if self.positions is None else (self.positions,))):
                table.normal_(0, config.embedding_std)
            for part in self.modules():
                if isinstance(part, FusedQkv):
                    nn.init.trunc_normal_(part.weight, std=std)
            for layer, block in enumerate(self.blocks, 1):
                for name, parameter in block.named_parameters():
                    if name.endswith("fc2.weight") or (".out." in name and name.endswith("weight")):
                        parameter.div_(math.sqrt(2 * layer))

    # ---- input rows -------------------------------------------------------------------------------------------------

    def picture_rows(self, images: Tensor, kind: int = IMAGE) -> Tensor:
        """``(B, 3, H, W)`` uint8 or normalised -> ``(B, L, D)``, class token first. kind: their token type."""
        x = self.patch_embed(images)
        x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        if self.positions is not None:
            x = x + self.positions
        return x + self.types.weight[kind]

    def text_rows(self, texts: TextBatch) -> Tensor:
        """Packed texts -> ``(T, D)``."""
        rows: Tensor = self.embedding(texts) + self.types.weight[TEXT]
        return rows

    # ---- the Transformer --------------------------------------------------------------------------------------------

    def transform(self, rows: Tensor, packing: Packing, read: Read | None = None) -> Tensor:
        """All layers and the final norm over ``rows (T, D)``; returns ``(T, D)``, or the M rows of ``read``."""
        bias = self._bias(packing)
        for layer in range(self.config.depth):
            last = layer == self.config.depth - 1
            rows = self.blocks[layer](rows, packing, bias[layer], read if last else None)
        normed: Tensor = self.norm(rows)
        return normed

    def _bias(self, packing: Packing) -> Sequence[Sequence[Tensor] | None]:
        return [None] * self.config.depth if self.relative is None else self.relative(packing)

    def towers(self, pictures: Tensor, rows: Tensor, texts: Segments, fused: bool) -> tuple[Tensor, ...]:
        """[CLS] of pictures ``(B, L, D)`` and texts ``(T, D)`` on their own, all in one pass: ``(B, D)``, ``(N, D)``.

        fused: each twice, by V and L experts, and with the VL experts in the layers that have them: pictures, pictures
        fused, texts fused, texts.
        """
        segments = Segments.equal(pictures.shape[0], pictures.shape[1])
        packing, rows = Packing(image=segments, text=texts), torch.cat([pictures.flatten(0, 1), rows])
        bias = self._bias(packing)
        below = self.config.depth - (self.config.fused_layers if fused else 0)
        for layer in range(self.config.depth):
            if layer == below:
                rows, packing = _twice(rows, packing)
            read = Read.first(packing, rows.device) if layer == self.config.depth - 1 else None
            rows = self.blocks[layer](rows, packing, bias[layer], read)
        count = [segments.count, texts.count]
        return self.norm(rows).split(count if below == self.config.depth else [count[0], *count, count[1]])

    # ---- pairs ------------------------------------------------------------------------------------------------------

    def project_images(self, tokens: Tensor) -> ImageMemory:
        """The input rows ``tokens (B, L, D)`` themselves: pair sequences are read from the first layer on."""
        return ImageMemory(((tokens.flatten(0, 1),),), Segments.equal(tokens.shape[0], tokens.shape[1]))

    def pooled(
        self, memory: ImageMemory, texts: EncodedTexts, image_index: Sequence[int], text_index: Sequence[int]
    ) -> Tensor:
        """[CLS] of the text of each pair after all layers and the final norm, ``(P, D)``."""
        if texts.rows is None:
            raise ValueError("pairs need texts.rows: encode the texts with this model")
        ((pictures,),), device = memory.layers, texts.rows.device
        packing = Packing(fused_image=memory.segments.select(image_index), fused_text=texts.segments.select(text_index))
        rows = [
            pictures[upload_index(memory.segments.rows_of(image_index), device)],
            texts.rows[upload_index(texts.segments.rows_of(text_index), device)],
        ]
        return self.transform(torch.cat(rows), packing, Read.first(packing, device))

    def read_pairs(
        self, tokens: Tensor, rows: Tensor, segments: Segments, count: int, index: Tensor, counts: tuple[int, ...]
    ) -> Tensor:
        """Some text rows of pairs after all layers, ``(M, D)``: texts ``rows (T, D)``, several sets of ``count``, each
        beside the pictures ``tokens (B, L, D)``; index: which of the T rows; counts: how many in each text."""
        sets = segments.count // count
        pictures = Segments.equal(segments.count, tokens.shape[1])
        packing = Packing(fused_image=pictures, fused_text=segments)
        read = Read(
            index + pictures.total,
            Packing(fused_image=Segments.equal(len(pictures.lengths), 0), fused_text=Segments(counts)),
        )
        return self.transform(torch.cat([tokens.flatten(0, 1)] * sets + [rows]), packing, read)


def _twice(rows: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
    """Pictures and texts alone, and each once more as a fused sequence without a partner."""
    pictures, texts = rows.split([packing.image.total, packing.text.total])
    nobody = Segments.equal(packing.image.count, 0), Segments.equal(packing.text.count, 0)
    doubled = Packing(packing.image, packing.image + nobody[1], nobody[0] + packing.text, packing.text)
    return torch.cat([pictures, pictures, texts, texts]), doubled
