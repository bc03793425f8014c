"""Image tokens kept on the host between encoding and reranking, in bounded memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from imglish.nn.segments import Ragged, Segments


class TokenStore:
    """Blocks of image tokens, ``(B, L, D)`` or ragged rows: in memory up to ``limit`` bytes, the rest in a temp folder.

    ``dtype``: how they are kept; bfloat16 halves the memory and rounds what the fusion reads to 8 bits of mantissa.
    A context manager: leaving it deletes the folder.
    """

    def __init__(self, dtype: torch.dtype, limit: int) -> None:
        self.dtype = dtype
        self.limit = limit
        self.held = 0
        self._blocks: dict[int, Tensor | Path] = {}
        self._segments: dict[int, Segments] = {}  # of ragged blocks
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, block: int, tokens: Tensor | Ragged) -> None:
        """Keep a block; from a GPU it is copied to the host."""
        rows = tokens if isinstance(tokens, Tensor) else tokens.rows
        kept = rows.detach().to("cpu", self.dtype).contiguous()
        size = kept.numel() * kept.element_size()
        if not isinstance(tokens, Tensor):
            self._segments[block] = tokens.segments
        if self.held + size <= self.limit:
            self._blocks[block] = kept
            self.held += size
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="imglish-tokens-")
        path = Path(self._folder.name) / f"{block}.safetensors"
        save_file({"tokens": kept}, path)
        self._blocks[block] = path

    def get(self, block: int) -> Tensor | Ragged:
        """A block on the host; a block never put is a KeyError."""
        kept = self._blocks[block]
        rows = kept if isinstance(kept, Tensor) else load_file(kept)["tokens"]
        return Ragged(rows, self._segments[block]) if block in self._segments else rows

    def on_disk(self) -> int:
        """How many blocks did not fit into memory."""
        return sum(isinstance(kept, Path) for kept in self._blocks.values())

    def close(self) -> None:
        self._blocks.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
