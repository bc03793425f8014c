"""A model whose numbers can be checked by hand, with the protocols of the real ones, and its tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imglish.data.batch import TextBatch
from imglish.data.records import Record
from imglish.models.capabilities import EncodedImages, EncodedTexts, ImageMemory
from imglish.nn.segments import Ragged, Segments


class Words:
    """One token for each word ``w<number>``, after a leading 0."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[0, *(int(word[1:]) for word in text.split())] for text in texts]


class Towers(nn.Module):
    """Features are the first columns of the mean token; counts what it was asked to do."""

    def __init__(self, width: int = 6, coarse: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = nn.Parameter(torch.randn(50, width, generator=generator))
        self.coarse = coarse
        self.calls: Counter[str] = Counter()

    def encode_images(self, images: Tensor) -> EncodedImages:
        self.calls["pictures"] += len(images)
        tokens = images.flatten(2).mT
        return EncodedImages(F.normalize(tokens.mean(1)[:, : self.coarse], dim=-1), tokens)

    def encode_texts(self, texts: TextBatch) -> EncodedTexts:
        self.calls["captions"] += len(texts)
        rows = self.words[texts.ids]
        return EncodedTexts(
            F.normalize(self._means(rows, texts.segments)[:, : self.coarse], dim=-1), texts.segments, rows
        )

    @staticmethod
    def _means(rows: Tensor, segments: Segments) -> Tensor:
        return torch.stack([part.mean(0) for part in rows.split(list(segments.lengths))])


class Fusion(Towers):
    """Scores a pair by all columns: what the coarse features have lost decides."""

    def project_images(self, tokens: Tensor) -> ImageMemory:
        self.calls["projected"] += len(tokens)
        flat = tokens.flatten(0, 1)[:, None]
        return ImageMemory(((flat, flat),), Segments.equal(tokens.shape[0], tokens.shape[1]))

    def match(
        self, memory: ImageMemory, texts: EncodedTexts, image_index: Sequence[int], text_index: Sequence[int]
    ) -> Tensor:
        self.calls["pairs"] += len(image_index)
        self.calls["largest call"] = max(self.calls["largest call"], len(image_index))
        assert texts.rows is not None
        images = self._means(memory.layers[0][0][:, 0], memory.segments)[list(image_index)]
        captions = self._means(texts.rows, texts.segments)[list(text_index)]
        score = (F.normalize(images, dim=1) * F.normalize(captions, dim=1)).sum(1) * 20
        return torch.stack([score * 0.5, score], dim=1)


class OneStream(nn.Module):
    """No towers: pictures of any size become ragged rows, and a pair is scored as :class:`Fusion` does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Fusion()
        self.calls = self.inner.calls

    def embed_images(self, images: Tensor) -> EncodedImages:
        tokens = images.flatten(2).mT
        rows = torch.cat([tokens[i, : 3 + i % 4] for i in range(len(tokens))])
        return EncodedImages(
            rows.new_zeros(len(images), 0), Ragged(rows, Segments.of(3 + i % 4 for i in range(len(images))))
        )

    def embed_texts(self, texts: TextBatch) -> EncodedTexts:
        return EncodedTexts(self.inner.words.new_zeros(len(texts), 0), texts.segments, self.inner.words[texts.ids])

    def project_images(self, tokens: Ragged) -> ImageMemory:
        return ImageMemory(((tokens.rows[:, None],),), tokens.segments)

    def match(
        self, memory: ImageMemory, texts: EncodedTexts, image_index: Sequence[int], text_index: Sequence[int]
    ) -> Tensor:
        return self.inner.match(memory, texts, image_index, text_index)


def pictures_of(model: Towers, captions: list[str], noise: float, seed: int = 0) -> Tensor:
    """A picture ``(D, 2, 3)`` for each caption that looks like it: in every pixel the mean of its words, with noise."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([model.words.detach()[ids].mean(0) for ids in Words().encode(captions)])
    return means[:, :, None, None] + noise * torch.randn(*means.shape, 2, 3, generator=generator)


def a_set(
    model: Towers, count: int = 30, per_picture: int = 2, seed: int = 0
) -> tuple[list[Record], dict[int, Tensor]]:
    """Records with ``per_picture`` captions of two to five words, and the picture of each ``image_id``."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[str]:
        return [f"w{i}" for i in torch.randint(1, 50, (n,), generator=generator).tolist()]

    captions = [words(2 + i % 4) for i in range(count)]
    every = [(" ".join(c), *(" ".join([*c, *words(1)]) for _ in range(per_picture - 1))) for c in captions]
    pictures = pictures_of(model, [c[0] for c in every], 0.2)
    records = [Record(f"p{i}", b"", c, image_id=100 + i) for i, c in enumerate(every)]
    return records, {100 + i: picture for i, picture in enumerate(pictures)}
