"""Codes of pictures as training targets: the frozen visual tokenizer of BEiT and BEiT-3."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class TokenizesImages(Protocol):
    """Turns pictures into codes of a vocabulary: :mod:`imglish.models.dvae`, :mod:`imglish.models.vqkd`."""

    @property
    def codes(self) -> int:
        """Size of the vocabulary."""
        ...

    def tokenize(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pictures uint8 ``(B, 3, H, W)`` -> int64 ``(B, rows * columns)``, a code for each cell of ``grid``."""
        ...


class CodeTeacher:
    """Holds the tokenizer for a training run, which neither trains nor saves it."""

    def __init__(self, tokenizer: nn.Module | None, codes: int) -> None:
        if not isinstance(tokenizer, TokenizesImages):
            found = "none is named" if tokenizer is None else f"{type(tokenizer).__name__} is none"
            raise ValueError(f"this needs a visual tokenizer (dvae, vqkd), and {found}")
        if tokenizer.codes != codes:
            raise ValueError(f"the tokenizer has {tokenizer.codes} codes, the model {codes}: set model.codes to it")
        assert isinstance(tokenizer, nn.Module)
        self.model = tokenizer.eval().requires_grad_(False)
        self._tokenizer: TokenizesImages = tokenizer

    def codes(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Codes ``(B, rows * columns)`` of whole pictures, uint8 ``(B, 3, H, W)``."""
        return self._tokenizer.tokenize(images, grid)

    def at(self, epochs: float) -> None:
        """Nothing here depends on the progress of training."""

    def update(self, model: nn.Module) -> None:
        """Nothing is learned from a step."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the tokenizer comes from the recipe."""
