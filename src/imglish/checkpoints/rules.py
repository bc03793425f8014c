"""Conversion of weights as a table of rules, which accounts for every name on both sides or refuses.

A table reads like the correspondence it states. Names may hold placeholders: one letter stands for a number
(``{i}``), a longer word for one dot-free piece of a name (``{leaf}``); they carry over into the other name::

    TABLE = Table(
        Rule("visual.proj", "image_proj.weight", TRANSPOSE),
        Rule("visual.class_token", "vision.class_token", Transform(lambda x: x[0, 0], lambda x: x[None, None])),
        Rule("blocks.{i}.ln_1.{leaf}", "blocks.{i}.norm1.{leaf}"),
        Rule(  # several sources are joined along the first dimension
            ("layer.{i}.query.{leaf}", "layer.{i}.key.{leaf}", "layer.{i}.value.{leaf}"),
            "blocks.{i}.attn.qkv.{leaf}",
        ),
        Cut("pool.in_proj_bias", ("pool.q.bias", "pool.kv.bias"), (1, 2)),  # q, then k and v
        Tie("cls.decoder.weight", "embeddings.weight"),
        Drop("embeddings.position_ids", "counts up from zero"),
        Fresh("itm_head.{leaf}", "the checkpoint was trained without ITM"),
    )
    converted = TABLE.convert(official_state_dict, model.state_dict())
    model.load_state_dict(converted.state)
    official_again = TABLE.revert(model.state_dict())

The first rule that matches a name takes it. Where numbers must be shifted (layers 6-11 become 0-5 of another
module), the table is made by a function and the rules by a loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

_SHOWN = 8


class ConversionError(ValueError):
    """Names or shapes that a table does not account for; the message lists the first of each side."""


@dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]


TRANSPOSE = Transform(lambda x: x.T, lambda x: x.T)
"""``(in, out)`` matrices, multiplied from the right, to the ``(out, in)`` of ``nn.Linear``."""


@dataclass(frozen=True)
class Rule:
    """``source`` names (several: joined along dimension 0, in equal parts) become the one ``target`` name."""

    source: str | tuple[str, ...]
    target: str
    transform: Transform | None = None

    @cached_property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclass(frozen=True)
class Cut:
    """One ``source`` becomes several ``targets``: cut along dimension 0 in the proportion of ``shares``."""

    source: str
    targets: tuple[str, ...]
    shares: tuple[int, ...]

    def parts(self, whole: Tensor) -> tuple[Tensor, ...]:
        unit, rest = divmod(whole.shape[0], sum(self.shares))
        if rest:
            raise ConversionError(f"{self.source}: {whole.shape[0]} rows cannot be divided {self.shares}")
        return whole.split([unit * share for share in self.shares])


@dataclass(frozen=True)
class Drop:
    """Source names that have no place in our model, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Tie:
    """A source name that holds the same values as ``same_as`` (checked), and is one tensor in our model; where a file
    has only one of the two, that one counts."""

    source: str
    same_as: str


@dataclass(frozen=True)
class Fresh:
    """Target names that the source does not have, and why; they keep the value that the target gives."""

    target: str
    reason: str


@dataclass(frozen=True)
class Converted:
    """Our state dict, and in words what was dropped, tied or kept fresh: name -> reason."""

    state: dict[str, Tensor]
    report: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pattern:
    """A name with placeholders: matches names, and writes names from what was matched."""

    text: str

    @cached_property
    def regex(self) -> re.Pattern[str]:
        pieces = re.split(r"\{(\w+)\}", self.text)
        made = [re.escape(pieces[0])]
        for name, literal in zip(pieces[1::2], pieces[2::2], strict=True):
            kind = r"\d+" if len(name) == 1 else r"[^.]+"
            made.append(f"(?P<{name}>{kind}){re.escape(literal)}")
        return re.compile("".join(made))

    def match(self, name: str) -> dict[str, str] | None:
        found = self.regex.fullmatch(name)
        return None if found is None else found.groupdict()

    def write(self, values: Mapping[str, str]) -> str:
        return self.text.format_map(values)


class Table:
    """An ordered correspondence between the names of an official checkpoint and ours."""

    def __init__(self, *rules: Rule | Cut | Drop | Tie | Fresh) -> None:
        self.rules = rules
        self._sources = [
            (rule, [_Pattern(s) for s in (rule.sources if isinstance(rule, Rule) else (rule.source,))])
            for rule in rules
            if not isinstance(rule, Fresh)
        ]

    def __add__(self, other: Table) -> Table:
        return Table(*self.rules, *other.rules)

    def convert(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Converted:
        """The state dict of ours whose names and shapes are those of ``target`` (which may be on the meta device).

        Floating tensors take the dtype of the target. Raises :class:`ConversionError` unless every source name is
        used, dropped or tied, every target name is made or declared fresh, and all shapes and kinds of numbers
        (:func:`same_kind`) agree.
        """
        made, report, unknown = self._rename(source)
        for name, reason in self.fresh(name for name in target if name not in made):
            made[name] = target[name]
            report[name] = f"fresh: {reason}"
        missing = [name for name in target if name not in made]
        surplus = [f"{name} (not a name of ours)" for name in made if name not in target]
        wrong = [
            f"{name}: {tuple(value.shape)}, expected {tuple(target[name].shape)}"
            for name, value in made.items()
            if name in target and value.shape != target[name].shape
        ]
        kinds = [
            f"{name}: {value.dtype}, expected {target[name].dtype}"
            for name, value in made.items()
            if name in target and not same_kind(value, target[name])
        ]
        problems = {
            "names in the checkpoint that no rule knows": unknown + surplus,
            "names of the model that the checkpoint does not give": missing,
            "shapes that differ (checkpoint, model)": wrong,
            "kinds of numbers that differ (checkpoint, model)": kinds,
        }
        if any(problems.values()):
            raise ConversionError("\n".join(_listed(title, items) for title, items in problems.items() if items))
        return Converted({name: _like(made[name], target[name]) for name in target}, report)

    def revert(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The official state dict of our weights: the rules backwards; dropped and fresh names stay out."""
        official: dict[str, Tensor] = {}
        used = {name for name, _ in self.fresh(ours)}
        for cut in (r for r in self.rules if isinstance(r, Cut)):
            official |= _joined(cut, ours, used)
        for name, value in ours.items():
            if name in used:
                continue
            for rule in (r for r in self.rules if isinstance(r, Rule)):
                values = _Pattern(rule.target).match(name)
                if values is None:
                    continue
                value = value if rule.transform is None else rule.transform.backward(value)
                parts = (value,) if len(rule.sources) == 1 else value.chunk(len(rule.sources))
                for source, part in zip(rule.sources, parts, strict=True):
                    official[_Pattern(source).write(values)] = part
                used.add(name)
                break
        if unknown := [name for name in ours if name not in used]:
            raise ConversionError(_listed("names of the model that no rule knows", unknown))
        for tie in (r for r in self.rules if isinstance(r, Tie)):
            first = _Pattern(tie.same_as)
            found = [(v, x) for name, x in official.items() if (v := first.match(name)) is not None]
            official |= {_Pattern(tie.source).write(values): value for values, value in found}
        return official

    def _rename(self, source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
        """Values under our names, what was left out and why, and the names that no rule knows."""
        made: dict[str, Tensor] = {}
        report: dict[str, str] = {}
        unknown: list[str] = []
        parts: dict[str, tuple[Rule, list[Tensor | None]]] = {}
        for name, value in source.items():
            found = self._find(name)
            while found is not None and isinstance(tie := found[0], Tie):
                if (first := _Pattern(tie.same_as).write(found[2])) in source:
                    break
                found = self._find(first)  # which the file leaves out: this one stands for it
            if found is None:
                unknown.append(name)
                continue
            rule, number, values = found
            if isinstance(rule, Drop):
                report[name] = f"dropped: {rule.reason}"
            elif isinstance(rule, Tie):
                first = _Pattern(rule.same_as).write(values)
                if not _equal(source[first], value):
                    raise ConversionError(f"{name} should hold the same values as {first}, and does not")
                report[name] = f"tied to {first}"
            elif isinstance(rule, Cut):
                for target, piece in zip(rule.targets, rule.parts(value), strict=True):
                    key = _Pattern(target).write(values)
                    if key in made or key in parts:
                        raise ConversionError(f"{name} becomes {key}, which another name has become already")
                    made[key] = piece
            else:
                key = _Pattern(rule.target).write(values)
                owner, pieces = parts.setdefault(key, (rule, [None] * len(rule.sources)))
                if owner is not rule or pieces[number] is not None:
                    raise ConversionError(f"{name} becomes {key}, which another name has become already")
                pieces[number] = value
        for key, (rule, pieces) in parts.items():
            whole = [piece for piece in pieces if piece is not None]
            if len(whole) < len(pieces):
                raise ConversionError(f"{key} needs {', '.join(rule.sources)}: only {len(whole)} of them are there")
            value = whole[0] if len(whole) == 1 else torch.cat(whole)
            made[key] = value if rule.transform is None else rule.transform.forward(value)
        return made, report, unknown

    def _find(self, name: str) -> tuple[Rule | Cut | Drop | Tie, int, dict[str, str]] | None:
        for rule, patterns in self._sources:
            for number, pattern in enumerate(patterns):
                if (values := pattern.match(name)) is not None:
                    return rule, number, values
        return None

    def fresh(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Those of our ``names`` that the source does not have, each with the reason."""
        fresh = [(_Pattern(rule.target), rule.reason) for rule in self.rules if isinstance(rule, Fresh)]
        return [(n, reason) for n in names for pattern, reason in fresh if pattern.match(n) is not None]


def _joined(cut: Cut, ours: Mapping[str, Tensor], used: set[str]) -> dict[str, Tensor]:
    """What ``cut`` has divided, joined again; its names are added to ``used``."""
    official: dict[str, Tensor] = {}
    first = _Pattern(cut.targets[0])
    for values in (v for v in map(first.match, ours) if v is not None):
        names = [_Pattern(target).write(values) for target in cut.targets]
        if absent := [name for name in names if name not in ours]:
            raise ConversionError(f"{names[0]} without {', '.join(absent)}: both come from {cut.source}")
        official[_Pattern(cut.source).write(values)] = torch.cat([ours[name] for name in names])
        used.update(names)
    return official


def _equal(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) and a.data_ptr() == b.data_ptr():
        return True  # one tensor by two names: its pages of a mapped file need not be read
    return a.shape == b.shape and torch.equal(a, b)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def same_kind(value: Tensor, target: Tensor) -> bool:
    """Whether ``value`` may become ``target``: floating numbers of 16 bits or more among each other; everything else
    (integers, truths, complex numbers, and the 8 bits and less that mean nothing without their scales) as it is."""
    return value.dtype == target.dtype or (value.dtype in _FLOATS and target.dtype in _FLOATS)


def _like(value: Tensor, target: Tensor) -> Tensor:
    value = value.to(target.dtype) if value.is_floating_point() and target.is_floating_point() else value
    return value.contiguous()


def _listed(title: str, items: list[str]) -> str:
    more = f" ... and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {title}: {', '.join(items[:_SHOWN])}{more}"
