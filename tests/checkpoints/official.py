"""Tiny files as the authors of each family release them, made from models of ours by the tables backwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from imglish.checkpoints import albef, beit, beit3, blip, clip, coca, vilt, vlmo
from imglish.models.albef import AlbefConfig
from imglish.models.beit import BeitConfig
from imglish.models.beit3 import Beit3Config
from imglish.models.blip import BlipConfig
from imglish.models.clip import ClipConfig, clip_vit
from imglish.models.expert_sizes import HALF
from imglish.models.text_towers import TextConfig
from imglish.models.vilt import ViltConfig
from imglish.models.vilt_pictures import AspectInput
from imglish.models.vit import ImageInput, VitConfig
from imglish.models.vlmo import VlmoConfig

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "with", "one", "dog", "man", "in", "the"]
WORDS += ["red", "green", "blue", "yellow", "square", "stripe", "frame", "half", "snow"]
SIZE, PATCH, WIDTH, LENGTH = 32, 8, 64, 12
"""Of all models here; a head is 64 wide, as in released ones."""

_COUNT = len(WORDS)
_VISION = VitConfig(ImageInput(SIZE), PATCH, WIDTH, depth=2, heads=1)
_TEXT: dict[str, Any] = {"width": WIDTH, "depth": 2, "heads": 1, "max_length": LENGTH}
_ALIGNED: dict[str, Any] = {"vision": _VISION, "hidden": 96, "embed_dim": 32, **_TEXT}
_BODY: dict[str, Any] = {"image": ImageInput(SIZE, HALF, HALF), "patch": PATCH, "hidden": 96}
COCA: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": 2,
        "width": WIDTH,
        "patch_size": PATCH,
        "attentional_pool": True,
        "attn_pooler_heads": 1,
        "attn_pooler_queries": 5,
        "output_tokens": True,
    },
    "text_cfg": {"context_length": LENGTH, "vocab_size": _COUNT, "width": WIDTH, "heads": 1, "layers": 1}
    | {"embed_cls": True},
    "multimodal_cfg": {"context_length": LENGTH, "vocab_size": _COUNT, "width": WIDTH, "heads": 1, "layers": 1},
}


def config(family: str) -> Any:
    """Of the tiny model of ``family``."""
    made: dict[str, Any] = {
        "albef": lambda: AlbefConfig(**_ALIGNED, vocab_size=_COUNT, fusion_layer=1),
        "blip": lambda: BlipConfig(**_ALIGNED, vocab_size=_COUNT + 2),
        "vilt": lambda: ViltConfig(image=AspectInput(SIZE, 53, PATCH), mlp_ratio=2.0, vocab_size=_COUNT, **_TEXT),
        "vlmo": lambda: VlmoConfig(**_BODY, **_TEXT, vocab_size=_COUNT, fused_layers=1, embed_dim=WIDTH),
        "beit": lambda: BeitConfig(**_BODY, width=WIDTH, depth=2, heads=1, codes=64),
        "beit3": lambda: Beit3Config(**_BODY, **_TEXT, vocab_size=_COUNT, outputs=("itc",), objective="itc"),
        "clip": lambda: ClipConfig(
            clip_vit(SIZE, PATCH, WIDTH, 2, 1), TextConfig(WIDTH, 2, 1), _COUNT, LENGTH, embed_dim=32
        ),
        "coca": lambda: coca.config_from_json(COCA),
    }
    return made[family]()


def weights(family: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The official state dict of ``model``."""
    settings: Any = model.config
    tables = {
        "albef": lambda: albef.table(settings, True),
        "blip": lambda: blip.table(settings),
        "vilt": vilt.table,
        "vlmo": lambda: vlmo.table(settings),
        "beit": beit.table,
        "beit3": beit3.table,
        "clip": lambda: clip.table(settings),
        "coca": lambda: coca.table(settings),
    }
    state = tables[family]().revert(model.state_dict())
    if family == "vlmo":  # kept by the official code, and not used
        state["text_embeddings.position_embeddings.weight"] = torch.zeros(LENGTH, WIDTH)
    return {name: value.detach().contiguous() for name, value in state.items()}


FAMILIES = ("albef", "beit", "beit3", "blip", "clip", "coca", "vilt", "vlmo")


def write(family: str, folder: Path) -> tuple[torch.nn.Module, Path]:
    """A random model of ``family``, and its official file (or folder) in ``folder`` with a vocabulary beside it."""
    torch.manual_seed(0)
    model = config(family).build().eval()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    if family == "coca":
        torch.save(weights(family, model), folder / "open_clip_pytorch_model.bin")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": COCA}))
        return model, folder
    torch.save({"model": weights(family, model)}, folder / f"{family}.pth")
    return model, folder / f"{family}.pth"
