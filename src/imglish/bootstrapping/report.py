"""The page about a filter: what is kept and why, scores, samples of every tenth, and where it all comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
from markupsafe import Markup

from imglish.bootstrapping.filtering import MEASURES, Decisions, FilterConfig, Measure, Scores, groups
from imglish.bootstrapping.quality import quality, truth_of
from imglish.bootstrapping.stage import Stage
from imglish.data.errors import DataError, printable
from imglish.data.images import ImageError, decode
from imglish.report import Report, Shown

BINS = 100
SAMPLES = 6  # pictures of each tenth
SIDES = 8  # pictures with their web and synthetic texts
GROUPS = 12  # of equal texts
SHOWN_GROUPS = 3  # with pictures
NAMES = {"itm": "ITM", "itc": "ITC", "ranker_itm": "ITM of the ranker", "ranker_itc": "ITC of the ranker"}

SCRIPT = """
for (const box of document.querySelectorAll('.threshold')) {
  const data = JSON.parse(box.dataset.bins), input = box.querySelector('input'), said = box.querySelector('output');
  const bars = [...box.querySelectorAll('rect')], total = data.counts.reduce((a, b) => a + b, 0);
  const show = () => {
    const bin = Number(input.value), kept = data.counts.slice(bin).reduce((a, b) => a + b, 0);
    const least = data.low + (data.high - data.low) * bin / data.counts.length;
    bars.forEach((bar, i) => bar.setAttribute('opacity', i < bin ? 0.25 : 1));
    said.textContent = `at least ${least.toFixed(3)}: ${kept} of ${total} texts, ${(100 * kept / total).toFixed(1)} %`;
  };
  input.addEventListener('input', show);
  show();
}
"""


def page(
    stage: Stage,
    scores: Scores,
    decisions: Decisions,
    config: FilterConfig,
    truth: Mapping[tuple[str, str], str] | None = None,
    seed: int = 0,
) -> Report:
    """The whole page. truth: see :func:`imglish.bootstrapping.quality.read_truth`; seed: of the samples."""
    report = Report("Filtered captions", f"{stage.source.path}")
    kept = int(decisions.kept.sum())
    pictures = len(np.unique(scores.picture[decisions.kept]))
    report.verdict(
        f"**{kept:,} of {len(scores):,} texts are kept** ({kept / max(len(scores), 1):.1%}), of {pictures:,} of "
        f"{len(np.unique(scores.picture)):,} pictures."
    )
    _counts(report, scores, decisions)
    _histograms(report, scores, config)
    if truth is not None:
        _quality(report, scores, truth)
    rng = np.random.default_rng(seed)
    samples = _Samples(report, stage, scores, decisions)
    samples.show(rng)
    samples.groups()
    _provenance(report, stage, config)
    return report


def _counts(report: Report, scores: Scores, decisions: Decisions) -> None:
    report.heading("What became of the texts")
    rows = []
    for number, reason in enumerate(decisions.reasons):
        own = decisions.reason == number
        if own.any() or number == 0:
            web, other = int((own & scores.web).sum()), int((own & ~scores.web).sum())
            rows.append([reason, f"{web + other:,}", f"{(web + other) / len(scores):.1%}", f"{web:,}", f"{other:,}"])
    report.table(["", "texts", "share", "web", "synthetic"], rows)
    report.note(
        "A text is counted at the first rule that drops it. `imglish filter ... --why KEY` tells of any picture."
    )


def _histograms(report: Report, scores: Scores, config: FilterConfig) -> None:
    report.heading("Scores")
    report.text("Move the threshold to see how many of all scored texts have at least this score.")
    for name in MEASURES:
        if not scores.has(name):
            continue
        values = scores.measures[name]
        for origin, rows in (("web", scores.web), ("synthetic", ~scores.web)):
            finite = values[rows & np.isfinite(values)]
            if len(finite):
                least = {"itm": config.min_itm, "itc": config.min_itc}.get(name)
                report.interactive(_threshold(f"{NAMES[name]}, {origin} texts", name, finite, least), SCRIPT)


def _threshold(title: str, measure: Measure, values: np.ndarray, least: float | None) -> Markup:
    """A histogram with a slider."""
    low, high = (0.0, 1.0) if measure.endswith("itm") else (float(values.min()), float(values.max()) + 1e-6)
    counts = np.histogram(values, BINS, (low, high))[0]
    top = int(counts.max())
    start = 0 if least is None else int(np.clip(round((least - low) / (high - low) * BINS), 0, BINS))
    bars = Markup("").join(
        Markup('<rect x="{}" y="{:.2f}" width="0.9" height="{:.2f}" fill="var(--s0)"/>').format(
            i, 40 - 40 * count / top, 40 * count / top
        )
        for i, count in enumerate(counts.tolist())
    )
    data = json.dumps({"low": low, "high": high, "counts": counts.tolist()})
    frame = (
        '<figure class="chart threshold" data-bins="{}"><figcaption>{}</figcaption>'
        '<svg viewBox="0 0 100 40" preserveAspectRatio="none" style="height:120px" role="img" aria-label="{}">{}</svg>'
        '<input type="range" min="0" max="{}" value="{}" aria-label="threshold" style="width:100%">'
        '<output class="note">{}</output></figure>'
    )
    said = f"{len(values):,} texts, from {low:.3g} to {high:.3g}, median {np.median(values):.3f}"
    return Markup(frame).format(data, title, title, bars, BINS, start, said)


def _quality(report: Report, scores: Scores, truth: Mapping[tuple[str, str], str]) -> None:
    clean, known = truth_of(scores.table, truth)
    known &= scores.web
    report.heading("Against the truth")
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name in MEASURES:
        if not scores.has(name):
            continue
        values = scores.measures[name][known]
        limits = np.linspace(0, 1, 21) if name.endswith("itm") else np.nanquantile(values, np.linspace(0, 1, 21))
        try:
            found = quality(values, clean[known], limits)
        except DataError as error:
            report.text(f"{error}: {int(known.sum()):,} texts have a known truth, {int(clean.sum()):,} are clean.")
            return
        columns = (found.thresholds, found.kept, found.precision, found.recall)
        rows = [[f"{values[0]:.3f}", *map(_percent, values[1:])] for values in zip(*columns)]
        title = f"{NAMES[name]}: area under the curve {found.auc:.4f}, {int(known.sum()):,} texts of known truth"
        report.table(["at least", "kept", "precision", "recall"], rows, title)
        curves[NAMES[name]] = {
            "precision": list(zip(found.thresholds.tolist(), found.precision.tolist())),
            "recall": list(zip(found.thresholds.tolist(), found.recall.tolist())),
        }
    report.charts(curves, x="threshold")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if np.isfinite(share) else "–"


class _Samples:
    def __init__(self, report: Report, stage: Stage, scores: Scores, decisions: Decisions) -> None:
        self.report, self.stage, self.scores, self.decisions = report, stage, scores, decisions
        self.by: Measure = next((name for name in MEASURES if scores.has(name)), "itm")

    def show(self, rng: np.random.Generator) -> None:
        """Pictures of each tenth of the measure, those next to the border, and web beside synthetic texts; ``rng``
        chooses which. Nothing where no text was scored."""
        values = self.scores.measures[self.by]
        order = np.flatnonzero(np.isfinite(values))
        if not len(order):
            return
        order = order[np.argsort(values[order], kind="stable")]
        self.report.heading(f"Samples by {NAMES[self.by]}")
        for tenth, rows in enumerate(np.array_split(order, 10)):
            if len(rows):
                chosen = np.sort(rng.choice(len(rows), min(SAMPLES, len(rows)), replace=False))
                limits = f"{values[rows[0]]:.3f} to {values[rows[-1]]:.3f}"
                self._row(rows[chosen], f"{tenth + 1}. tenth: {limits}")
        border = self._borderline(order, values)
        if len(border):
            self._row(border, "Next to the border, dropped and kept")
        self._sides(rng)

    def _borderline(self, order: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The best dropped and the worst kept."""
        kept = self.decisions.kept[order]
        return np.concatenate([order[~kept][-SAMPLES // 2 :], order[kept][: SAMPLES // 2]])

    def _row(self, rows: np.ndarray, title: str) -> None:
        found = [shown for row in rows.tolist() if (shown := self._shown(row)) is not None]
        if found:
            self.report.pictures(found, title)

    def _shown(self, row: int) -> Shown | None:
        entry = self.scores.table.slice(row, 1).to_pylist()[0]
        try:
            record = self.stage.records(self.stage.shards[entry["shard"]])[entry["record"]]
            picture = decode(record.image, name=record.key)
        except (ImageError, DataError, OSError):
            return None
        value = f"{self.scores.measures[self.by][row]:.3f}"
        text = f"{value} {entry['origin']}: {printable(entry['text'], 160)}"
        return Shown(picture, text, bool(self.decisions.kept[row]))

    def groups(self) -> None:
        """Texts that several pictures have: synthetic ones that say too little, web ones that are no descriptions."""
        texts = self.scores.normalised().combine_chunks().dictionary_encode()
        codes = texts.indices.to_numpy().astype(np.int64)
        pairs = np.unique(np.stack([codes, self.scores.picture]), axis=1)
        pictures = np.bincount(pairs[0], minlength=len(texts.dictionary))
        repeated = np.flatnonzero(pictures > 1)
        self.report.heading("Texts of several pictures")
        rows = np.isin(codes, repeated)
        self.report.text(
            f"{len(repeated):,} texts belong to several pictures, case and punctuation aside: {int(rows.sum()):,} of "
            f"{len(self.scores):,} rows ({rows.mean():.1%}). `--max-repeats N` drops those of more than N pictures."
        )
        most = repeated[np.argsort(-pictures[repeated], kind="stable")][:GROUPS]
        lines = []
        for code in most.tolist():
            own = codes == code
            web, kept = int((own & self.scores.web).sum()), int((own & self.decisions.kept).sum())
            text = printable(texts.dictionary[code].as_py(), 160)
            lines.append([text, f"{pictures[code]:,}", f"{web:,}", f"{int(own.sum()) - web:,}", f"{kept:,}"])
        if lines:
            self.report.table(["text", "pictures", "web", "synthetic", "kept"], lines, wide=(0,))
        for code in most[:SHOWN_GROUPS].tolist():
            own = np.flatnonzero(codes == code)
            first = own[np.unique(self.scores.picture[own], return_index=True)[1]][:SAMPLES]
            self._row(first, f"{pictures[code]:,} pictures: {printable(texts.dictionary[code].as_py(), 80)}")

    def _sides(self, rng: np.random.Generator) -> None:
        """Pictures with all of their texts, of web and synthetic ones side by side."""
        both = np.intersect1d(self.scores.picture[self.scores.web], self.scores.picture[~self.scores.web])
        if not len(both):
            return
        self.report.heading("Web and synthetic texts of a picture")
        some = np.sort(rng.choice(both, min(SIDES, len(both)), replace=False))
        for rows in groups(self.scores.picture, np.flatnonzero(np.isin(self.scores.picture, some))):
            shown = self._shown(int(rows[0]))
            if shown is None:
                continue
            entries = self.scores.table.take(rows).to_pylist()
            self.report.pictures([Shown(shown.picture, entries[0]["key"])])
            lines = [
                [
                    entry["origin"],
                    printable(entry["text"], 200),
                    f"{self.scores.measures[self.by][row]:.3f}",
                    self.decisions.reasons[self.decisions.reason[row]],
                ]
                for row, entry in zip(rows.tolist(), entries)
            ]
            self.report.table(["", "text", NAMES[self.by], "what becomes of it"], lines, wide=(1,))


def _provenance(report: Report, stage: Stage, config: FilterConfig) -> None:
    report.heading("Where it comes from")
    facts: dict[str, object] = {"source": stage.source.path, "scores": stage.out, "shards": len(stage.shards)}
    for name, value in stage.settings.items():
        facts[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
    facts["filter"] = json.dumps(asdict(config), ensure_ascii=False)
    report.facts(facts)
