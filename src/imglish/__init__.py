"""imglish: an image is a foreign language. The vision-language pre-training family in one code base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imglish.api import Caption, Found, Gallery, GenerationConfig, Model, load

__version__ = "0.1.0"
__all__ = ["Caption", "Found", "Gallery", "GenerationConfig", "Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """The interface of :mod:`imglish.api`, imported (with torch) when it is first asked for."""
    if name in __all__:
        from imglish import api

        return getattr(api, name)
    raise AttributeError(f"module 'imglish' has no attribute {name!r}")
