"""imglish: an image is a foreign language. The vision-language pre-training family in one code base."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imglish.api import Answer, Caption, Found, Gallery, GenerationConfig, Model, load

# Packed rows give matrix products new sizes in every step. On CPUs torch and, below it, oneDNN keep the code that they
# compiled for the last 1,024 sizes each, about half a MiB a size, although few ever come back (docs/train.md).
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")

__version__ = "0.1.0"
__all__ = ["Answer", "Caption", "Found", "Gallery", "GenerationConfig", "Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """The interface of :mod:`imglish.api`, imported (with torch) when it is first asked for."""
    if name in __all__:
        from imglish import api

        return getattr(api, name)
    raise AttributeError(f"module 'imglish' has no attribute {name!r}")
