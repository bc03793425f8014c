from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imglish.report import Histogram, Report, Shown, embed

VOID = {"meta", "img", "br", "path", "use", "rect", "link", "input"}


class _Checker(HTMLParser):
    """Tags are closed in order; collects what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.urls: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        self.urls += [str(held[k]) for k in ("src", "href", "srcset", "xlink:href") if k in held]
        self.ids += [str(held["id"])] if "id" in held else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def _full_report() -> Report:
    picture = np.zeros((48, 48, 3), dtype=np.uint8)
    return (
        Report("Title <b>", "sub & title")
        .heading("A & B")
        .text("## Part\n\nSome **bold** and `code <x>`.\n\n- one\n- two")
        .verdict("It <script>alert(1)</script> works.")
        .note("small")
        .facts({"seed": 3, "path": "<none>"})
        .table(["name", "R@1"], [["towers", "10.0"], ["<i>reranked</i>", "12.5"]], "recalls", best=[1])
        .curves({"loss": [(i, 1 / (i + 1)) for i in range(1000)], "other": [(0, 1.0), (5, float("nan"))]}, "Loss")
        .charts({"one": {"a": [(0, 1.0), (1, 2.0)]}, "two": {"a": [(0, 1.0), (1, 2.0)]}})
        .pictures([Shown(picture, "a 'quoted' <caption>", True), Shown(picture, "b", False)], "Some")
        .compare("黑色上衣，白色裤子", {"towers": [Shown(picture)], "reranked": [Shown(picture)]})
    )


def test_the_page_is_whole_and_asks_for_nothing() -> None:
    page = _full_report().html()
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(url.startswith(("data:", "#")) for url in checker.urls)
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert len(checker.ids) == len(set(checker.ids))  # several charts in one page keep their clip paths apart


def test_everything_foreign_is_escaped() -> None:
    page = _full_report().html()
    for raw in ("<script>", "<i>reranked</i>", "<caption>'", "Title <b>", "<none>", "<x>"):
        assert raw not in page, raw
    assert "Title &lt;b&gt;" in page
    assert "<strong>bold</strong>" in page
    assert "黑色上衣，白色裤子" in page


def test_the_best_cell_of_a_column_is_marked() -> None:
    page = Report("t").table(["n", "x"], [["a", "9.0"], ["b", "10.5"], ["c", "–"]], best=[1]).html()
    assert re.findall(r'class="best">([^<]*)<', page) == ["10.5"]
    with pytest.raises(ValueError, match="cells"):
        Report("t").table(["n", "x"], [["a"]])


def test_curves_take_the_colours_of_the_page() -> None:
    page = Report("t").curves({"a": [(0, 1.0), (1, 2.0)], "b": [(0, 2.0), (1, 1.0)]}, "Curves", "step", "loss").html()
    chart = page[page.index("<svg") : page.index("</svg>")]
    assert "var(--s0)" in chart
    assert "var(--s1)" in chart
    assert "var(--soft)" in chart
    assert not re.search(r"#0[0-9a-f]{5}\b|#ffffff", chart)


def test_a_long_curve_is_thinned() -> None:
    short = Report("t").curves({"a": [(i, i % 7) for i in range(400)]}, "x").html()
    long = Report("t").curves({"a": [(i, i % 7) for i in range(100_000)]}, "x").html()
    assert len(long) < 2 * len(short)


@pytest.mark.parametrize("kind", ["image", "file", "bytes", "array", "tensor"])
def test_pictures_of_all_kinds(kind: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (200, 100), (250, 10, 10))
    image.save(tmp_path / "p.png")
    source = {
        "image": image,
        "file": tmp_path / "p.png",
        "bytes": (tmp_path / "p.png").read_bytes(),
        "array": np.asarray(image),
        "tensor": torch.from_numpy(np.array(image)).permute(2, 0, 1),
    }[kind]
    url, small = embed(source)
    assert url.startswith("data:image/jpeg;base64,")
    assert not small
    assert embed(np.zeros((40, 40, 3), dtype=np.uint8))[1]
    with pytest.raises(TypeError, match="uint8"):
        embed(np.zeros((4, 4, 3)))


def test_saving_makes_the_folder_and_leaves_one_file(tmp_path: Path) -> None:
    path = Report("t").save(tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_bars_and_histograms_are_drawn_and_escaped() -> None:
    page = (
        Report("T")
        .bars({"<b>": {"a<b": 2, "c": 1.5}, "one": {"x": 4}, "two": {"y": 1}}, alike=["one", "two"])
        .histograms({"H": Histogram([0, 1, 2], [3, 4], "pixels"), "L": Histogram([1, 2, 4], [1, 0], log=True)}, "n")
        .html()
    )
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert "&lt;b&gt;" in page
    assert "a&lt;b" in page
    assert 'style="width:75.0%"' in page
    assert 'style="width:25.0%"' in page  # on the scale of the other chart
    assert page.count("<svg") == 2
    assert "pixels" in page
