"""What the captions are like: lengths, languages, words, and texts that stand beside many pictures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from imglish.data.records import Record
from imglish.inspection.languages import function_words, language_of, words

SHOWN_WORDS = 40
_SAID = re.compile(r"\w+")  # with digits: "size 38" is not "size 39"
SPOKEN = 0.05  # share of the captions from which on a language counts as one of the set
LONG = 200  # words; a longer caption is more likely a page than a caption


@dataclass
class Captions:
    """lengths: words of each caption; per_picture: captions of each record; texts: 64-bit hashes of the captions, lower
    case and without punctuation; common: most frequent words other than function words of the set's languages;
    repeated: texts that several pictures have, with the number of pictures."""

    lengths: np.ndarray
    per_picture: np.ndarray
    texts: np.ndarray
    languages: Counter[str] = field(default_factory=Counter)
    common: list[tuple[str, int]] = field(default_factory=list)
    vocabulary: int = 0
    repeated: list[tuple[str, int]] = field(default_factory=list)
    swapped: int = 0

    def __len__(self) -> int:
        return len(self.lengths)


def read_captions(
    records: Iterable[Record], progress: Callable[[Iterable[Record]], Iterable[Record]] = iter
) -> Captions:
    """Read all captions once. Memory: a few bytes a caption, and the different words."""
    lengths: list[int] = []
    per_picture: list[int] = []
    hashes: list[int] = []
    languages: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    seen: Counter[int] = Counter()
    examples: dict[int, str] = {}
    swapped = 0
    for record in progress(records):
        per_picture.append(len(record.captions))
        swapped += len(record.swapped)
        own: set[int] = set()
        for caption in record.captions:
            said = words(caption)
            lengths.append(len(said))
            counts.update(said)
            languages[language_of(caption)] += 1
            text = hash(" ".join(_SAID.findall(caption.lower())) or caption)
            hashes.append(text)
            if text not in own:
                own.add(text)
                seen[text] += 1
                if seen[text] == 2:
                    examples[text] = caption
    spoken = [language for language, count in languages.items() if count >= SPOKEN * len(lengths)]
    left_out = function_words(spoken)
    common = [(word, count) for word, count in counts.most_common(SHOWN_WORDS + 400) if word not in left_out]
    repeated = sorted(((examples[text], seen[text]) for text in examples), key=lambda item: (-item[1], item[0]))
    return Captions(
        np.array(lengths, dtype=np.int64),
        np.array(per_picture, dtype=np.int64),
        np.array(hashes, dtype=np.int64),
        languages,
        common[:SHOWN_WORDS],
        len(counts),
        repeated,
        swapped,
    )


def suspicious(captions: Captions) -> dict[str, int]:
    """How many captions have a length that speaks of a mistake."""
    found = {
        "one word or none": int((captions.lengths <= 1).sum()),
        f"over {LONG} words": int((captions.lengths > LONG).sum()),
    }
    return {what: count for what, count in found.items() if count}
