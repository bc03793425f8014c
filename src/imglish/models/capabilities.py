"""What a model can do, as protocols: the jobs of floor 5 ask for these and never for a class name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from imglish.data.batch import Batch, MaskedTexts, TextBatch
from imglish.nn.segments import Ragged, Segments

if TYPE_CHECKING:
    import numpy as np

    from imglish.data.pictures import Pictures
    from imglish.models.answering import RankRule
    from imglish.models.captioning import CaptionForm, CaptionState
    from imglish.models.heads import HeadConfig


@dataclass(frozen=True)
class EncodedImages:
    """features: ``(B, E)`` L2-normalised, for dot products (E = 0: a model without towers).

    tokens: for a fusion tower ``(B, L, D)``, or :class:`Ragged` rows where pictures have several sizes; or None.
    """

    features: Tensor
    tokens: Tensor | Ragged | None = None


@dataclass(frozen=True)
class EncodedTexts:
    """features: ``(N, E)`` L2-normalised (E = 0: a model without towers); rows: ``(T, D)`` packed token states for a
    fusion tower, or None."""

    features: Tensor
    segments: Segments
    rows: Tensor | None = None


@dataclass(frozen=True)
class ImageMemory:
    """What the fusion layers keep of B pictures, made once: tensors whose dim 0 are the rows of ``segments``.

    Layers with cross-attention keep (keys, values) each, ``(B * L, heads, head_dim)``. A model that reads pair
    sequences in one Transformer keeps one layer ``((rows,),)``: the picture's input embeddings ``(S, D)``.
    """

    layers: Sequence[tuple[Tensor, ...]]
    segments: Segments


@dataclass(frozen=True)
class Embedded:
    """What the contrastive losses read of a batch; with gradients in place of features it carries those back.

    image: ``(B, E)``, text: ``(n * B, E)`` of the student, n captions a picture beside each other; image_m, text_m: of
    the momentum teacher, or None; image_ids: ``(B,)``.
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
class EmbedsInputs(Protocol):
    """A model without towers: pictures and texts become the input rows of a Transformer that reads pairs.

    The features are of width 0: nothing can be compared before the pair is read.
    """

    def embed_images(self, images: Any) -> EncodedImages: ...

    def embed_texts(self, texts: TextBatch) -> EncodedTexts: ...


@runtime_checkable
class Matches(Protocol):
    """Scores picture-text pairs by a fusion tower."""

    def project_images(self, tokens: Any) -> ImageMemory:
        """What the fusion keeps of ``tokens``, ``(B, L, D)`` or :class:`Ragged`, as the model itself gave them."""
        ...

    def match(
        self, memory: ImageMemory, texts: EncodedTexts, image_index: Sequence[int], text_index: Sequence[int]
    ) -> Tensor:
        """ITM logits ``(P, 2)``, column 1 = matched; pair p: picture ``image_index[p]``, text ``text_index[p]``."""
        ...


@runtime_checkable
class Captions(Protocol):
    """Writes texts about pictures, token by token; :mod:`imglish.generation` chooses the tokens.

    The engine encodes pictures (:class:`EncodesImages`), calls :meth:`start_captions` once a block of pictures, feeds
    the prompts, and then one token of each sequence that is not finished::

        state = model.start_captions(model.encode_images(images), room=20)     # one empty sequence a picture
        logits = model.continue_captions(state, TextBatch.of(prompts))         # (B, V): after the prompts
        state.select([0, 0, 0, 1, 1, 1])                                       # three beams of each of two pictures
        logits = model.continue_captions(state, TextBatch.of([[5], [9], ...])) # (6, V): after one more token
        state.select([2, 0, 0, 4, 5])                                          # reordered; a finished one is dropped

    A decoder step of the usual kind (cross-attention to the picture, causal self-attention) reads::

        def start_captions(self, images, room):
            return CaptionState.begin(self.project_images(images.tokens), len(self.layers), room)

        def continue_captions(self, state, texts):
            step = state.cache.extend(texts.segments, state.device)
            rows = self.embedding(texts, step.positions)
            for layer, memory, cache in zip(self.layers, state.memories(), step.layers, strict=True):
                rows = layer(rows, texts.segments, memory, cache=cache)
            return self.head(rows[texts.segments.ends(rows.device)])

    Layers without cross-attention (the unimodal half of CoCa) come first and take caches only. Masked decoding
    (BEiT-3) appends [MASK] to each sequence, reads its row, and calls ``state.cache.forget(1)``, with one more row of
    room; ``memory`` then holds what its layers keep of the picture tokens.
    """

    def caption_form(self) -> CaptionForm:
        """Opening token, prompt and longest sequence; cheap, without weights."""
        ...

    def start_captions(self, images: EncodedImages, room: int) -> CaptionState:
        """One empty sequence for each of the B pictures, whose keys and values are projected here, once.

        room: tokens that a sequence will reach at most, opening token and prompt included (at most
        ``caption_form().longest``, which the engine sees to).
        """
        ...

    def continue_captions(self, state: CaptionState, texts: TextBatch) -> Tensor:
        """Append ``texts`` (one or more tokens for each of the N sequences, in their order) and say what may follow.

        Returns logits ``(N, V)`` of the token after the last one of each sequence. Changes ``state``, which the engine
        reorders between two calls (``state.select``). Called under ``torch.no_grad`` in ``eval()`` mode; logits may be
        of any floating type, V may exceed the tokenizer's vocabulary. No finished sequence and no padding is ever fed.
        """
        ...


@runtime_checkable
class FillsMasks(Protocol):
    """Predicts masked words of a text that looks at a picture."""

    def fill_masks(self, tokens: Any, masked: MaskedTexts, segments: Segments) -> Tensor:
        """Logits ``(M, V)`` of the masked rows; text b (``segments``) looks at picture b of ``tokens``, which are as
        the model gave them."""
        ...


@runtime_checkable
class Classifies(Protocol):
    """Chooses among classes for a text with its pictures; a head that fine-tuning has put on a model."""

    @property
    def head(self) -> HeadConfig: ...

    def classify(self, images: Sequence[Pictures], texts: TextBatch) -> Tensor:
        """Logits ``(B, C)`` over ``head.classes``; ``images[n]``: the n-th picture of each of the B texts."""
        ...


@runtime_checkable
class Answers(Protocol):
    """Writes an answer to a question about pictures, or ranks candidates; such a model also has the methods of
    :class:`Captions` that write, for which ``EncodedImages.tokens`` are the states of the questions."""

    @property
    def head(self) -> HeadConfig: ...

    def questions(self, images: Sequence[Pictures], texts: TextBatch) -> Ragged:
        """States of the B texts with their pictures."""
        ...

    def rank(
        self, questions: Ragged, candidates: Sequence[Sequence[int]], rule: RankRule = ..., keep: int = 5
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and scores of the best ``keep`` candidates of each question, ``(B, keep)``."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """A model whose training step is one call; the total loss is the sum of the entries not named ``metric/...``.

    ``feature_grads`` is passed to models that are :class:`Contrastive` only, and otherwise None.
    """

    def losses(self, batch: Batch, teacher: Any = None, feature_grads: Embedded | None = None) -> dict[str, Tensor]: ...


@runtime_checkable
class Contrastive(Trainable, Protocol):
    """A trainable model one of whose losses compares all pairs of the batch by features: with accumulation this loss
    is taken over the features of all parts."""

    def embed(self, batch: Batch, teacher: Any = None) -> Embedded: ...

    def contrast(self, embedded: Embedded, teacher: Any = None) -> dict[str, Tensor]: ...


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


def can(model: object, capability: type) -> bool:
    """Whether a model, or a class of models, has ``capability``."""
    return issubclass(model, capability) if isinstance(model, type) else isinstance(model, capability)


def has_towers(model: object) -> bool:
    """Whether pictures and texts can be compared by dot product, by a model or the models of a class."""
    return can(model, EncodesImages) and can(model, EncodesTexts)


def image_encoder(model: object, job: str) -> Callable[[Any], EncodedImages]:
    """The model's ``encode_images``, or ``embed_images`` where it has no towers; else MissingCapabilityError."""
    if isinstance(model, EmbedsInputs) and not isinstance(model, EncodesImages):
        return model.embed_images
    require(model, EncodesImages, job)
    assert isinstance(model, EncodesImages)
    return model.encode_images


def text_encoder(model: object, job: str) -> Callable[[TextBatch], EncodedTexts]:
    """The model's ``encode_texts``, or ``embed_texts`` where it has no towers; else MissingCapabilityError."""
    if isinstance(model, EmbedsInputs) and not isinstance(model, EncodesTexts):
        return model.embed_texts
    require(model, EncodesTexts, job)
    assert isinstance(model, EncodesTexts)
    return model.encode_texts
