"""What an index was made with: it is opened with that model and no other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from imglish import __version__
from imglish.search.store import Store

if TYPE_CHECKING:
    from imglish.api import Model

FORMAT = 1
NOTE = "manifest"


class ManifestError(ValueError):
    """An index and a model that do not belong together, or an index of another format; the message says what to do."""


@dataclass(frozen=True)
class Calibration:
    """From the fusion tower's logit difference x to a probability: ``sigmoid(slope * x + offset)``.

    pairs, queries: that it was fitted on; data: which they were; error_before, error_after: expected calibration error
    of the plain and of the fitted probability on the half of the queries that took no part in the fit.
    """

    slope: float
    offset: float
    pairs: int
    queries: int
    data: str
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Manifest:
    """model: where it was loaded from; weights: digest of all of its weights; image: its picture input as plain data;
    thumbnail: longest side of the pictures that are kept, 0 for none; tokens: how image tokens are kept, "" for not."""

    model: str
    family: str
    weights: str
    image: dict[str, Any]
    dimension: int
    thumbnail: int = 512
    tokens: str = ""
    calibration: Calibration | None = None
    imglish: str = __version__
    format: int = FORMAT

    @property
    def name(self) -> str:
        """The model in a message."""
        return f"{self.model} ({self.family}, weights {self.weights[:12]})"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def describe(model: Model, name: str, thumbnail: int = 512, tokens: str = "") -> Manifest:
    """The manifest of an index that ``model``, loaded from ``name``, makes."""
    image = json.loads(json.dumps(asdict(model.config.image)))
    digest = weights_digest(model.network)
    return Manifest(name, str(model.config.family), digest, image, dimension_of(model), thumbnail, tokens)


def dimension_of(model: Model) -> int:
    """How many numbers its features have. Raises ``MissingCapabilityError`` for a model without towers."""
    return int(model.encode_texts(["a"]).shape[1])


def weights_digest(network: nn.Module) -> str:
    """32 hex digits that change with any weight, its name or its shape; the same on all devices and for all formats."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(network.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def check(kept: Manifest, opened: Manifest, where: str) -> None:
    """Raise :class:`ManifestError` where the index at ``where`` was made with another model than the one at hand."""
    if kept.weights == opened.weights and kept.image == opened.image:
        return
    what = "weights" if kept.weights != opened.weights else "picture input"
    raise ManifestError(
        f"{where} was made with {kept.name}, this model is {opened.name}: their {what} differ, so their vectors cannot "
        f"be compared. Open it with --model {kept.model}, or make an index for this model: "
        f"imglish index SOURCE --model {opened.model} --to NEW"
    )


def read(store: Store) -> Manifest | None:
    """The manifest of a store, None where it has none yet. Raises :class:`ManifestError` for one of another format."""
    text = store.note(NOTE)
    if text is None:
        return None
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ManifestError(
                f"{store.url} has format {data['format']}, imglish {__version__} reads format {FORMAT}: use the "
                f"version that made it (imglish {data.get('imglish')}) or make it anew"
            )
        calibration = data.pop("calibration")
        return Manifest(**data, calibration=Calibration(**calibration) if calibration else None)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"the manifest of {store.url} is damaged: {error}") from error


def write(store: Store, manifest: Manifest) -> None:
    """Keep ``manifest`` in the store."""
    store.set_note(NOTE, manifest.to_json())
