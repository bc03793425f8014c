"""What the models of expert blocks have in common: the sizes of their Transformer, and which expert does what where.

BEiT, VLMo and both forms of BEiT-3 are one idea: pictures as patches behind a class token, texts as words, one stack of
blocks. What tells them apart is ``block(layer)`` of each configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from imglish.models.vit import ImageInput
from imglish.nn.experts import ExpertBlockConfig
from imglish.nn.packing import BY_MODALITY, FUSED_APART, Route

HALF = (0.5, 0.5, 0.5)
"""Mean and deviation of their pictures' channels, of pixels in 0..1."""


@dataclass(frozen=True)
class PictureSizes:
    """Of a Transformer that reads pictures; the defaults are the published base models.

    patch: side of a patch in pixels; width, depth, heads, hidden: of the stack and of its feed-forwards; drop_path:
    stochastic depth, growing from zero to this in the last layer.
    """

    image: ImageInput = field(default_factory=lambda: ImageInput(224, HALF, HALF))
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    norm_eps: float = 1e-6
    drop_path: float = 0.1

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image.size // self.patch

    @property
    def tokens(self) -> int:
        """Of a picture: patches and the class token."""
        return self.grid**2 + 1

    def __post_init__(self) -> None:
        if self.image.size % self.patch:
            raise ValueError(f"image size {self.image.size} is not a multiple of patch size {self.patch}")

    def sized(self, layer: int, attention: Route, feed_forward: Route) -> ExpertBlockConfig:
        """Block number ``layer`` with these experts; what else it has is for the model to add."""
        return ExpertBlockConfig(
            width=self.width,
            heads=self.heads,
            hidden=self.hidden,
            attention=attention,
            feed_forward=feed_forward,
            norm_eps=self.norm_eps,
            drop_path=self.drop_path * layer / max(1, self.depth - 1),
        )


@dataclass(frozen=True)
class PairSizes(PictureSizes):
    """Of one that reads texts and pairs too. max_length: longest text; fused_layers: layers on top with an expert for
    pairs."""

    vocab_size: int = 30522
    max_length: int = 40
    fused_layers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fused_layers < self.depth:
            raise ValueError(f"fused_layers {self.fused_layers} must lie between 0 and depth - 1 = {self.depth - 1}")

    def feed_forward(self, layer: int) -> Route:
        """By modality, and in the layers on top pairs apart."""
        return FUSED_APART if layer >= self.depth - self.fused_layers else BY_MODALITY
