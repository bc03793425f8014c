"""Settings: nested dataclasses filled from YAML and dotted overrides, every mistake named by its key."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

T = TypeVar("T")


class SettingsError(ValueError):
    """A setting that cannot be used. ``key`` is its dotted name; the message says what to change."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key = key


def read_mapping(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file as nested mappings, with ``key=value`` overrides (dotted keys, values in YAML) laid over it."""
    try:
        with path.open(encoding="utf-8") as file:
            data = yaml.safe_load(file)
    except OSError as error:
        raise SettingsError("", f"cannot read the recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SettingsError("", f"{path} is not YAML: {error}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise SettingsError("", f"{path} must hold a mapping of settings, not a {type(data).__name__}")
    for override in overrides:
        lay_over(data, override)
    return data


def lay_over(data: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value`` in nested mappings, in place."""
    key, equals, text = override.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not key:
        raise SettingsError("", f"{override!r} is not an override: write key=value, for example optimiser.lr=1e-4")
    *parents, last = key.split(".")
    place = data
    for depth, name in enumerate(parents):
        inner = place.get(name)
        if inner is None:
            inner = place[name] = {}
        if not isinstance(inner, dict):
            raise SettingsError(key, f"{'.'.join(parents[: depth + 1])} is {inner!r}, it has no settings inside")
        place[name] = place = dict(inner)  # a copy: a YAML anchor makes one mapping stand in several places
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(key, f"{text!r} is not a YAML value; text that holds ': ' wants quotes: {error}") from error


def fill(base: T, data: Mapping[str, Any], where: str = "") -> T:
    """``base`` (a dataclass instance, nested or not) with the values of ``data``; unknown keys and wrong types raise.

    Nested dataclasses keep what ``data`` does not name. Values are converted to the annotated types by jsonargparse
    (so ``1e-4``, a string for YAML 1.1, is a number where one is expected).
    """
    cls: Any = type(base)
    fields = _fields(cls)
    changed: dict[str, Any] = {}
    for name, value in data.items():
        key = f"{where}.{name}" if where else str(name)
        if name not in fields:
            raise SettingsError(key, _unknown(str(name), list(fields)))
        current = getattr(base, name)
        if dataclasses.is_dataclass(current) and not isinstance(current, type) and value is not None:
            if not isinstance(value, Mapping):
                known = ", ".join(_fields(type(current)))
                raise SettingsError(key, f"{value!r} is not a group of settings; it may have {known}")
            changed[name] = fill(current, value, key)
        else:
            changed[name] = convert(fields[name], value, key)
    try:
        return dataclasses.replace(base, **changed)  # type: ignore[type-var]
    except SettingsError as error:
        raise SettingsError(f"{where}.{error.key}" if where else error.key, _bare(error)) from error
    except ValueError as error:
        raise SettingsError(where, str(error)) from error


def convert(hint: Any, value: Any, key: str) -> Any:
    """``value`` as the annotated type ``hint``, or a :class:`SettingsError` that names ``key``."""
    if hint is bool and not isinstance(value, bool):
        raise SettingsError(key, f"{value!r} is neither true nor false")
    if isinstance(value, bool) and hint in (int, float):
        raise SettingsError(key, f"{value!r} is not a number")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value}).value
    except Exception as error:  # jsonargparse raises several kinds, all of them about this one value
        raise SettingsError(key, f"{value!r} does not fit, expected {describe(hint)}") from error


def describe(hint: Any) -> str:
    """A type annotation in words for messages."""
    if isinstance(hint, type) and get_origin(hint) is None:
        return (
            "nothing (null)"
            if hint is type(None)
            else {"str": "a text", "int": "a whole number", "float": "a number"}.get(hint.__name__, hint.__name__)
        )
    text = str(hint).replace("typing.", "")
    return text.replace("Literal", "one of ")


@cache
def _fields(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(cls)
        if field.init and get_origin(hints[field.name]) is not ClassVar
    }


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "known here: " + ", ".join(known)
    return f"there is no such setting; {hint}"


def _bare(error: SettingsError) -> str:
    return str(error).removeprefix(f"{error.key}: ")
