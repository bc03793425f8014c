"""A survey as tables for the terminal and as one HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from imglish.data.errors import Problem, printable
from imglish.data.images import ImageError, decode
from imglish.inspection.captions import suspicious
from imglish.inspection.duplicates import NEAR
from imglish.inspection.survey import Overlap, Seen, Survey
from imglish.report import Histogram, Report, Shown

SHEET = 24  # pictures of the sheet
GROUPS = 8  # groups of duplicates that are shown
IN_GROUP = 6  # pictures of a group that are shown
BINS = 40
FEW = 6  # different values that are shown as bars rather than as a histogram
CAPTION = 140  # characters of a caption that are shown
SIDE = 200  # pixels of a shown picture, for screens of double density

Place = tuple[int, int]


def text_of(survey: Survey) -> str:
    """The survey as plain text, for the terminal."""
    parts = ["\n".join(_aligned(("", *_COUNTED), [(seen.name, *_counts(seen)) for seen in survey.seen]))]
    if survey.reasons:
        rows = [(reason, str(count), _example(survey, reason)) for reason, count in survey.reasons.most_common()]
        parts.append("\n".join(_aligned(("broken", "items", "for example"), rows, left=(0, 2))))
    parts.append("\n".join(f"{'!' if warns else '-'} {line}" for line, warns in findings(survey)))
    return "\n\n".join(parts)


_COUNTED = ("pictures", "captions", "each", "words", "broken", "sizes", "languages")


def _counts(seen: Seen) -> tuple[str, ...]:
    captions, pictures = seen.captions, seen.pictures
    each = captions.per_picture
    return (
        f"{len(seen.portion.records):,}" if pictures is not None else "0",
        f"{len(captions):,}",
        (f"{each.min()}" if each.min() == each.max() else f"{each.min()}-{each.max()}") if len(each) else "-",
        f"{captions.lengths.mean():.1f}" if len(captions) else "-",
        f"{len(seen.problems):,}",
        _sizes(seen) if pictures is not None and len(pictures) else "-",
        _languages(captions.languages),
    )


def _sizes(seen: Seen) -> str:
    assert seen.pictures is not None
    shorter = np.minimum(seen.pictures.widths, seen.pictures.heights)
    sizes = set(zip(seen.pictures.widths.tolist(), seen.pictures.heights.tolist()))
    if len(sizes) == 1:
        return "{}x{}".format(*next(iter(sizes)))
    low, middle, high = np.percentile(shorter, [0, 50, 100]).astype(int)
    return f"shorter side {low}" if low == high else f"shorter side {low} to {high}, middle {middle}"


def _languages(languages: Counter[str]) -> str:
    total = sum(languages.values())
    return ", ".join(
        f"{name} {100 * count / total:.0f}%" for name, count in languages.most_common(3) if count >= 0.01 * total
    )


def _aligned(headers: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Columns to the right, those in ``left`` to the left."""
    cells = [tuple(headers), *map(tuple, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]


# ---- what is worth knowing ----------------------------------------------------------------------------------------


def findings(survey: Survey) -> list[tuple[str, bool]]:
    """Sentences, most important first; True for those that are warnings."""
    found: list[tuple[str, bool]] = []
    for overlap in survey.overlaps:
        found += _about(overlap)
    broken = sum(survey.reasons.values())
    if broken:
        percent = 100 * broken / (survey.records + sum(len(seen.portion.problems) for seen in survey.seen))
        found.append((f"{_number(broken, 'item is', 'items are')} broken ({percent:.2g} %)", True))
    copies = sum(len(group) - 1 for group in survey.same)
    if copies:
        found.append((f"{_number(copies, 'exact copy', 'exact copies')} of another picture", True))
    if survey.near:
        alike = sum(len(group) - 1 for group in survey.near)
        found.append((f"{_number(alike, 'further picture looks', 'further pictures look')} like another one", False))
    if survey.near is None and any(seen.pictures is not None for seen in survey.seen):
        found.append(("near duplicates were not looked for: pip install 'imglish[inspect]'", False))
    for seen in survey.seen:
        if seen.portion.note:
            found.append((f"{seen.name}: {shortened(seen.portion.note, 200)}", False))
        strange = ", ".join(f"{count:,} with {what}" for what, count in suspicious(seen.captions).items())
        if strange:
            found.append((f"{seen.name}: captions of a suspicious length: {strange}", False))
        if seen.captions.repeated and seen.captions.repeated[0][1] > max(10, 0.01 * len(seen.captions.per_picture)):
            text, count = seen.captions.repeated[0]
            what = "pictures have" if seen.pictures is not None and seen.portion.texts is None else "rows have"
            found.append((f'{seen.name}: {count:,} {what} the caption "{shortened(text, 60)}"', True))
        if seen.pictures is not None and seen.looked < len(seen.portion.records):
            share = f"{seen.looked:,} of {len(seen.portion.records):,} pictures"
            found.append((f"{seen.name}: {share} were read, evenly spread", False))
    found.sort(key=lambda item: not item[1])
    return found or [("nothing is broken, double or shared between splits", False)]


def _about(overlap: Overlap) -> list[tuple[str, bool]]:
    found, one, two = [], overlap.one, overlap.two
    leak = "double in the mixture" if overlap.mixed else "leak"
    if overlap.keys:
        names = _number(overlap.keys, f"picture of {two} stands", f"pictures of {two} stand")
        found.append((f"{leak}: {names} in {one} too, by name", True))
    if overlap.same:
        pictures = _number(len(overlap.same), f"picture of {two} stands", f"pictures of {two} stand")
        found.append((f"{leak}: {pictures} in {one} too, byte for byte", True))
    if overlap.near:
        pictures = _number(len(overlap.near), f"picture of {two} looks", f"pictures of {two} look")
        found.append((f"possible {leak}: {pictures} like one of {one}", True))
    return found


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def shortened(text: str, most: int = CAPTION) -> str:
    """``text`` in one harmless line of at most ``most`` characters."""
    return printable(text, most)


def _example(survey: Survey, reason: str) -> str:
    return shortened(next(p.message for seen in survey.seen for p in seen.problems if p.reason == reason), 100)


# ---- the page -----------------------------------------------------------------------------------------------------


@dataclass
class _Page:
    survey: Survey
    report: Report

    def shown(self, place: Place, caption: str | None = None, good: bool | None = None) -> Shown:
        """A picture with its name or its first caption."""
        record = self.survey.seen[place[0]].record(place[1])
        if caption is None:
            first = shortened(record.captions[0]) if record.captions else record.key
            caption = first + (f" (+{len(record.captions) - 1})" if len(record.captions) > 1 else "")
        try:
            picture = decode(record.image, SIDE, name=record.key)
            picture.thumbnail((2 * SIDE, SIDE))
        except ImageError:  # it was readable a moment ago
            picture = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
        return Shown(picture, caption, good)

    def label(self, place: Place) -> str:
        seen = self.survey.seen[place[0]]
        name = shortened(seen.record(place[1]).key, 60)
        return f"{seen.name}: {name}" if len(self.survey.seen) > 1 else name


def page_of(survey: Survey, title: str, subtitle: str, errors_file: str | None = None) -> Report:
    """The survey as a page. errors_file: name of the file that lists everything that is broken."""
    report = Report(title, subtitle)
    page = _Page(survey, report)
    report.verdict("\n".join(f"- **{line}**" if warns else f"- {line}" for line, warns in findings(survey)))
    report.table(["", *_COUNTED], [(seen.name, *_counts(seen)) for seen in survey.seen], wide=(6, 7))
    _sheet(page)
    _broken(page, errors_file)
    _overlaps(page)
    _doubles(page)
    _picture_charts(page)
    _caption_charts(page)
    return report


def _sheet(page: _Page) -> None:
    counts = [len(seen.pictures) if seen.pictures is not None else 0 for seen in page.survey.seen]
    if not sum(counts):
        return
    page.report.heading("Pictures and captions")
    for number, (seen, count) in enumerate(zip(page.survey.seen, counts)):
        wanted = min(count, max(6, round(SHEET * count / sum(counts))))
        chosen = sorted(np.random.default_rng(0).permutation(count)[:wanted].tolist())
        shown = [page.shown((number, place)) for place in chosen]
        page.report.pictures(shown, seen.name if len(counts) > 1 else "", side=150)


def _broken(page: _Page, errors_file: str | None) -> None:
    problems = [problem for seen in page.survey.seen for problem in seen.problems]
    if not problems:
        return
    page.report.heading("Broken")
    rows = []
    for reason, count in page.survey.reasons.most_common():
        some: list[Problem] = [problem for problem in problems if problem.reason == reason][:3]
        rows.append((reason, f"{count:,}", "; ".join(shortened(problem.message, 160) for problem in some)))
    page.report.table(["reason", "items", "for example"], rows, wide=(2,))
    if errors_file is not None:
        page.report.note(f"All of them are named in `{errors_file}`.")


def _overlaps(page: _Page) -> None:
    if not page.survey.overlaps:
        return
    if all(overlap.mixed for overlap in page.survey.overlaps):
        page.report.heading("Shared between parts of the mixture")
        text = "A picture that two parts have counts as two: the captions of the one count as wrong for the other."
    else:
        page.report.heading("Shared between splits")
        text = "Pictures that stand in a training and in an evaluation split make results look better than they are."
    page.report.text(f"{text} Equal captions are usual where captions are short.")
    rows = [
        (f"{o.two} in {o.one}", o.keys, len(o.same), "-" if o.near is None else len(o.near), o.captions)
        for o in page.survey.overlaps
    ]
    page.report.table(["", "same name", "same bytes", "look alike", "same caption"], rows)
    names = [seen.name for seen in page.survey.seen]
    for overlap in page.survey.overlaps:
        one, two = names.index(overlap.one), names.index(overlap.two)
        pairs = [(pair, "same bytes") for pair in overlap.same] + [(pair, "look alike") for pair in overlap.near or []]
        if pairs:
            page.report.text(f"### {overlap.two} and {overlap.one}: {len(pairs):,} pairs")
        shown = [
            page.shown(place, f"{page.label(place)} ({why})", good=False if why == "same bytes" else None)
            for (a, b), why in pairs[: GROUPS // 2 + 2]
            for place in ((one, a), (two, b))
        ]
        if shown:
            page.report.pictures(shown, side=150)


def _doubles(page: _Page) -> None:
    survey = page.survey
    for groups, title, text in (
        (survey.same, "Exact copies", "Files with the same bytes."),
        (
            survey.near or [],
            "Near duplicates",
            f"Pictures whose perceptual hashes differ by at most {NEAR} of 64 bits: often the same photograph cut or "
            "compressed differently, sometimes only two pictures of one simple composition.",
        ),
    ):
        if not groups:
            continue
        page.report.heading(title)
        more = f" {len(groups):,} groups; the largest:" if len(groups) > GROUPS else ""
        page.report.text(text + more)
        for group in groups[:GROUPS]:
            rest = f" (first {IN_GROUP} of {len(group):,})" if len(group) > IN_GROUP else ""
            shown = [page.shown(place, page.label(place)) for place in group[:IN_GROUP]]
            page.report.pictures(shown, f"{len(group):,} pictures{rest}", side=130)


# ---- charts -------------------------------------------------------------------------------------------------------


def _picture_charts(page: _Page) -> None:
    all_of = [seen.pictures for seen in page.survey.seen if seen.pictures is not None and len(seen.pictures)]
    if not all_of:
        return
    page.report.heading("Sizes")
    widths, heights, sizes = (
        np.concatenate([getattr(pictures, name) for pictures in all_of]) for name in ("widths", "heights", "sizes")
    )
    forms = Counter(form for pictures in all_of for form in pictures.forms)
    bars: dict[str, dict[str, float]] = {"Formats": dict(forms.most_common())}
    histograms: dict[str, Histogram] = {}
    for title, values, unit, log in (
        ("Shorter side", np.minimum(widths, heights).astype(float), "pixels", False),
        ("Width over height", widths / heights, "", True),
        ("File size", sizes / 1024, "KiB", False),
    ):
        _spread(title, values, unit, log, bars, histograms)
    page.report.bars(bars)
    if histograms:
        page.report.histograms(histograms, "pictures")
    places = [
        (n, i)
        for n, seen in enumerate(page.survey.seen)
        if seen.pictures is not None
        for i in range(len(seen.pictures))
    ]
    ratio, area = widths / heights, widths * heights
    extremes = {
        "widest": ratio.argmax(),
        "tallest": ratio.argmin(),
        "largest": area.argmax(),
        "smallest": area.argmin(),
    }
    if len(set(zip(widths.tolist(), heights.tolist()))) > 1:
        shown = [page.shown(places[i], f"{what}: {widths[i]}x{heights[i]}") for what, i in extremes.items()]
        page.report.pictures(shown, "Extremes", side=150)


def _spread(
    title: str,
    values: np.ndarray,
    unit: str,
    log: bool,
    bars: dict[str, dict[str, float]],
    histograms: dict[str, Histogram],
) -> None:
    """Few different values as bars, many as a histogram without the furthest percent."""
    kept = values[values > 0]
    if not len(kept):
        return
    different, counts = np.unique(np.round(kept, 2), return_counts=True)
    if len(different) <= FEW:
        bars[title] = {f"{value:g} {unit}".strip(): int(count) for value, count in zip(different, counts)}
        return
    low, high = np.percentile(kept, [0.5, 99.5])
    inner = kept[(kept >= low) & (kept <= high)]
    edges = np.geomspace(low, high, BINS + 1) if log else np.linspace(low, high, BINS + 1)
    counts, edges = np.histogram(inner, edges)
    histograms[title] = Histogram(edges.tolist(), counts.tolist(), unit, log)


def _caption_charts(page: _Page) -> None:
    all_of = [seen.captions for seen in page.survey.seen if len(seen.captions)]
    if not all_of:
        return
    page.report.heading("Captions")
    lengths = np.concatenate([captions.lengths for captions in all_of])
    most = int(np.percentile(lengths, 99.5)) + 2
    counts = np.bincount(np.minimum(lengths, most), minlength=most + 1)[:most]
    languages: Counter[str] = Counter()
    common: Counter[str] = Counter()
    repeated: Counter[str] = Counter()
    for captions in all_of:
        languages.update(captions.languages)
        common.update(dict(captions.common))
        repeated.update(dict(captions.repeated[:20]))
    edges = [edge - 0.5 for edge in range(most + 1)]
    page.report.histograms({"Length": Histogram(edges, counts.tolist(), "words")}, "captions")
    words = common.most_common(40)
    bars = {"Languages (a guess by letters and function words)": dict(languages.most_common(8))}
    halves = {"Most frequent words": dict(words[:20]), "and after them": dict(words[20:])}
    page.report.bars(bars | {title: half for title, half in halves.items() if half}, [t for t in halves if halves[t]])
    vocabulary = max(captions.vocabulary for captions in all_of)
    page.report.note(f"{vocabulary:,} different words in the largest split; function words are left out above.")
    if repeated:
        rows = [(shortened(text), f"{count:,}") for text, count in repeated.most_common(12)]
        page.report.table(["Captions that several pictures have", "pictures"], rows)
