"""How well texts fit their pictures: the fusion tower's probability (ITM) and the towers' cosine (ITC).

The texts of a picture are read together: it passes the image tower once, its keys and values are projected once, and
all of its texts are one packed sequence of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imglish.api import Model
from imglish.bootstrapping.captioning import KIND as CAPTIONS
from imglish.bootstrapping.captioning import arithmetic, loader, picture_place, provenance
from imglish.bootstrapping.stage import Shard, Stage
from imglish.data.batch import TextBatch
from imglish.data.errors import DataError
from imglish.data.images import ImageError
from imglish.data.pictures import Picture, stack
from imglish.data.records import Record
from imglish.data.sources import Source
from imglish.data.sources.arrow import pyarrow
from imglish.data.text import clean_caption
from imglish.generation.stream import read_ahead
from imglish.models.capabilities import Matches, has_towers, image_encoder, require, text_encoder

KIND = "scores"
WEB, SYNTHETIC = "web", "synthetic"


class Scorer:
    """A model that scores pictures with texts of their own.

    block: pictures at a time; pairs: at a time in the fusion tower. Texts are cleaned as the model was trained. Raises
    ``MissingCapabilityError`` for a model that can compare pictures and texts in no way.
    """

    def __init__(self, model: Model, *, block: int = 16, pairs: int = 256, precision: str = "float32") -> None:
        if min(block, pairs) < 1:
            raise ValueError(f"blocks of {block} pictures and {pairs} pairs: at least 1")
        network = model.network
        if not has_towers(network) and not isinstance(network, Matches):
            require(network, Matches, "scoring")
        self.model, self.block, self.pairs = model, block, pairs
        self.matches, self.towers = isinstance(network, Matches), has_towers(network)
        self._image = image_encoder(network, "scoring")
        self._text = text_encoder(network, "scoring")
        self._load, self._arithmetic = loader(model), arithmetic(model, precision)
        trained = model.meta.get("recipe", {}).get("data", {})
        self.clean, self.max_words = trained.get("clean", "none"), trained.get("max_words", 30)

    def score(
        self, records: Sequence[Record], texts: Sequence[Sequence[str]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray] | ImageError]:
        """For each record (ITM, ITC) of its texts, float32 ``(n,)``, NaN where the model has no such score; or why its
        picture cannot be read."""
        low = 0
        for some, pictures in read_ahead(records, self._load, self.block, threads=4):
            yield from self._block(pictures, texts[low : low + len(some)])
            low += len(some)

    @torch.no_grad()
    def _block(
        self, pictures: Sequence[Picture | ImageError], texts: Sequence[Sequence[str]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray] | ImageError]:
        readable = [p for p, own in zip(pictures, texts) if not isinstance(p, ImageError) and own]
        owners = [own for p, own in zip(pictures, texts) if not isinstance(p, ImageError) and own]
        cleaned = [[clean_caption(text, self.max_words, self.clean) for text in own] for own in owners]
        places = {text: n for n, text in enumerate(dict.fromkeys(text for own in cleaned for text in own))}
        pairs = [(i, places[text]) for i, own in enumerate(cleaned) for text in own]
        unique = list(dict.fromkeys(pairs))
        found = dict(zip(unique, self._pairs(readable, list(places), unique))) if unique else {}
        position = 0
        for picture, own in zip(pictures, texts):
            if isinstance(picture, ImageError):
                yield picture
                continue
            scored = np.array([found[pair] for pair in pairs[position : position + len(own)]], np.float32)
            position += len(own)
            scored = scored.reshape(len(own), 2)
            yield scored[:, 0], scored[:, 1]

    def _pairs(
        self, pictures: Sequence[Picture], texts: list[str], pairs: list[tuple[int, int]]
    ) -> list[tuple[float, float]]:
        """(ITM, ITC) of pairs (picture, text), sorted by picture."""
        device, network = self.model.device, self.model.network
        with self._arithmetic():
            images = self._image(stack(pictures).to(device))
            words = self._text(TextBatch.of(self.model.tokenizer.encode(texts)).to(device))
            first = torch.tensor([i for i, _ in pairs], device=device)
            second = torch.tensor([t for _, t in pairs], device=device)
            itm = itc = torch.full((len(pairs),), float("nan"))
            if self.towers:
                itc = (images.features.float()[first] * words.features.float()[second]).sum(-1).cpu()
            if isinstance(network, Matches):
                memory = network.project_images(images.tokens)
                parts = [pairs[low : low + self.pairs] for low in range(0, len(pairs), self.pairs)]
                logits = [network.match(memory, words, [i for i, _ in p], [t for _, t in p]).float() for p in parts]
                itm = torch.cat(logits).softmax(-1)[:, 1].cpu()
        return list(zip(itm.tolist(), itc.tolist()))


def settings(
    model: Model, name: str, ranker: Model | None, ranker_name: str, captions: Stage | None, precision: str
) -> dict[str, Any]:
    """What scores depend on, as a stage remembers it."""
    return {
        "scorer": provenance(model, name),
        "ranker": provenance(ranker, ranker_name) if ranker is not None else None,
        "captions": None if captions is None else {"folder": str(captions.out.resolve()), **captions.settings},
        "precision": precision,
    }


def captions_stage(folder: Path) -> Stage:
    """The captions that ``imglish caption`` wrote to a folder."""
    stage = Stage.open(folder)
    if stage.kind != CAPTIONS:
        raise DataError(f"{folder} holds {stage.kind}, not captions")
    return stage


def scorer(
    model: Scorer, ranker: Scorer | None = None, captions: Stage | None = None
) -> Callable[[Shard, Source], Any]:
    """The work of the stage: a row for each text of each picture, captions of the source first.

    Columns: key; root, image (of a picture that is a file, else null); record (its number in the shard); origin
    (``web`` or ``synthetic``); text; itm, itc, ranker_itm, ranker_itc (float32; null: the model has no such score, NaN:
    it gave one that is no number); problem (of the picture).
    """

    def work(shard: Shard, records: Source) -> Any:
        written = _written(captions, shard) if captions is not None else {}
        texts: list[list[str]] = []
        origins: list[list[str]] = []
        for record in records:
            own = written.get(record.key, [])
            texts.append([*record.captions, *own])
            origins.append([WEB] * len(record.captions) + [SYNTHETIC] * len(own))
        first = model.score(records, texts)
        second: Iterator[Any] = ranker.score(records, texts) if ranker is not None else iter(lambda: None, 0)
        columns = _Columns(model, ranker)
        for number, (record, one, two) in enumerate(zip(records, first, second)):
            columns.add(number, record, texts[number], origins[number], one, two)
        return columns.table()

    return work


class _Columns:
    NAMES = ("key", "root", "image", "record", "origin", "text", "problem", "itm", "itc", "ranker_itm", "ranker_itc")

    def __init__(self, model: Scorer, ranker: Scorer | None) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in self.NAMES}
        self.measured = {
            "itm": model.matches,
            "itc": model.towers,
            "ranker_itm": ranker is not None and ranker.matches,
            "ranker_itc": ranker is not None and ranker.towers,
        }

    def add(self, number: int, record: Record, texts: list[str], origins: list[str], one: Any, two: Any) -> None:
        root, image = picture_place(record)
        problem = next((p for p in (one, two) if isinstance(p, ImageError)), None)
        said = None if problem is None else f"{problem.reason}: {problem}"
        count = len(texts)
        for name, value in (("key", record.key), ("root", root), ("image", image), ("record", number)):
            self.columns[name] += [value] * count
        self.columns["origin"] += origins
        self.columns["text"] += texts
        self.columns["problem"] += [said] * count
        for prefix, scores in (("", one), ("ranker_", two)):
            for place, name in enumerate(("itm", "itc")):
                known = self.measured[prefix + name] and problem is None
                self.columns[prefix + name] += scores[place].tolist() if known else [None] * count

    def table(self) -> Any:
        arrow = pyarrow()
        kinds = dict.fromkeys(self.NAMES, arrow.string()) | {"record": arrow.int32()}
        kinds |= dict.fromkeys(self.measured, arrow.float32())
        arrays = [arrow.array(self.columns[name], kind) for name, kind in kinds.items()]
        return arrow.Table.from_arrays(arrays, schema=arrow.schema(list(kinds.items())))


def _written(captions: Stage, shard: Shard) -> dict[str, list[str]]:
    """The synthetic captions of a shard by the key of their picture."""
    if shard not in captions.shards:
        raise DataError(f"{captions.out} has no shard {shard.name} of this source")
    if not captions.file(shard).exists():
        raise DataError(f"{captions.out}: the captions of shard {shard.name} are not written yet")
    table = captions.tables(["key", "captions"], of=[shard])
    return dict(zip(table["key"].to_pylist(), table["captions"].to_pylist()))
