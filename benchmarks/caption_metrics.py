"""BLEU, ROUGE-L and CIDEr-D of many captions: imglish against pycocoevalcap, equal numbers, one process.

    python -m benchmarks.caption_metrics DATA

DATA: JSON lines with ``captions`` (Flickr8k's: five of each of 7,000 photographs). A picture's captions are its
references; the caption to be scored is half of one of them and half of the next picture's, so that it is partly right.
Two times for each: from strings that are tokenized already, by the peer's scorers in Python; and from the captions as
they are written, where the peer's tokenizer is a program in Java (left out, and said, where there is none). Needs the
extra ``captions``. The numbers of the corpus and of every picture have to agree, or the benchmark fails; the two
tokenizers agree on almost all strings, and the share is printed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import arguments, machine, measure, table
from imglish.evaluation.caption_metrics import NAMES, CaptionScores, caption_scores
from imglish.evaluation.ptb import tokenized

Texts = tuple[list[str], list[list[str]]]
"""The captions to be scored, and the references of each."""


def texts(path: Path, pictures: int) -> Texts:
    """The first ``pictures`` of a file, as said above."""
    lines = path.read_text(encoding="utf-8").splitlines()[:pictures]
    references: list[list[str]] = [json.loads(line)["captions"] for line in lines]
    candidates = []
    for mine, other in zip(references, references[1:] + references[:1]):
        first, second = mine[0].split(), other[0].split()
        candidates.append(" ".join([*first[: len(first) // 2], *second[len(second) // 2 :]]))
    return candidates, references


def scored_by_peer(candidates: list[str], references: list[list[str]]) -> dict[str, tuple[float, Any]]:
    """Of the corpus and of each picture, by our names."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given, said = dict(enumerate(references)), {n: [text] for n, text in enumerate(candidates)}
    found = dict(zip(NAMES, zip(*Bleu(4).compute_score(given, said, verbose=0))))
    found["rouge_l"] = Rouge().compute_score(given, said)
    found["cider"] = Cider().compute_score(given, said)
    return found


def tokenized_by_peer(candidates: list[str], references: list[list[str]]) -> Texts:
    """Two runs of the Java program, as the peer's own evaluation makes them."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    java = PTBTokenizer()
    said = java.tokenize({n: [{"caption": text}] for n, text in enumerate(candidates)})
    given = java.tokenize({n: [{"caption": text} for text in side] for n, side in enumerate(references)})
    return [text for (text,) in said.values()], list(given.values())


def tokenized_here(candidates: list[str], references: list[list[str]]) -> Texts:
    return [tokenized(text) for text in candidates], [[tokenized(text) for text in side] for side in references]


def check_equal(ours: CaptionScores, theirs: dict[str, tuple[float, Any]]) -> float:
    """The largest difference; ``AssertionError`` where it is more than rounding."""
    largest = 0.0
    for name, (corpus, items) in theirs.items():
        mine = [ours.corpus[name], *(item[name] for item in ours.items)]
        np.testing.assert_allclose(mine, [corpus, *items], rtol=0, atol=1e-9, err_msg=name)
        largest = max(largest, float(np.abs(np.array(mine) - [corpus, *items]).max()))
    return largest


def same_strings(first: Texts, second: Texts) -> tuple[int, int]:
    """(equal, all) of all captions and references."""
    flat = [
        [*candidates, *(text for side in references for text in side)] for candidates, references in (first, second)
    ]
    return sum(a == b for a, b in zip(*flat, strict=True)), len(flat[0])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("data", type=Path, help="JSON lines with captions")
    parser.add_argument("--pictures", type=int, default=5000)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    raw = texts(given.data, given.pictures)
    ready = tokenized_here(*raw)
    difference = check_equal(caption_scores(*ready), scored_by_peer(*ready))
    runs = {"tokenized strings": (lambda: scored_by_peer(*ready), lambda: caption_scores(*ready))}
    notes = [f"{len(raw[0])} pictures; the largest difference of a score is {difference:.1e}"]
    if shutil.which("java") is None:
        notes.append("there is no Java: the peer's tokenizer is left out")
    else:
        equal, every = same_strings(ready, tokenized_by_peer(*raw))
        notes.append(f"{equal} of {every} strings are tokenized alike ({100 * equal / every:.2f} %)")
        runs["as written"] = (
            lambda: scored_by_peer(*tokenized_by_peer(*raw)),
            lambda: caption_scores(*tokenized_here(*raw)),
        )
    rows = []
    for name, (theirs, ours) in runs.items():
        found = measure({"pycocoevalcap": theirs, "imglish": ours}, given.repeats, "cpu", peaks=False)
        base = found["pycocoevalcap"].seconds
        rows += [[name, who, f"{one.seconds:.2f} s", f"{base / one.seconds:.1f} x"] for who, one in found.items()]
    print(machine("cpu"))
    print(table(["from", "", "time", "faster"], rows))
    print("\n".join(notes))


if __name__ == "__main__":
    main()
