"""Where things are in a drawn scene: the pixels that change when a garment changes its colour."""

from __future__ import annotations

import numpy as np

from imglish.data.scene_drawing import draw
from imglish.data.scene_world import COLOURS, GARMENTS, Scene

Labelled = tuple[str, tuple[int, int, int, int]]
LEAST = 24  # of 255: how much a pixel of the larger picture changes, so that blurred edges do not count


def garment_boxes(scene: Scene, size: int) -> list[Labelled]:
    """What each person wears, as ("red top", (left, top, width, height)) in pixels of a picture of side ``size``.

    Only what can be seen counts: a garment that something hides in full is left out.
    """
    shown = np.asarray(draw(scene, size)).astype(int)
    found: list[Labelled] = []
    for number, person in enumerate(scene.people):
        for garment in GARMENTS:
            colour = person.colour(garment)
            if colour is None:
                continue
            changed = np.zeros(shown.shape[:2], dtype=bool)
            for other in COLOURS[COLOURS.index(colour) - 1], COLOURS[COLOURS.index(colour) - 3]:
                again = np.asarray(draw(scene.recoloured([(number, garment, other)]), size)).astype(int)
                changed |= np.abs(again - shown).max(2) > LEAST
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            if len(rows):
                left, top = int(columns[0]), int(rows[0])
                box = (left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top)
                found.append((f"{colour} {garment}", box))
    return found
