"""`imglish data inspect SOURCE ...`: what there is, what is broken, double or leaking."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imglish.cli.source_options import add_source_options, source_config

if TYPE_CHECKING:
    from imglish.data.sources import Source
    from imglish.inspection.survey import Portion, Survey

DESCRIPTION = """\
Read data of any layout (docs/data.md) and tell what there is: counts, sizes, caption lengths, languages, frequent
words, exact and near duplicates, pictures that stand in several splits, broken items by reason.

  imglish data inspect photos/captions.jsonl
  imglish data inspect train-shards val-shards --pictures 50000 --out look

Prints tables; writes report.html (with pictures), errors.csv, duplicates.csv and survey.json to the folder --out.
Near duplicates need the extra: pip install 'imglish[inspect]'.
"""

MOST_SPLITS = 20  # more are no splits


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "imglish data inspect", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="file, folder or shards; several are compared like splits")
    add("--needs", choices=("pairs", "images", "texts"), help="default: pairs, else what there is")
    add("--pictures", type=int, metavar="N", help="read so many pictures of each split, evenly spread (default: all)")
    add("--workers", type=int, metavar="N", help="processes that read pictures (default: one a core)")
    add("--out", type=Path, default=Path("inspect-out"), help="folder of the results (default: inspect-out)")
    add("--quiet", action="store_true", help="no progress")
    add_source_options(parser)
    parser.set_defaults(max_errors=1.0)  # errors are what is looked for
    return parser


def main(argv: Sequence[str]) -> int:
    """Status: 0 done (whatever was found), 1 the disk failed, 2 wrong arguments or nothing that can be read."""
    arguments = _parser().parse_args(argv)
    logging.getLogger("imglish.data.errors").setLevel(logging.ERROR)  # everything that is broken is counted and listed

    from imglish.atomic import require_writable
    from imglish.data.errors import DataError
    from imglish.inspection.page import page_of, text_of
    from imglish.inspection.survey import survey

    try:
        require_writable(arguments.out)
        portions = [portion for source in arguments.sources for portion in _portions(source, arguments)]
        found = survey(portions, arguments.pictures, arguments.workers, _progress(arguments.quiet))
        print(text_of(found))
        title = ", ".join(dict.fromkeys(_name(source) for source in arguments.sources))
        out: Path = arguments.out
        out.mkdir(parents=True, exist_ok=True)
        _write(found, out)
        broken = "errors.csv" if found.reasons else None
        subtitle = f"{found.records:,} records of {', '.join(arguments.sources)}"
        print(f"report: {page_of(found, f'Data: {title}', subtitle, broken).save(out / 'report.html')}")
    except DataError as error:
        print(f"imglish data inspect: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"imglish data inspect: {error}", file=sys.stderr)
        return 1
    return 0


def _name(source: str) -> str:
    path = Path(source.rstrip("/"))
    return (
        path.parent.name if path.stem in ("captions", "metadata", "train", "data") and path.parent.name else path.name
    )


def _opened(source: str, arguments: argparse.Namespace) -> tuple[Source, Source | None, str]:
    """The records; the texts, where these are none of single pictures; and what is to be said about that."""
    from imglish.data.errors import DataError
    from imglish.data.sources import open_source
    from imglish.data.sources.fields import SEVERAL

    failed: DataError | None = None
    for needs in (arguments.needs,) if arguments.needs else ("pairs", "images", "texts"):
        try:
            found = open_source(source_config(arguments, source, needs), by_split=True)
        except DataError as error:
            failed = failed or error
            continue
        if failed is None:
            return found, None, ""
        if needs == "images" and SEVERAL in str(failed):
            texts = open_source(source_config(arguments, source, "texts"), by_split=True)
            return found, texts, "rows name several pictures each: pictures and texts were looked at apart"
        return found, None, f"{needs if needs == 'texts' else 'pictures'} alone were looked at: {failed}"
    assert failed is not None
    raise failed


def _portions(source: str, arguments: argparse.Namespace) -> list[Portion]:
    """A portion for every split that the source names or every part of a mixture, or one for the whole."""
    from imglish.data.sources.mixture import Mixture
    from imglish.inspection.survey import Portion

    whole, texts, note = _opened(source, arguments)
    if isinstance(whole, Mixture):
        named = zip(whole.names, whole.sources, strict=True)
        return [Portion(name, name, part, tuple(part.errors.named), note, mixture=source) for name, part in named]
    problems, label, alone = tuple(whole.errors.named), _name(source), len(arguments.sources) == 1
    by_split, texts_by_split = _by_split(whole), _by_split(texts) if texts is not None else {}
    if len(by_split) < 2 or len(by_split) > MOST_SPLITS:
        name = next(iter(by_split)) if alone and len(by_split) == 1 else ""
        return [Portion(name or label, source, whole, problems, note, texts)]
    return [
        Portion(
            (split or "no split") if alone else f"{label}:{split}",
            source,
            part,
            problems if number == 0 else (),
            note if number == 0 else "",
            None if texts is None else texts_by_split.get(split, ()),
        )
        for number, (split, part) in enumerate(by_split.items())
    ]


def _by_split(records: Source) -> dict[str, Source]:
    """Views of the records of each split, training first."""
    import numpy as np

    numbers: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        numbers.setdefault(record.group, []).append(number)
    names = sorted(numbers, key=lambda name: ("train" not in name.lower(), name))
    return {name: records.select(np.array(numbers[name])) for name in names}


def _progress(quiet: bool) -> Any:
    from tqdm import tqdm

    def shown(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        return tqdm(items, desc=what, total=total, disable=True if quiet else None)

    return shown


def _write(found: Survey, out: Path) -> None:
    """errors.csv, duplicates.csv (a number for each group) and survey.json."""
    problems = [(seen.name, p.reason, p.key, p.message) for seen in found.seen for p in seen.problems]
    _write_csv(out / "errors.csv", ("split", "reason", "key", "message"), problems)
    doubles = [
        (kind, number, found.seen[n].name, found.seen[n].record(i).key)
        for kind, groups in (("same bytes", found.same), ("look alike", found.near or []))
        for number, group in enumerate(groups)
        for n, i in group
    ]
    _write_csv(out / "duplicates.csv", ("kind", "group", "split", "key"), doubles)
    (out / "survey.json").write_text(json.dumps(found.to_dict(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
