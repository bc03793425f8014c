"""What a model can do, as protocols: the jobs of floor 5 ask for these and never for a class name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from imglish.data.batch import Batch, TextBatch
from imglish.nn.segments import Segments


@dataclass(frozen=True)
class EncodedImages:
    """features: ``(B, E)`` L2-normalised, for dot products; tokens: ``(B, L, D)`` for a fusion tower, or None."""

    features: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True)
class EncodedTexts:
    """features: ``(N, E)`` L2-normalised; rows: ``(T, D)`` packed token states for a fusion tower, or None."""

    features: Tensor
    segments: Segments
    rows: Tensor | None = None


@dataclass(frozen=True)
class ImageMemory:
    """Keys and values of B pictures for every fusion layer, projected once: each ``(B * L, heads, head_dim)``."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    segments: Segments


@dataclass(frozen=True)
class Embedded:
    """What the contrastive losses read of a batch; with gradients in place of features it carries those back.

    image, text: ``(B, E)`` of the student; image_m, text_m: of the momentum teacher, or None; image_ids: ``(B,)``.
    swapped: ``(B, E)`` of the wrong captions that the data gives, where the contrast sees them.
    towers: whatever else the model's remaining losses need from the towers (private to the model).
    """

    image: Tensor
    text: Tensor
    image_ids: Tensor
    image_m: Tensor | None = None
    text_m: Tensor | None = None
    swapped: Tensor | None = None
    towers: Any = None

    def momentum(self) -> tuple[Tensor, Tensor]:
        """The teacher's features ``(image_m, text_m)``; an error where the batch was embedded without a teacher."""
        if self.image_m is None or self.text_m is None:
            raise ValueError("the batch was embedded without a momentum teacher")
        return self.image_m, self.text_m

    def surrogate(self, grads: Embedded) -> dict[str, Tensor]:
        """A loss whose gradient with respect to these features is ``grads``, in place of the contrastive loss.

        With it, accumulation over micro-batches is exact for losses that compare all samples of the large batch.
        """
        total = (self.image * grads.image).sum() + (self.text * grads.text).sum()
        if self.swapped is not None and grads.swapped is not None:
            total = total + (self.swapped * grads.swapped).sum()
        return {"itc": total}


@runtime_checkable
class EncodesImages(Protocol):
    """Turns pictures ``(B, 3, H, W)`` (uint8, or normalised floats) into features."""

    def encode_images(self, images: Tensor) -> EncodedImages: ...


@runtime_checkable
class EncodesTexts(Protocol):
    """Turns packed texts into features."""

    def encode_texts(self, texts: TextBatch) -> EncodedTexts: ...


@runtime_checkable
class Matches(Protocol):
    """Scores picture-text pairs by a fusion tower."""

    def project_images(self, tokens: Tensor) -> ImageMemory:
        """Keys and values of ``tokens (B, L, D)`` for every fusion layer."""
        ...

    def match(
        self, memory: ImageMemory, texts: EncodedTexts, image_index: Sequence[int], text_index: Sequence[int]
    ) -> Tensor:
        """ITM logits ``(P, 2)``, column 1 = matched; pair p: picture ``image_index[p]``, text ``text_index[p]``."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """A model whose training step is one call; the total loss is the sum of the entries not named ``metric/...``."""

    def embed(self, batch: Batch, teacher: Any = None) -> Embedded: ...

    def contrast(self, embedded: Embedded, teacher: Any = None) -> dict[str, Tensor]: ...

    def losses(self, batch: Batch, teacher: Any = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]: ...


class MissingCapabilityError(TypeError):
    """A job was given a model that cannot do it; the message names models that can."""


def require(model: object, capability: type, job: str) -> None:
    """Raise :class:`MissingCapabilityError` unless ``model`` has ``capability`` (one of the protocols above)."""
    if not isinstance(model, capability):
        from imglish.models.registry import families_with

        able = ", ".join(families_with(capability)) or "none yet"
        raise MissingCapabilityError(
            f"{job} needs a model that {capability.__name__.lower()}; {type(model).__name__} does not. "
            f"Families that do: {able}"
        )
