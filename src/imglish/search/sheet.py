"""A page with the pictures that a search has found."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

from imglish.data.images import ImageError, decode
from imglish.report import Report, Shown
from imglish.search.engine import Index
from imglish.search.results import Results, SearchHit

SIDE = 200  # pixels of a picture on the page


def contact_sheet(index: Index, results: Results, query: Mapping[str, str]) -> Report:
    """The hits with their pictures, places and scores; ``query``: what was asked, for the head of the page."""
    report = Report("Search", index.store.url).facts({**query, "pictures": results.total})
    if results.no_good_match:
        return report.verdict("No good match.")
    return report.pictures([Shown(picture(index, hit.key), _below(hit)) for hit in results.hits], side=SIDE)


def picture(index: Index, key: str) -> Image.Image:
    """Its thumbnail, or its original; grey where neither can be read."""
    try:
        return decode(index.thumbnail(key) or index.original(key), SIDE, name=key)
    except ImageError:
        return Image.new("RGB", (SIDE, SIDE), (128, 128, 128))


def _below(hit: SearchHit) -> str:
    match = f"match {hit.match:.2f}, " if hit.match is not None else ""
    moved = f" ({hit.moved:+d})" if hit.moved else ""
    return f"{hit.rank}{moved}: {match}cosine {hit.cosine:.2f} · {hit.key}"
