"""The heads of released task models: what they are for and what their answers are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from imglish.checkpoints.source import Source
from imglish.data.tasks import entailment, nlvr2
from imglish.models.heads import HeadConfig


def answers(last: str) -> Callable[[Source], HeadConfig]:
    """Questions with one of many answers, of which several may be right; last: weight of the head's last layer."""

    def head(source: Source) -> HeadConfig:
        return HeadConfig("vqa", classes=_named(source, len(source.weights[last])), soft=True)

    return head


def shows(last: str) -> Callable[[Source], HeadConfig]:
    """Classes of pictures alone; last: weight of the head's last layer."""

    def head(source: Source) -> HeadConfig:
        names = _named(source, len(source.weights[last]))
        often = {name for name, times in Counter(names).items() if times > 1}  # ImageNet has two cranes
        classes = (f"{name} ({number})" if name in often else name for number, name in enumerate(names))
        return HeadConfig("classification", classes=tuple(classes), texts=False)

    return head


def pairs(_: Source) -> HeadConfig:
    return HeadConfig("nlvr2", classes=nlvr2.CLASSES, pictures=2)


def entails(_: Source) -> HeadConfig:
    return HeadConfig("entailment", classes=entailment.CLASSES)


def writes(source: Source) -> HeadConfig:
    """Answers that are written; the candidates to choose among are no part of the weights."""
    return HeadConfig("vqa", "answers", _names(source) or ("yes", "no"))


def _names(source: Source) -> tuple[str, ...]:
    """Names of the answers: given, or of the settings beside the weights, or none."""
    labels = (source.settings or {}).get("id2label") or {}
    return source.classes or tuple(labels[str(number)] for number in range(len(labels)))


def _named(source: Source, count: int) -> tuple[str, ...]:
    """Names of ``count`` answers, their numbers where they have none."""
    names = _names(source)
    if not names:
        return tuple(str(number) for number in range(count))
    if len(names) != count:
        raise ValueError(f"the head has {count} answers, {len(names)} names are given for them")
    return names
