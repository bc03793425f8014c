"""METEOR and SPICE by their authors' Java programs, through the package pycocoevalcap (the extra ``captions``)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Literal, get_args

JavaMetric = Literal["meteor", "spice"]
JAVA_METRICS: tuple[JavaMetric, ...] = get_args(JavaMetric)


class JavaMetricError(ValueError):
    """The package, Java or a download of the program is missing; the message says which and how to get it."""


def java_scores(
    metric: JavaMetric, candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """Of the whole set and of each caption, as shares; texts as :func:`imglish.evaluation.ptb.tokenized` gives them.

    METEOR of the set comes from summed counts and is not the mean. SPICE fetches its parser's models when it is first
    used. Raises :class:`JavaMetricError`.
    """
    try:
        module = importlib.import_module(f"pycocoevalcap.{metric}.{metric}")
    except ImportError as error:
        raise JavaMetricError(
            f"{metric} needs the extra: pip install 'imglish[captions]', and Java ({error})"
        ) from error
    numbers = range(len(candidates))
    try:
        scorer = getattr(module, metric.capitalize())()
        value, each = scorer.compute_score(
            {n: list(references[n]) for n in numbers}, {n: [candidates[n]] for n in numbers}
        )
    except Exception as error:  # a pipe, a missing program, a download: whatever the Java side meets
        needs = "METEOR 1.5 needs Java" if metric == "meteor" else "SPICE needs Java 8 to 15, and once the network"
        raise JavaMetricError(f"{metric} failed: {error or type(error).__name__}; {needs}") from error
    if metric == "spice":
        each = [one["All"]["f"] for one in each]
    return float(value), [float(one) for one in each]
