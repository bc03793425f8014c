"""The Python interface: load a model, encode pictures and texts, match them, rank pictures for a text.

>>> model = imglish.load("runs/flickr8k/model")
>>> gallery = model.gallery(sorted(Path("photos").glob("*.jpg")))
>>> for found in model.rank("a dog in the snow", gallery, top=5):
...     print(f"{found.score:.2f}", found.picture)

A model that writes captions (BLIP, CoCa) also says what it sees:

>>> [[caption]] = model.caption(["photos/dog.jpg"])
>>> print(caption.text)

One with a head for a task (VQA, NLVR2, visual entailment, classes of pictures) answers:

>>> [best, *others] = model.answer(["photos/dog.jpg"], ["what is in the snow?"])[0]
>>> print(best.text, best.probability)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from imglish.checkpoints import native
from imglish.checkpoints.loading import load_any
from imglish.data.batch import TextBatch
from imglish.data.images import decode
from imglish.data.pictures import Picture as PictureForm
from imglish.data.pictures import picture_of, stack
from imglish.data.regions import Regions
from imglish.data.tokenizers import Tokenizer
from imglish.evaluation.explain import Explanation, explain
from imglish.evaluation.tasks.answering import answerer, questions
from imglish.generation.config import CAPTIONS
from imglish.generation.config import GenerationConfig as GenerationConfig
from imglish.generation.engine import Caption as Caption
from imglish.generation.stream import Captioned, captions_of
from imglish.models.capabilities import (
    EncodedTexts,
    EncodesImages,
    EncodesTexts,
    Matches,
    MissingCapabilityError,
    has_towers,
    image_encoder,
    require,
    text_encoder,
)
from imglish.models.heads import TaskModel
from imglish.nn.segments import Ragged

Picture = str | Path | bytes | Image.Image | Regions
"""A file, the bytes of one, or a PIL image; for a model that reads regions, those of a picture."""

BATCH = 32  # pictures or texts that pass a tower at a time
PAIRS = 256  # pairs that pass the fusion at a time


@dataclass(frozen=True)
class Gallery:
    """Encoded pictures, to be searched many times: features ``(I, E)`` and, for reranking, tokens ``(I, L, D)`` or
    ragged rows."""

    pictures: tuple[Picture, ...]
    features: Tensor
    tokens: Tensor | Ragged | None

    def __len__(self) -> int:
        return len(self.pictures)


@dataclass(frozen=True)
class Found:
    """One line of a ranked list. index: of the picture in the gallery; cosine: of the towers (0 for a model without);
    match: the probability that the fusion tower gives the pair, None for a model without one or for a picture that was
    not reranked."""

    index: int
    picture: Picture
    cosine: float
    match: float | None

    @property
    def score(self) -> float:
        """The match probability where there is one, else the cosine."""
        return self.cosine if self.match is None else self.match


class Answer(NamedTuple):
    """What a task model says; probability: of a class (with soft labels each has one of its own), or of a text."""

    text: str
    probability: float


class Model:
    """A model with its tokenizer and its picture input, ready to use; results are float32 on the CPU."""

    def __init__(self, loaded: native.Loaded, device: str | torch.device | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network: nn.Module = loaded.model.to(self.device).eval()
        self._words = loaded.words
        self.config: Any = loaded.config
        self.score_rule = loaded.score_rule
        self.meta = loaded.meta
        self._transform = self.config.image.transform()

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ``CheckpointError`` for a model that takes pictures only."""
        if self._words is None:
            raise native.CheckpointError(f"this model ({self.config.family}) takes pictures only, no texts")
        return self._words

    @property
    def matches(self) -> bool:
        """Whether the model has a fusion tower, for :meth:`match` and for reranking."""
        return isinstance(self.network, Matches)

    def encode_images(self, pictures: Sequence[Picture]) -> Tensor:
        """L2-normalised features ``(N, E)``. Raises ``ImageError`` for a picture that cannot be read."""
        require(self.network, EncodesImages, "encode_images")
        return self.gallery(pictures, keep_tokens=False).features

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised features ``(N, E)``; ``encode_images(...) @ encode_texts(...).T`` are the cosines."""
        require(self.network, EncodesTexts, "encode_texts")
        return self.read_texts(texts).features.cpu()

    def read_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Features on the model's device and, for a fusion tower, the states of all tokens."""
        if isinstance(texts, str):
            raise TypeError("expected a list of texts, not one text")
        encode = text_encoder(self.network, "reading texts")
        if not texts:
            raise ValueError("there are no texts")
        parts = []
        with torch.no_grad():
            for low in range(0, len(texts), BATCH):
                batch = TextBatch.of(self.tokenizer.encode(list(texts[low : low + BATCH])))
                parts.append(encode(batch.to(self.device)))
        segments = parts[0].segments
        for part in parts[1:]:
            segments = segments + part.segments
        rows = [part.rows for part in parts if part.rows is not None]
        return EncodedTexts(
            torch.cat([part.features.float() for part in parts]), segments, torch.cat(rows) if rows else None
        )

    def gallery(self, pictures: Sequence[Picture], keep_tokens: bool = True) -> Gallery:
        """Encode pictures once, to rank them for many texts; ``keep_tokens``: also what reranking needs."""
        if isinstance(pictures, Picture):
            raise TypeError("expected a list of pictures, not one picture")
        encode = image_encoder(self.network, "a gallery")
        features, tokens = [], []
        for low in range(0, len(pictures), BATCH):
            images = stack([self._pixels(picture) for picture in pictures[low : low + BATCH]])
            with torch.no_grad():
                encoded = encode(images.to(self.device))
            features.append(encoded.features.float().cpu())
            if keep_tokens and self.matches and encoded.tokens is not None:
                tokens.append(_on(encoded.tokens, "cpu"))
        if not features:
            raise ValueError("there are no pictures")
        return Gallery(tuple(pictures), torch.cat(features), _joined(tokens) if tokens else None)

    def match(self, pictures: Sequence[Picture] | Gallery, texts: Sequence[str]) -> Tensor:
        """Probability ``(I, T)`` that picture and text belong together, by the fusion tower.

        Raises ``MissingCapabilityError`` for a model without one; a :class:`Gallery` needs its tokens.
        """
        gallery = self._as_gallery(pictures)
        encoded = self.read_texts(texts)
        logits = self._logits(gallery, range(len(gallery)), encoded)
        return logits.softmax(-1)[..., 1]

    def rank(
        self, text: str, pictures: Sequence[Picture] | Gallery, top: int = 20, rerank: int | None = None
    ) -> list[Found]:
        """The ``top`` pictures for a text, best first.

        The towers propose the first ``rerank`` pictures (default: the larger of 32 and ``top``; 0: towers only), the
        fusion tower, where the model has one, orders them by their match probability (by the difference of its logits,
        which does not saturate). A model without towers reads all pictures.
        """
        gallery = self._as_gallery(pictures)
        encoded = self.read_texts([text])
        cosine = gallery.features @ encoded.features[0].float().cpu()
        order = cosine.argsort(descending=True, stable=True).tolist()
        wanted = max(32, top) if rerank is None else rerank
        wanted = wanted if has_towers(self.network) else len(gallery)
        probability: dict[int, float] = {}
        if self.matches and self.score_rule != "itc" and wanted > 0:
            first = order[:wanted]
            logits = self._logits(gallery, first, encoded)[:, 0]
            best = (logits[:, 1] - logits[:, 0]).argsort(descending=True, stable=True).tolist()
            probability = dict(zip(first, logits.softmax(-1)[:, 1].tolist()))
            order = [first[i] for i in best] + order[wanted:]
        return [Found(i, gallery.pictures[i], float(cosine[i]), probability.get(i)) for i in order[:top]]

    def caption(
        self, pictures: Sequence[Picture], config: GenerationConfig = CAPTIONS, prompt: str | None = None
    ) -> list[list[Caption]]:
        """``config.n`` captions for each picture, best first (samples: in their order).

        config: how they are written (default: three beams); prompt: what they begin with, not part of their text (None:
        as the model was trained). Raises ``MissingCapabilityError`` for a model that writes none, ``ImageError`` for a
        picture that cannot be read.
        """
        found = []
        for one in self.caption_stream(pictures, config, prompt):
            if one.problem is not None:
                raise one.problem
            found.append(list(one.captions))
        return found

    def caption_stream(
        self,
        pictures: Sequence[Picture],
        config: GenerationConfig = CAPTIONS,
        prompt: str | None = None,
        *,
        block: int = 16,
        precision: str = "float32",
    ) -> Iterator[Captioned[Picture]]:
        """Like :meth:`caption`, picture by picture as soon as its ``block`` is done; one that cannot be read comes with
        its ``problem`` in place of captions. precision: "float32" or "bfloat16" (autocast)."""
        if isinstance(pictures, Picture):
            raise TypeError("expected a list of pictures, not one picture")
        half = precision == "bfloat16"
        return captions_of(
            self.network,
            self.tokenizer,
            pictures,
            self._pixels,
            _name,
            config,
            prompt=prompt,
            block=block,
            arithmetic=lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=half),
        )

    def answer(
        self, pictures: Sequence[Picture | Sequence[Picture]], texts: Sequence[str] | None = None
    ) -> list[list[Answer]]:
        """What a model with a head for a task says, at most five answers each, best first.

        pictures: one for each text, or as many as the task has (NLVR2: two); texts: questions, statements or
        hypotheses, None for a classifier of pictures. A model that writes answers chooses among its candidates. Raises
        ``MissingCapabilityError`` for a model without such a head, ``ImageError`` for a picture that cannot be read.
        """
        model: Any = self.network
        if not isinstance(model, TaskModel):
            raise MissingCapabilityError(
                "answer needs a model with a head for a task; imglish finetune puts one on, released ones for VQA, "
                "NLVR2, visual entailment and ImageNet have one"
            )
        if (texts is not None) != model.head.texts:
            raise TypeError(f"a model for {model.head.task} takes {'texts' if model.head.texts else 'pictures alone'}")
        if isinstance(texts, str) or isinstance(pictures, Picture):
            raise TypeError("expected lists of pictures and of texts, not one of them")
        shown = [[some] if isinstance(some, Picture) else list(some) for some in pictures]
        if wrong := [number for number, some in enumerate(shown) if len(some) != model.head.pictures]:
            raise ValueError(f"{len(shown[wrong[0]])} pictures at place {wrong[0]}: the task has {model.head.pictures}")
        asked = [""] * len(shown) if texts is None else list(texts)
        if len(asked) != len(shown):
            raise ValueError(f"{len(shown)} times pictures for {len(asked)} texts")
        words = None if texts is None else questions(self.tokenizer, self.meta.get("recipe", {}).get("data", {}))
        say, found = answerer(model, self._words), []
        for low in range(0, len(shown), BATCH):
            some = slice(low, low + BATCH)
            columns = zip(*([self._pixels(picture) for picture in pair] for pair in shown[some]), strict=True)
            ids = [[] for _ in asked[some]] if words is None else words.encode(asked[some])
            with torch.no_grad():
                images = [stack(column).to(self.device) for column in columns]
                said = say(model, images, TextBatch.of(ids).to(self.device))
            found += [[Answer(*one) for one in each] for each in said]
        return found

    def explain(self, picture: Picture, text: str, layer: int | None = None) -> Explanation:
        """Where in the picture the model finds the text and each of its words: see :mod:`imglish.evaluation.explain`.

        layer: of the fusion's cross-attention (default: the middle one). Raises ``MissingCapabilityError`` for a model
        of which nothing can be shown.
        """
        return explain(self.network, self.tokenizer, self._pixels(picture), text, layer)

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _pixels(self, picture: Picture) -> PictureForm:
        if isinstance(picture, Regions):
            return picture
        if self._transform is None:
            raise TypeError("this model reads the regions of a detector: give imglish.data.regions.Regions")
        source = Path(picture) if isinstance(picture, str) else picture
        return picture_of(self._transform(decode(source)), self._transform)

    def _as_gallery(self, pictures: Sequence[Picture] | Gallery) -> Gallery:
        return pictures if isinstance(pictures, Gallery) else self.gallery(pictures)

    def _logits(self, gallery: Gallery, chosen: Sequence[int], texts: EncodedTexts) -> Tensor:
        """ITM logits ``(len(chosen), T, 2)`` on the CPU: each picture's keys and values are projected once."""
        require(self.network, Matches, "match")
        assert isinstance(self.network, Matches)
        if gallery.tokens is None:
            raise ValueError("the gallery was made with keep_tokens=False: it cannot be matched or reranked")
        count = texts.segments.count
        found = []
        with torch.no_grad():
            for part in _parts(list(chosen), max(1, PAIRS // count)):
                memory = self.network.project_images(_on(_some(gallery.tokens, part), self.device))
                for low in range(0, count, PAIRS):
                    some = range(low, min(low + PAIRS, count))
                    pairs = [(i, t) for i in range(len(part)) for t in some]
                    logits = self.network.match(memory, texts, [i for i, _ in pairs], [t for _, t in pairs])
                    found.append(logits.float().cpu().view(len(part), len(some), 2))
        if count > PAIRS:  # then a part is one picture, in several pieces
            per_picture = -(-count // PAIRS)
            found = [torch.cat(found[i : i + per_picture], dim=1) for i in range(0, len(found), per_picture)]
        return torch.cat(found)


def _on(tokens: Tensor | Ragged, device: torch.device | str) -> Tensor | Ragged:
    return tokens.to(device) if isinstance(tokens, Tensor) else tokens.map(lambda rows: rows.to(device))


def _some(tokens: Tensor | Ragged, pictures: list[int]) -> Tensor | Ragged:
    return tokens[pictures] if isinstance(tokens, Tensor) else tokens.select(pictures)


def _joined(parts: list[Tensor | Ragged]) -> Tensor | Ragged:
    ragged = [part for part in parts if isinstance(part, Ragged)]
    return Ragged.cat(ragged) if ragged else torch.cat([part for part in parts if isinstance(part, Tensor)])


def _name(picture: Picture) -> str:
    """Of a file its path, else a digest of what it holds: random numbers of sampling depend on it."""
    if isinstance(picture, (str, Path)):
        return str(picture)
    if isinstance(picture, Regions):
        return blake2b(picture.features.float().numpy().tobytes()).hexdigest()
    return blake2b(picture if isinstance(picture, bytes) else picture.tobytes()).hexdigest()


def _parts(items: list[int], size: int) -> Iterator[list[int]]:
    for low in range(0, len(items), size):
        yield items[low : low + size]


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    classes: str | Path | None = None,
) -> Model:
    """The model called ``name``: a folder that ``imglish train`` or ``imglish convert`` wrote, a released checkpoint of
    the family (a file, or a folder of transformers or open_clip), or ``hf:OWNER/NAME`` on the hub.

    device: default, a GPU where there is one; tokenizer: its file, for released weights that have none beside them;
    revision: on the hub; image_size, max_length: other sizes than the model was trained with, positions are fitted by
    the rule of its family; classes: a JSON file with the names of a released task model's answers. Raises
    ``CheckpointError``, which names the file and what is wrong with it.
    """
    return Model(load_any(name, tokenizer, revision, image_size, max_length, classes), device)
