"""`imglish search INDEX "words"`: find pictures by words, by a picture, or by both."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imglish.search.engine import Index
    from imglish.search.results import Results

DESCRIPTION = """\
Find pictures in an index: the towers propose, the fusion tower looks again at the first 40.

  imglish search photos.index "black top, white trousers"
  imglish search photos.index "a dog" --not "grass" --where "date >= 2021-06 and path starts 'holiday/'"
  imglish search photos.index --image shirt.jpg
  imglish search photos.index "the same in red" --image shirt.jpg --json
  imglish search photos.index "a unicorn" --min-match 0.5        says so where there is no good match
  imglish search photos.index "a beach" --html beach.html        a page with the pictures

Prints place, match probability, cosine of the towers, how many places reranking moved it, and the picture's name; in
terminals of kitty, iTerm2 and others that can show pictures, these too.
"""
NO_MATCH = 3


def main(argv: Sequence[str]) -> int:
    """Status: 0 found, 1 the index or the disk failed, 2 wrong arguments or model, 3 no good match."""
    parser = argparse.ArgumentParser(
        "imglish search", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("index", help="folder or URL that imglish index made")
    add("text", nargs="?", help="what the pictures should show")
    add("--image", type=Path, help="a picture that they should look like")
    add("--not", dest="not_text", metavar="WORDS", help="what they should not show")
    add("-k", type=int, default=20, help="how many (default: 20)")
    add("--offset", type=int, default=0, metavar="N", help="leave out the first N: the next page")
    add("--rerank", type=int, default=40, metavar="N", help="pictures that the fusion tower looks at (default: 40)")
    add("--no-rerank", action="store_true", help="the towers alone")
    add("--where", help="a condition: date, path, tag, caption, width, height; docs/search.md")
    add("--min-match", type=float, metavar="P", help="leave out pictures with a smaller match probability")
    add("--feed", choices=("auto", "tokens", "thumbnails", "originals"), default="auto", help="what is reranked from")
    add("--exact", action="store_true", help="no approximation in the recall of a large index")
    add("--model", help="where the index's model lies now (default: where it lay when the index was made)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print one JSON object")
    shown.add_argument("--paths", action="store_true", help="print names alone, one a line")
    add("--html", type=Path, metavar="FILE", help="also write a page with the pictures")
    add(
        "--pictures",
        choices=("auto", "kitty", "iterm2", "sixel", "none"),
        default="auto",
        help="show them below the table (default: in terminals that are known to)",
    )
    arguments = parser.parse_intermixed_args(argv)  # the words may stand behind options

    from imglish.checkpoints.native import CheckpointError
    from imglish.data.images import ImageError
    from imglish.models.capabilities import MissingCapabilityError
    from imglish.search.store import StoreError

    try:
        return _search(arguments)
    except BrokenPipeError:
        raise  # no fault of index or disk: the reader has seen enough
    except (StoreError, OSError) as error:
        print(f"imglish search: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, ImageError, MissingCapabilityError, ValueError) as error:
        print(f"imglish search: {error}", file=sys.stderr)
        return 2


def _search(arguments: argparse.Namespace) -> int:
    from imglish.search.engine import open as open_index

    if arguments.text is None and arguments.image is None:
        raise ValueError("nothing to search for: give words, --image FILE, or both")
    index = open_index(arguments.index, arguments.model, arguments.device, arguments.feed)
    results = index.search(
        arguments.text,
        arguments.image,
        arguments.not_text,
        k=arguments.k,
        rerank=0 if arguments.no_rerank else arguments.rerank,
        where=arguments.where,
        min_match=arguments.min_match,
        offset=arguments.offset,
        exact=arguments.exact,
    )
    if arguments.json:
        print(json.dumps(results.to_dict(), ensure_ascii=False, indent=2))
    elif arguments.paths:
        print("".join(f"{hit.key}\n" for hit in results.hits), end="")
    else:
        print(_table(results))
        _show(arguments.pictures, index, results)
    if arguments.html is not None:
        from imglish.search.sheet import contact_sheet

        query = {"text": arguments.text, "image": arguments.image, "not": arguments.not_text, "where": arguments.where}
        path = contact_sheet(index, results, {name: str(value) for name, value in query.items() if value is not None})
        print(f"page: {path.save(arguments.html)}", file=sys.stderr)
    index.close()
    return NO_MATCH if results.no_good_match else 0


def _show(how: str, index: Index, results: Results) -> None:
    from imglish.search.terminal import PROTOCOLS, contact_strip, drawn, protocol_of

    chosen = next((protocol for protocol in PROTOCOLS if protocol == how), None)
    if how == "auto" and sys.stdout.isatty():
        chosen = protocol_of(os.environ)
    if chosen is not None and results.hits:
        print(drawn(contact_strip(index, results), chosen), end="")


def _table(results: Results) -> str:
    from imglish.data.errors import printable

    if results.no_good_match:
        return f"no good match among {results.total} pictures"
    if not results.hits:
        return f"nothing found ({results.total} pictures)"
    lines = [f"{'':>3}  {'match':>5}  {'cosine':>6}  {'moved':>5}"]
    for hit in results.hits:
        match = f"{hit.match:5.2f}" if hit.match is not None else "    -"
        moved = f"{hit.moved:+5d}" if hit.moved else "    ="
        lines.append(f"{hit.rank:>3}  {match}  {hit.cosine:6.3f}  {moved}  {printable(hit.key)}")
    if results.more:
        lines.append(f"more: --offset {results.hits[-1].rank}")
    if results.reranked and not results.calibrated:
        lines.append("the match is not calibrated (imglish index --calibrate)")
    return "\n".join([*lines, *(f"note: {note}" for note in results.notes)])
