"""Reports as one self-contained HTML file: text, tables, curves and pictures, readable in light and dark.

Everything is embedded (curves as SVG, pictures as base64), nothing is requested from anywhere, and everything that is
not markup of this module is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

Points = Sequence[tuple[float, float]]
PictureSource = Image.Image | Path | bytes | np.ndarray | torch.Tensor

SERIES = 8  # colours; a ninth curve would be hard to tell apart anyway
MOST_POINTS = 400  # of a curve; longer ones are averaged over equal stretches
_INK, _LINE = "#010203", "#030201"  # stand for the page's colours until the SVG is inside it
_COLOURS = tuple(f"#0a0b{i:02x}" for i in range(SERIES))


@dataclass(frozen=True)
class Shown:
    """A picture with what stands below it; ``good``: green frame for True, red for False, grey for None."""

    picture: PictureSource
    caption: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Histogram:
    """counts: how many lie between two of the ``edges``, which are one more; x: what is counted; log: of the x axis."""

    edges: Sequence[float]
    counts: Sequence[float]
    x: str = ""
    log: bool = False


class Report:
    """Parts are added in order; :meth:`html` or :meth:`save` at the end.

    >>> Report("A run").text("It **worked**.").table(["k", "R@k"], [["1", "12.0"]]).save("out/report.html")
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._parts: list[Markup] = []
        self._scripts: list[str] = []

    # ---- parts ----------------------------------------------------------------------------------------------------

    def heading(self, text: str) -> Report:
        """A heading; all of these methods return the report, for chains."""
        return self._add(Markup("<h2>{}</h2>").format(text))

    def text(self, text: str) -> Report:
        """Paragraphs apart by blank lines; ``## heading``, ``### heading``, ``- item``, ``**bold**``, `` `code` ``."""
        return self._add(_markdown(text))

    def verdict(self, text: str) -> Report:
        """What came out, set apart from the rest."""
        return self._add(Markup('<div class="verdict">{}</div>').format(_markdown(text)))

    def note(self, text: str) -> Report:
        """Small text below something."""
        return self._add(Markup('<p class="note">{}</p>').format(_inline(text)))

    def facts(self, facts: Mapping[str, object]) -> Report:
        """Names and values, one a line."""
        rows = Markup("").join(Markup("<dt>{}</dt><dd>{}</dd>").format(k, str(v)) for k, v in facts.items())
        return self._add(Markup("<dl>{}</dl>").format(rows))

    def table(
        self,
        headers: Sequence[str],
        rows: Iterable[Sequence[object]],
        caption: str = "",
        best: Sequence[int] = (),
        wide: Sequence[int] = (),
    ) -> Report:
        """First column to the left, the others to the right; in the columns ``best`` the largest numbers are marked;
        the columns ``wide`` hold running text."""
        cells = [[str(cell) for cell in row] for row in rows]
        if any(len(row) != len(headers) for row in cells):
            raise ValueError(f"a row of the table has not {len(headers)} cells: {headers}")
        tops = {column: max(map(_number, (row[column] for row in cells)), default=-np.inf) for column in best}
        body = Markup("").join(
            Markup("<tr>{}</tr>").format(
                Markup("").join(
                    Markup(_cell(i in wide, _is_top(cell, tops.get(i)))).format(cell) for i, cell in enumerate(row)
                )
            )
            for row in cells
        )
        head = Markup("").join(
            Markup('<th class="wide">{}</th>' if i in wide else "<th>{}</th>").format(h) for i, h in enumerate(headers)
        )
        title = Markup("<caption>{}</caption>").format(caption) if caption else ""
        frame = '<div class="scroll"><table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
        return self._add(Markup(frame).format(title, head, body))

    def curves(self, series: Mapping[str, Points], title: str, x: str = "step", y: str = "") -> Report:
        """One chart; see :meth:`charts`."""
        return self.charts({title: series}, x, y)

    def charts(self, charts: Mapping[str, Mapping[str, Points]], x: str = "step", y: str = "") -> Report:
        """Line charts side by side, title -> name -> points (x, y); values that are not finite are left out."""
        figures = Markup("").join(_chart(title, series, x, y) for title, series in charts.items())
        return self._add(Markup('<div class="charts">{}</div>').format(figures))

    def histograms(self, charts: Mapping[str, Histogram], y: str = "") -> Report:
        """Histograms side by side, by title."""
        figures = Markup("").join(_histogram(title, histogram, y) for title, histogram in charts.items())
        return self._add(Markup('<div class="charts">{}</div>').format(figures))

    def bars(self, charts: Mapping[str, Mapping[str, float]], alike: Sequence[str] = ()) -> Report:
        """Horizontal bars side by side: title -> name -> number, of which the largest is as long as the chart. Charts
        whose titles are in ``alike`` have one scale."""
        most = {title: max(values.values(), default=0) for title, values in charts.items()}
        most.update(dict.fromkeys(alike, max((most[title] for title in alike), default=0)))
        figures = Markup("").join(_bars(title, values, most[title]) for title, values in charts.items())
        return self._add(Markup('<div class="charts">{}</div>').format(figures))

    def pictures(self, pictures: Iterable[Shown], title: str = "", side: int = 120) -> Report:
        """A grid of pictures ``side`` CSS pixels wide."""
        head = Markup("<h3>{}</h3>").format(title) if title else Markup("")
        return self._add(head + _grid(pictures, side))

    def compare(self, query: str, rows: Mapping[str, Iterable[Shown]], side: int = 96) -> Report:
        """A query, and below it what each way of ranking found: label -> pictures."""
        lines = Markup("").join(
            Markup('<div class="label">{}</div>{}').format(label, _grid(pictures, side))
            for label, pictures in rows.items()
        )
        return self._add(Markup('<div class="query">{}</div><div class="rows">{}</div>').format(query, lines))

    def interactive(self, markup: Markup, script: str) -> Report:
        """Own markup with a script of this package, which the page runs after all parts; of no other code does it run
        any. The script asks for nothing from outside, and without it the markup has to make sense."""
        if "</script" in script.lower():
            raise ValueError("a script must not hold its own end tag")
        if script not in self._scripts:
            self._scripts.append(script)
        return self._add(markup)

    # ---- result ---------------------------------------------------------------------------------------------------

    def html(self) -> str:
        """The page as one text, complete and without requests."""
        page = _environment().get_template("report.html")
        scripts = [Markup(script) for script in self._scripts]
        digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in self._scripts]
        allowed = Markup("; script-src {}").format(Markup(" ").join(Markup("'sha256-{}'").format(d) for d in digests))
        return page.render(
            title=self.title,
            subtitle=self.subtitle,
            parts=self._parts,
            version=_version(),
            scripts=scripts,
            allowed=allowed if scripts else "",
        )

    def save(self, path: str | Path) -> Path:
        """Write the file, with its folder, at once or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(self.html(), encoding="utf-8")
        os.replace(unfinished, path)
        return path

    def _add(self, part: Markup) -> Report:
        self._parts.append(part)
        return self


def _environment() -> Environment:
    return Environment(loader=PackageLoader("imglish", "."), autoescape=select_autoescape(default=True))


def _version() -> str:
    try:
        return version("imglish")
    except PackageNotFoundError:
        return "(not installed)"


# ---- text ---------------------------------------------------------------------------------------------------------


def _inline(text: str) -> Markup:
    marked = str(escape(text))
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", marked)
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", marked))


def _markdown(text: str) -> Markup:
    made = Markup("")
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in block.splitlines()]
        if heading := re.fullmatch(r"(##+) (.+)", block.strip()):
            made += Markup(f"<h{len(heading[1])}>{{}}</h{len(heading[1])}>").format(_inline(heading[2]))
        elif all(line.startswith("- ") for line in lines):
            items = Markup("").join(Markup("<li>{}</li>").format(_inline(line[2:])) for line in lines)
            made += Markup("<ul>{}</ul>").format(items)
        else:
            made += Markup("<p>{}</p>").format(_inline(" ".join(lines)))
    return made


def _cell(wide: bool, best: bool) -> str:
    kind = "wide" if wide else "best" if best else ""
    return f'<td class="{kind}">{{}}</td>' if kind else "<td>{}</td>"


def _number(cell: str) -> float:
    try:
        return float(cell.rstrip("%").strip())
    except ValueError:
        return float("-inf")


def _is_top(cell: str, top: float | None) -> bool:
    return top is not None and np.isfinite(top) and _number(cell) == top


# ---- pictures -----------------------------------------------------------------------------------------------------


def _grid(pictures: Iterable[Shown], side: int) -> Markup:
    shown = Markup("").join(_figure(picture) for picture in pictures)
    return Markup('<div class="grid" style="--side:{}px">{}</div>').format(side, shown)


def _figure(shown: Shown) -> Markup:
    state = {True: " good", False: " bad", None: ""}[shown.good]
    mark = {True: "✓ ", False: "✗ ", None: ""}[shown.good]
    url, small = embed(shown.picture)
    kind = Markup(' class="small"') if small else ""
    image = Markup('<img{} src="{}" alt="{}">').format(kind, url, shown.caption)
    below = Markup('<figcaption><span class="mark">{}</span>{}</figcaption>').format(mark, shown.caption)
    return Markup('<figure class="pic{}">{}{}</figure>').format(state, image, below)


def embed(picture: PictureSource, largest: int = 320) -> tuple[str, bool]:
    """A ``data:`` URL of a picture, and whether it is so small that its pixels should stay visible.

    PIL image, file, bytes of one, uint8 ``(H, W, 3)`` array or ``(3, H, W)`` tensor. Small ones are kept as PNG,
    others become JPEG of at most ``largest`` pixels a side.
    """
    image = _as_image(picture).convert("RGB")
    small = max(image.size) <= 96
    if not small:
        image.thumbnail((largest, largest))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 82}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", small


def _as_image(picture: PictureSource) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, bytes):
        return Image.open(io.BytesIO(picture))
    if isinstance(picture, Path):
        return Image.open(picture)
    array = picture.permute(1, 2, 0).cpu().numpy() if isinstance(picture, torch.Tensor) else picture
    if array.dtype != np.uint8:
        raise TypeError(f"a picture array has to be uint8, not {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


# ---- curves -------------------------------------------------------------------------------------------------------


def _chart(title: str, series: Mapping[str, Points], x: str, y: str) -> Markup:
    def draw(axes: Axes) -> None:
        for i, points in enumerate(series.values()):
            xs, ys = _thinned(points)
            axes.plot(xs, ys, color=_COLOURS[i % SERIES], marker="o" if len(xs) < 12 else None, markersize=3)

    svg, names = _svg(f"{title}{list(series)}", draw, x, y), list(series)
    key = Markup("")
    if len(names) > 1:
        key = Markup("").join(
            Markup('<span><i style="background:var(--s{})"></i>{}</span>').format(i % SERIES, name)
            for i, name in enumerate(names)
        )
        key = Markup('<div class="key">{}</div>').format(key)
    frame = '<figure class="chart"><figcaption>{}</figcaption>{}{}</figure>'
    return Markup(frame).format(title, Markup(svg), key)


def _histogram(title: str, histogram: Histogram, y: str) -> Markup:
    def draw(axes: Axes) -> None:
        axes.set_axisbelow(True)
        axes.stairs(histogram.counts, histogram.edges, fill=True, color=_COLOURS[0])
        axes.set_ylim(bottom=0)
        if histogram.log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")

    svg = _svg(f"{title}{histogram}", draw, histogram.x, y)
    return Markup('<figure class="chart"><figcaption>{}</figcaption>{}</figure>').format(title, Markup(svg))


def _bars(title: str, values: Mapping[str, float], most: float) -> Markup:
    rows = Markup("").join(
        Markup('<span>{}</span><i style="width:{:.1f}%"></i><b>{}</b>').format(
            name, 100 * value / most if most else 0, f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"
        )
        for name, value in values.items()
    )
    frame = '<figure class="chart"><figcaption>{}</figcaption><div class="bars">{}</div></figure>'
    return Markup(frame).format(title, rows)


def _svg(seed: str, draw: Callable[[Axes], None], x: str, y: str) -> str:
    """What ``draw`` draws, with the page's colours as variables. seed: makes ids that no other chart has."""
    salt = hashlib.sha256(seed.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _LINE,
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.6,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(axis="y")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)  # the figure's background
    svg = re.sub(r'<g id="patch_2">.*?</g>', "", svg, count=1, flags=re.DOTALL)  # the axes' background
    svg = svg.replace(_INK, "var(--soft)").replace(_LINE, "var(--line)")
    for i, colour in enumerate(_COLOURS):
        svg = svg.replace(colour, f"var(--s{i})")
    return re.sub(r'(id="|#)([A-Za-z])', rf"\g<1>{salt}-\g<2>", svg)


def _thinned(points: Points) -> tuple[np.ndarray, np.ndarray]:
    held = np.asarray([p for p in points if np.isfinite(p[1])], dtype=float).reshape(-1, 2)
    if len(held) > MOST_POINTS:
        held = np.stack([part.mean(0) for part in np.array_split(held, MOST_POINTS)])
    return held[:, 0], held[:, 1]
