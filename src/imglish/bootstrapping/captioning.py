"""Captions for every picture of a source, shard by shard."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from imglish.api import Model
from imglish.bootstrapping.stage import Done, Shard, Stage
from imglish.data.records import Record
from imglish.data.sources import Source
from imglish.data.sources.arrow import pyarrow
from imglish.data.sources.files import StoredFile
from imglish.evaluation.encoding import picture_loader
from imglish.generation.config import GenerationConfig
from imglish.generation.stream import captions_of
from imglish.models.capabilities import Captions, require

KIND = "captions"


def fingerprint(network: nn.Module) -> str:
    """Short text that changes with any weight."""
    found = hashlib.blake2b(digest_size=12)
    for name, value in sorted(network.state_dict().items()):
        found.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def provenance(model: Model, name: str) -> dict[str, str]:
    """What results say of a model; name: where it was loaded from."""
    return {"name": name, "family": str(model.config.family), "weights": fingerprint(model.network)}


def loader(model: Model) -> Callable[[Record], Any]:
    """A function that reads a record's picture in the form that the model takes."""
    transform = model.config.image.transform()
    if transform is None:
        raise TypeError("this model reads the regions of a detector, not pictures: it cannot be used here")
    return picture_loader(transform)


def arithmetic(model: Model, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    """A context that computes in bfloat16 where ``precision`` says so."""
    half = precision == "bfloat16"
    return lambda: torch.autocast(model.device.type, torch.bfloat16, enabled=half)


def settings(model: Model, name: str, config: GenerationConfig, prompt: str | None, precision: str) -> dict[str, Any]:
    """What captions depend on, as a stage remembers it. Raises ``MissingCapabilityError``."""
    require(model.network, Captions, "captioning")
    return {
        "captioner": provenance(model, name),
        "generation": asdict(config),
        "prompt": prompt,
        "precision": precision,
    }


def picture_place(record: Record) -> tuple[str | None, str | None]:
    """(root, name) of a picture that is a file, which a list of what is kept can name."""
    image = record.image
    return (image.root, image.name) if isinstance(image, StoredFile) else (None, None)


def captioner(
    model: Model, config: GenerationConfig, prompt: str | None = None, *, block: int = 16, precision: str = "float32"
) -> Callable[[Shard, Source], Any]:
    """The work of the stage: a row for each picture, also for one that could not be read (``problem``).

    Columns: key; captions, scores, ended (lists of ``config.n``); problem. Sampling depends on the seed and the key of
    the picture alone, not on shards, workers or blocks.
    """
    load = loader(model)

    def work(shard: Shard, records: Source) -> Any:
        """A table of the shard, one row for each of ``records``, in their order."""
        rows = []
        stream = captions_of(
            model.network,
            model.tokenizer,
            records,
            load,
            lambda record: record.key,
            config,
            prompt=prompt,
            block=block,
            arithmetic=arithmetic(model, precision),
        )
        for one in stream:
            rows.append(
                {
                    "key": one.item.key,
                    "captions": [_plain(caption.text) for caption in one.captions],
                    "scores": [caption.score for caption in one.captions],
                    "ended": [caption.ended for caption in one.captions],
                    "problem": None if one.problem is None else f"{one.problem.reason}: {one.problem}",
                }
            )
        arrow = pyarrow()
        kinds = {
            "key": arrow.string(),
            "captions": arrow.list_(arrow.string()),
            "scores": arrow.list_(arrow.float32()),
            "ended": arrow.list_(arrow.bool_()),
            "problem": arrow.string(),
        }
        return arrow.Table.from_pylist(rows, schema=arrow.schema(list(kinds.items())))

    return work


def _plain(text: str) -> str:
    """Without control characters, which a vocabulary may hold."""
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cs") else " " for c in text).strip()


@dataclass(frozen=True)
class Written:
    """What lies in a folder of captions. repeated: share of captions that their picture has already; shared: share
    that some picture has already."""

    pictures: int
    unreadable: int
    captions: int
    repeated: float
    shared: float


def summary(stage: Stage) -> Written:
    """Of the finished shards."""
    table = stage.tables(["captions", "problem"])
    problems = table["problem"]
    captions = own = 0
    seen: set[str] = set()
    for texts in table["captions"].to_pylist():
        folded = [text.casefold() for text in texts]
        captions, own = captions + len(folded), own + len(set(folded))
        seen.update(folded)
    most = max(captions, 1)
    unreadable = len(table) - problems.null_count
    return Written(len(table), unreadable, captions, (captions - own) / most, (captions - len(seen)) / most)


def speed(done: Done, stage: Stage) -> str:
    """How fast this worker was, in words."""
    per = int(stage.settings["generation"]["n"])
    return (
        f"{done.rows * per / done.seconds:.1f} captions/s" if done.rows and done.seconds else "nothing was left to do"
    )
