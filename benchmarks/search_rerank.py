"""Reranking the first pictures of a search: kept image tokens against encoding again, and against transformers.

    python -m benchmarks.search_rerank --candidates 20 40 --repeats 1

The whole way of ``Index.search``: text tower, recall among as many pictures, reading what is kept, fusion. The peer is
``BlipForImageTextRetrieval`` with the same weights, called as its documentation does: it gets the text and the
pictures, decoded from the same thumbnails, in one batch. "difference" is the largest of the match probabilities (tokens
are kept in bfloat16). At 384 pixels a core encodes about one picture a second, and three of the four ways encode, each
once to warm up: with one repeat 20 pictures take some five minutes of one core.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import imglish.search
from benchmarks.blip_models import Pair, build_pair
from benchmarks.common import arguments, machine, measure, milliseconds, table
from imglish.api import Model
from imglish.checkpoints import native
from imglish.data.images import decode
from imglish.data.pictures import picture_of, stack
from imglish.data.sources import open_source
from imglish.data.tokenizers import Tokenizer
from imglish.nn.embed import normalise
from imglish.search import Index
from imglish.search.feeding import Feed
from imglish.search.indexing import IndexConfig, index_records, prepare
from imglish.search.store import open_store

TEXT = "a black dog and a white dog are running on the grass with a red ball"
WAYS: tuple[Feed, ...] = ("tokens", "thumbnails", "originals")


def photographs(folder: Path, count: int, side: tuple[int, int] = (1024, 768)) -> None:
    """JPEGs with enough in them to cost what photographs cost to decode."""
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize(
            side, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (side[1], side[0], 1), dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:04d}.jpg", quality=88)


def whole(pair: Pair, device: str) -> Model:
    """Ours with a tokenizer that knows the text."""
    words = Tokenizer.train_wordpiece([TEXT] * 2, 200)  # what is seen once is cut into letters
    return Model(native.Loaded(pair.ours, words, pair.ours.config, "itm", {}), device)


def make_index(folder: Path, model: Model, count: int) -> Path:
    photographs(folder / "photos", count)
    config = IndexConfig(tokens="bfloat16", duplicates=False, progress=False)
    store = open_store(str(folder / "index"), model.config.embed_dim)
    manifest = prepare(store, model, "model", config)
    records = open_source(str(folder / "photos"), needs="pictures")
    index_records(store, model, records, "photos", manifest, config)
    store.close()
    return folder / "index"


def forms(pair: Pair, model: Model, where: Path, count: int) -> dict[str, Callable[[], dict[str, float]]]:
    """The match probability of each of ``count`` pictures, by name."""
    opened = {way: imglish.search.open(where, model, feed_from=way) for way in WAYS}
    patches = pair.ours.vision.patch_embed
    transform = model.config.image.transform()

    def ours(index: Index) -> dict[str, float]:
        fresh = Index(index.store, index.manifest, model, index.feed_from)  # which remembers no ranking
        return {hit.key: hit.match or 0.0 for hit in fresh.search(TEXT, k=count, rerank=count).hits}

    def peer() -> dict[str, float]:
        store = opened["thumbnails"].store
        keys = [hit.key for hit in opened["thumbnails"].search(TEXT, k=count, rerank=0).hits]
        rows = store.get(keys, ("key", "thumbnail"))
        pixels = stack([picture_of(transform(decode(rows[key].thumbnail)), transform) for key in keys])
        ids = torch.tensor(model.tokenizer.encode([TEXT])).expand(count, -1).clone()
        ids[:, 0] = pair.ours.config.encode_id
        with torch.inference_mode():
            images = normalise(pixels, patches.mean, patches.std, torch.float32)
            found = pair.peer.retrieval(input_ids=ids, pixel_values=images, use_itm_head=True)
        return dict(zip(keys, found.itm_score.softmax(1)[:, 1].tolist()))

    return {"transformers": peer} | {f"imglish, {way}": partial(ours, index) for way, index in opened.items()}


def remembered(
    call: Callable[[], dict[str, float]], name: str, answers: dict[str, dict[str, float]]
) -> Callable[[], None]:
    """The call, whose last answer is kept, so that comparing answers costs no further run."""

    def run() -> None:
        answers[name] = call()

    return run


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", default="blip-base")
    parser.add_argument("--size", type=int, default=384, help="pixels a side")
    parser.add_argument("--candidates", nargs="+", type=int, default=[20])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = build_pair(options.model, options.size, options.device)
    pair.ours.eval(), pair.peer.eval()
    print(f"Reranking with {options.model} at {options.size} px; {machine(options.device)}\n")
    with tempfile.TemporaryDirectory() as folder:
        model = whole(pair, options.device)
        for count in options.candidates:
            calls = forms(pair, model, make_index(Path(folder) / str(count), model, count), count)
            answers: dict[str, dict[str, float]] = {}
            runs = {name: remembered(call, name, answers) for name, call in calls.items()}
            results = measure(runs, options.repeats, options.device, peaks=False)
            reference, rows = answers["transformers"], []
            for name, result in results.items():
                error = max(abs(answers[name][key] - reference[key]) for key in reference)
                speed = f"{results['transformers'].seconds / result.seconds:.1f}x"
                rows.append([str(count), name, milliseconds(result.seconds), speed, f"{error:.0e}"])
            print(table(["pictures", "by", "time", "speed", "difference"], rows), flush=True)


if __name__ == "__main__":
    main()
