"""Sentences that class names are written into for zero-shot classification."""

from __future__ import annotations

from pathlib import Path

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "en": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a picture of a {}.",
        "a close-up photo of a {}.",
        "a photo of a small {}.",
        "a photo of a large {}.",
        "a drawing of a {}.",
    ),
    "zh": (
        "一张{}的照片。",
        "一张{}的图片。",
        "一张{}的特写照片。",
        "图片里有{}。",
        "一幅{}的画。",
    ),
}


def templates_of(name: str) -> tuple[str, ...]:
    """The templates called ``name``, or those of a file of that name, one a line, each with one ``{}``."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"templates {name!r}: neither a file nor one of {', '.join(TEMPLATES)}")
    lines = [(number, line.strip()) for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]
    for number, line in lines:
        if line and line.count("{}") != 1:
            raise ValueError(f"{path}:{number}: a template has the place of the class, {{}}, once: {line!r}")
    found = tuple(line for _, line in lines if line)
    if not found:
        raise ValueError(f"{path} holds no template")
    return found
