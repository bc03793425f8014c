"""Photographs of Flickr8k with one class each, from what their captions name, for trying classifiers on.

    python -m benchmarks.flickr_classes runs/flickr-classes.jsonl

A photograph has a class when at least three of its five captions name it and at least three name no other one. People's
words for it decide, so some labels are wrong; the same file trains and tests, with the split of the captions.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

CLASSES = {
    "dog": r"dogs?|puppy|puppies",
    "child": r"child|children|kids?|boys?|girls?|toddler|baby",
    "bicycle": r"bicycles?|bikes?|biker|cyclist|bicyclist|motorcycle",
    "water": r"water|ocean|sea|lake|river|pool|surf\w*|wave",
    "ball": r"football|soccer|basketball|baseball|tennis",
    "snow": r"snow\w*|ski\w*",
    "rock": r"rock|cliff|mountain|climb\w*",
}
LEAST = 3  # captions that name the class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/flickr8k/captions.jsonl"))
    arguments = parser.parse_args()
    patterns = {name: re.compile(rf"\b({words})\b") for name, words in CLASSES.items()}
    counts: Counter[tuple[str, str]] = Counter()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", encoding="utf-8") as file:
        for line in arguments.data.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            captions = [text.lower() for text in entry["captions"]]
            named = [n for n, p in patterns.items() if sum(bool(p.search(text)) for text in captions) >= LEAST]
            if len(named) == 1:
                counts[entry["split"], named[0]] += 1
                file.write(json.dumps({"image": entry["image"], "label": named[0], "split": entry["split"]}) + "\n")
    for split, name in sorted(counts):
        print(f"{split:6} {name:8} {counts[split, name]}")


if __name__ == "__main__":
    main()
