"""Model families and their named configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_type_hints

from torch import nn

from imglish.models import albef, beit, beit3, blip, clip, coca, dual, dvae, vilt, vlmo, vqkd

if TYPE_CHECKING:
    from imglish.models.heads import HeadConfig

Config = (
    albef.AlbefConfig
    | blip.BlipConfig
    | clip.ClipConfig
    | coca.CocaConfig
    | vilt.ViltConfig
    | vlmo.VlmoConfig
    | dvae.DVaeConfig
    | vqkd.VqKdConfig
    | beit.BeitConfig
    | beit3.Beit3Config
)

FAMILIES: dict[str, tuple[type[Any], type[nn.Module]]] = {
    "clip": (clip.ClipConfig, clip.Clip),
    "albef": (albef.AlbefConfig, albef.Albef),
    "blip": (blip.BlipConfig, blip.Blip),
    "coca": (coca.CocaConfig, coca.Coca),
    "beit": (beit.BeitConfig, beit.Beit),
    "vilt": (vilt.ViltConfig, vilt.Vilt),
    "vlmo": (vlmo.VlmoConfig, vlmo.Vlmo),
    "beit3": (beit3.Beit3Config, beit3.Beit3),
    "dvae": (dvae.DVaeConfig, dvae.DVae),
    "vqkd": (vqkd.VqKdConfig, vqkd.VqKd),
}
CONFIGS: dict[str, Callable[[], Config]] = {
    **clip.CONFIGS,
    **dual.CONFIGS,
    **albef.CONFIGS,
    **blip.CONFIGS,
    **coca.CONFIGS,
    **beit.CONFIGS,
    **vilt.CONFIGS,
    **vlmo.CONFIGS,
    **beit3.CONFIGS,
    **dvae.CONFIGS,
    **vqkd.CONFIGS,
}


def reads_texts(config: Any, head: HeadConfig | None = None) -> bool:
    """Whether a model of ``config``, with ``head`` that of a task, takes texts, and so has a tokenizer: visual
    tokenizers and classifiers of pictures take pictures only."""
    return hasattr(config, "vocab_size") and (head is None or head.texts)


def names() -> list[str]:
    """Names of all configurations."""
    return sorted(CONFIGS)


def named(name: str) -> Config:
    """The configuration called ``name``; an unknown name is an error that lists the known ones."""
    if name not in CONFIGS:
        raise KeyError(f"no model is called {name!r}; there are: {', '.join(names())}")
    return CONFIGS[name]()


def config_class(family: str) -> type[Any]:
    """The configuration dataclass of a family."""
    if family not in FAMILIES:
        raise KeyError(f"no model family is called {family!r}; there are: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[family][0]


def families_with(capability: type) -> list[str]:
    """Families whose models have ``capability`` (a protocol of :mod:`imglish.models.capabilities`)."""
    return sorted(name for name, (_, model) in FAMILIES.items() if issubclass(model, capability))


def build(config: Config) -> nn.Module:
    """A new model with initialised weights."""
    return config.build()


def to_dict(config: Config) -> dict[str, Any]:
    """A configuration as plain data, for JSON and YAML; :func:`from_dict` reverses it."""
    return dataclasses.asdict(config)


def from_dict(family: str, data: dict[str, Any]) -> Config:
    """A configuration from plain data; unknown keys and wrong kinds of values are errors that name the key."""
    made: Config = _from_dict(config_class(family), data, family)
    return made


def _from_dict(cls: type[Any], data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise TypeError(f"{where}: expected a mapping of settings, found {data!r}")
    hints = get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - set(known)):
        raise KeyError(f"{where}: unknown settings {unknown}; known: {sorted(known)}")
    return cls(**{key: _value(known[key], value, f"{where}.{key}") for key, value in data.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    """``value`` as JSON gives it, in the form that the annotation ``kind`` asks for."""
    choices = [kind, *getattr(kind, "__args__", ())]
    if isinstance(value, dict):
        nested: list[type[Any]] = [c for c in choices if isinstance(c, type) and dataclasses.is_dataclass(c)]
        for candidate in nested:
            if set(value) <= {field.name for field in dataclasses.fields(candidate)}:
                return _from_dict(candidate, value, where)
        if nested:
            return _from_dict(nested[0], value, where)
        raise TypeError(f"{where}: a mapping is not a valid value")
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, bool) and kind in (int, float, str):
        raise TypeError(f"{where}: {value!r} is not of type {kind.__name__}")
    if kind is float and isinstance(value, int):
        return float(value)
    if kind in (bool, int, float, str) and not isinstance(value, kind):
        raise TypeError(f"{where}: {value!r} is not of type {kind.__name__}")
    return value
