"""Reranking at the size of COCO's test set, in the official order of work and in ours; one model, one process.

    python -m benchmarks.retrieval_coco --threads 2 --model albef-base --size 384 --pictures 1
    python -m benchmarks.retrieval_coco --device cuda --model albef-base --size 384 --pictures 16

5,000 pictures, 25,010 captions, the first 256 candidates of each, both ways. Features are simulated: captions lie near
their picture, which decides which pairs both directions ask for. Only a sample of pairs is timed, the TOTAL IS
EXTRAPOLATED from time a pair. Encoding, the same in both, is left out.

The official evaluation (ALBEF, BLIP) goes through all queries of one direction, then of the other: the picture tokens
are copied for each of the 256 pairs of a query and projected again in every fusion layer, captions are padded to 30
tokens, and all rows pass the last layer. Ours scores a pair once whoever asks for it, a picture's pairs together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import arguments, machine, measure, table
from imglish.data.batch import TextBatch
from imglish.evaluation.encoding import Machine
from imglish.evaluation.rerank import PairList, match_pairs, nearest
from imglish.evaluation.tokens import TokenStore
from imglish.models import registry
from imglish.models.aligned import AlignedFusion
from imglish.nn.segments import Segments

PICTURES, CAPTIONS, FIRST, PADDED = 5000, 25010, 256, 30


def candidates(seed: int = 0) -> tuple[Tensor, Tensor]:
    """The first candidates by simulated features: captions of each picture, pictures of each caption."""
    generator = torch.Generator().manual_seed(seed)
    pictures = F.normalize(torch.randn(PICTURES, 64, generator=generator), dim=1)
    owner = torch.arange(CAPTIONS) % PICTURES
    captions = F.normalize(pictures[owner] + 0.12 * torch.randn(CAPTIONS, 64, generator=generator), dim=1)
    return nearest(pictures, captions, FIRST), nearest(captions, pictures, FIRST)


def official(model: AlignedFusion, tokens: Tensor, rows: Tensor) -> Tensor:
    """Matching logits ``(P,)`` of pairs: tokens ``(P, L, D)``, a copy for each; rows ``(P * 30, D)``, padded texts."""
    count = len(tokens)
    segments, one = Segments.equal(count, PADDED), Segments.equal(count, 1)
    memory = model.project_images(tokens)
    for layer in range(len(memory.layers)):
        memory.layers[layer]  # projected for every copy, as the official cross-attention does
    states = model.fuse(rows, segments, memory, one)
    return model.itm_head(states[segments.starts(states.device)])[:, 1]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", default="albef-base")
    parser.add_argument("--size", type=int, default=384, help="pixels a side")
    parser.add_argument("--pictures", type=int, default=1, help="pictures and captions in the timed sample")
    parser.add_argument("--at-once", type=int, default=FIRST, help="pairs that pass the fusion at a time, in both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = registry.named(options.model)
    vision = replace(config.vision, image=replace(config.vision.image, size=options.size))
    model = registry.build(replace(config, vision=vision)).to(options.device).eval()
    assert isinstance(model, AlignedFusion)
    print(f"Reranking with {options.model} at {options.size} px; {machine(options.device)}\n")

    captions_of, pictures_of = candidates()
    pairs = PairList.of(captions_of, pictures_of)
    asked = captions_of.numel() + pictures_of.numel()
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(13, 3, CAPTIONS).round(), 6, PADDED).astype(int)
    some = np.sort(rng.choice(PICTURES, options.pictures, replace=False))
    wanted = pairs.codes[np.isin(pairs.images, some)]
    place = np.searchsorted(some, wanted // CAPTIONS)
    used, number = np.unique(wanted % CAPTIONS, return_inverse=True)
    sample = PairList(np.sort(place * len(used) + number), len(used))
    with torch.inference_mode():
        images = torch.randint(0, 256, (options.pictures, 3, options.size, options.size), dtype=torch.uint8)
        tokens = model.vision(images.to(options.device))
        words = [rng.integers(5, config.vocab_size - 2, lengths[n]).tolist() for n in used]
        texts = model.encode_texts(TextBatch.of(words).to(options.device))
        ids = torch.randint(5, config.vocab_size - 2, (options.at_once * PADDED,), device=options.device)
        padded = model.encode_texts(TextBatch(ids, Segments.equal(options.at_once, PADDED))).rows
        assert padded is not None
        store = TokenStore(torch.float32, 2**33)
        store.put(0, tokens)
        quiet = Machine(pair_block=options.at_once, image_block=max(options.pictures, 1), progress=False)
        calls: dict[str, Callable[[], object]] = {
            "official order": lambda: official(model, tokens[:1].expand(options.at_once, -1, -1), padded),
            "imglish": lambda: match_pairs(model, store, texts, sample, options.pictures, quiet),
        }
        found = measure(calls, options.repeats, options.device, peaks=options.device == "cuda")
    rows = []
    for name, timed, total in (("official order", options.at_once, asked), ("imglish", len(sample), len(pairs))):
        each = found[name].seconds / timed
        rows.append([name, f"{total:,}", f"{timed:,}", f"{1000 * each:.3f} ms", f"{each * total / 3600:.2f} h"])
    speed = found["official order"].seconds / options.at_once * asked / (found["imglish"].seconds / len(sample))
    print(table(["order", "pairs", "timed", "a pair", "all (EXTRAPOLATED)"], rows))
    print(f"\n{speed / len(pairs):.1f}x")


if __name__ == "__main__":
    main()
