"""Dual encoders from before CLIP and beside it, as configurations of :class:`imglish.models.clip.Clip`.

VSE++ (Faghri et al. 2018), ALIGN (Jia et al. 2021), WenLan (Huo et al. 2021). `docs/models.md` says what each
reproduces of its paper and what not.
"""

from __future__ import annotations

from collections.abc import Callable

from imglish.models.clip import ClipConfig, EfficientNetConfig, ResNetConfig, clip_vit
from imglish.models.text_towers import BertConfig, GruConfig
from imglish.models.vit import ImageInput
from imglish.objectives.momentum import TeacherConfig

HALF = (0.5, 0.5, 0.5)


def vsepp() -> ClipConfig:
    """VSE++: a convolutional network, a GRU over word vectors, and the hardest negative of the batch."""
    return ClipConfig(
        vision=ResNetConfig(),
        text=GruConfig(),
        vocab_size=12000,
        max_length=64,
        embed_dim=1024,
        loss="hinge",
        margin=0.2,
    )


def align_base() -> ClipConfig:
    """ALIGN as kakaobrain/align-base has it: EfficientNet-B7 without its last convolution, and BERT-base; 171.9 M."""
    return ClipConfig(
        vision=EfficientNetConfig(ImageInput(289, HALF, HALF, resize="center"), 2.0, 3.1, top=None),
        text=BertConfig(),
        vocab_size=30522,
        max_length=512,
        embed_dim=640,
        image_projection=False,
        temperature=1.0,
    )


def wenlan() -> ClipConfig:
    """WenLan's two-tower model with cross-modal MoCo: EfficientNet-B7, a Chinese BERT, momentum 0.99, queue 16,384."""
    return ClipConfig(
        vision=EfficientNetConfig(ImageInput(600, resize="squash"), 2.0, 3.1),
        text=BertConfig(),
        vocab_size=21128,
        max_length=80,
        embed_dim=2560,
        teacher=TeacherConfig(momentum=0.99, queue_size=16384, alpha=0.0, ramp_epochs=0.0),
    )


def vsepp_small() -> ClipConfig:
    """About 5 M parameters (4,000 words), for thousands of real photographs and CPUs."""
    return ClipConfig(
        vision=ResNetConfig(ImageInput(96, resize="center"), (1, 1, 1, 1), 24, heads=12),
        text=GruConfig(word_width=192, width=256),
        vocab_size=4000,
        max_length=64,
        embed_dim=256,
        loss="hinge",
        margin=0.2,
    )


def align_small() -> ClipConfig:
    """About 5 M parameters (4,000 words): an EfficientNet of a third of B0's width, and four layers of BERT."""
    return ClipConfig(
        vision=EfficientNetConfig(ImageInput(96, HALF, HALF, resize="center"), 0.75, 0.5, top=None),
        text=BertConfig(192, 4, 3, 768, dropout=0.0),
        vocab_size=4000,
        max_length=64,
        embed_dim=128,
        temperature=0.07,
    )


def wenlan_small() -> ClipConfig:
    """About 5 M parameters (4,000 words): a vision Transformer, four layers of BERT, momentum copies and a queue."""
    return ClipConfig(
        vision=clip_vit(80, 16, 192, 4, 3, activation="gelu"),
        text=BertConfig(192, 4, 3, 768, dropout=0.0),
        vocab_size=4000,
        max_length=64,
        embed_dim=128,
        teacher=TeacherConfig(momentum=0.99, queue_size=1024, alpha=0.0, ramp_epochs=0.0),
    )


CONFIGS: dict[str, Callable[[], ClipConfig]] = {
    "vsepp": vsepp,
    "vsepp-small": vsepp_small,
    "align-base": align_base,
    "align-small": align_small,
    "wenlan": wenlan,
    "wenlan-small": wenlan_small,
}
