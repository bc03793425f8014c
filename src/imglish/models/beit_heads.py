"""BEiT fine-tuned to tell classes of pictures (Bao et al. 2022, section 2.6; BEiT-2 does the same)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imglish.models.beit import Beit, BeitBody
from imglish.models.multiway import init_multiway
from imglish.nn.relative import RelativeBias


class BeitClassifier(nn.Module):
    """The mean of the patches, a norm, a linear layer. Every layer of the body has a table of relative positions of its
    own."""

    def __init__(self, body: BeitBody, classes: int = 1000) -> None:
        super().__init__()
        self.body = body
        self.norm = nn.LayerNorm(body.config.width, eps=body.config.norm_eps)
        self.head = class_layer(body.config.width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` -> logits ``(B, classes)``."""
        states = self.body.transform(*self.body.rows(self.body.patch_embed(images))).unflatten(0, (len(images), -1))
        logits: Tensor = self.head(self.norm(states[:, 1:].mean(1)))
        return logits


def with_own_tables(base: Beit) -> BeitBody:
    """The body of ``base``, which is taken over; the tables of its layers begin as copies of its one table."""
    body = BeitBody(base.config, own_tables=True)
    body.patch_embed, body.class_token, body.blocks = base.patch_embed, base.class_token, base.blocks
    assert isinstance(base.relative, RelativeBias)
    assert isinstance(body.relative, nn.ModuleList)
    shared = base.relative.state_dict()
    for table in body.relative:
        if not base.relative.table.is_meta:  # else its values come from a file
            table.load_state_dict(shared)
    return body


def class_layer(width: int, classes: int) -> nn.Linear:
    """The last layer of the released classifiers: it begins near zero, so that all classes are equally probable."""
    layer = nn.Linear(width, classes)
    init_multiway(layer, width)
    with torch.no_grad():
        layer.weight.mul_(0.001)
    return layer
