"""CLIP of transformers and of imglish with the same weights, and inputs for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from imglish.checkpoints import hf_clip
from imglish.data.batch import Batch, TextBatch
from imglish.models.clip import Clip

PATCHES = {"clip-vit-b-32": 32, "clip-vit-b-16": 16}
END = 49407


@dataclass(frozen=True)
class Pair:
    """Both models in the same mode, with the same weights."""

    ours: Clip
    peer: Any


def build_pair(name: str, device: str) -> Pair:
    config = CLIPConfig(vision_config={"patch_size": PATCHES[name]}, text_config={"eos_token_id": END})
    torch.manual_seed(0)
    peer = CLIPModel(config)
    ours = hf_clip.config_from_json(config.to_dict()).build()
    ours.load_state_dict(hf_clip.convert(peer.state_dict(), ours.config).state)
    return Pair(ours.to(device), peer.to(device))


def captions(count: int, shortest: int = 8, longest: int = 18) -> list[list[int]]:
    """Token ids of ``count`` captions with start and end token; about 13 tokens on average, as COCO captions have."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [[49406, *torch.randint(0, 49406, (n - 2,), generator=generator).tolist(), END] for n in lengths]


def padded(sequences: list[list[int]], length: int, device: str) -> dict[str, Tensor]:
    """The peer's input: ids filled up to ``length`` with the end token (CLIP's padding), and which are real."""
    ids = torch.tensor([s + [END] * (length - len(s)) for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def pictures(count: int, device: str) -> Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(2)).to(device)


def batch_of(sequences: list[list[int]], images: Tensor) -> Batch:
    count, device = len(sequences), images.device
    texts = TextBatch.of(sequences).to(device)
    return Batch(images, texts, torch.arange(count, device=device), torch.zeros(count, 2, device=device))
