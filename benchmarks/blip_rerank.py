"""Matching with BLIP: one picture against many texts and one text against many pictures, imglish against transformers.

    python -m benchmarks.blip_rerank --threads 2

What a search does after it has found candidates: texts and pictures are encoded, pairs are scored by ITM. The peer is
the text encoder and ITM head of ``BlipForImageTextRetrieval``, given the same tokens (the model's own ``forward`` would
encode a picture again for each of its texts), texts padded to the longest. Same weights, same first token. The
published models for retrieval take pictures of 384 pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.blip_models import Pair, build_pair, captions, padded, pictures
from benchmarks.common import arguments, machine, measure, megabytes, milliseconds, table
from imglish.data.batch import TextBatch


def forms(pair: Pair, tokens: Tensor, sequences: list[list[int]]) -> dict[str, Callable[[], Tensor]]:
    """ITM logits ``(P, 2)`` of one picture with all texts, or of all pictures with one text."""
    count, device, opening = max(len(tokens), len(sequences)), str(tokens.device), pair.ours.config.encode_id
    given = padded(sequences, max(map(len, sequences)), device, opening)
    packed = TextBatch.of(sequences).to(device)
    images = [i % len(tokens) for i in range(count)]
    texts = [i % len(sequences) for i in range(count)]

    def peer() -> Tensor:
        everyone = {name: value.expand(count, -1) for name, value in given.items()}
        seen = tokens.expand(count, -1, -1)
        states = pair.peer.retrieval.text_encoder(**everyone, encoder_hidden_states=seen).last_hidden_state
        logits: Tensor = pair.peer.retrieval.itm_head(states[:, 0])
        return logits

    encoded = pair.ours.encode_texts(packed)  # the search that found the candidates has done this

    def ours() -> Tensor:
        return pair.ours.match(pair.ours.project_images(tokens), encoded, images, texts)

    return {"transformers": peer, "imglish": ours}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", default="blip-base")
    parser.add_argument("--size", type=int, default=384, help="pixels a side")
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = build_pair(options.model, options.size, options.device)
    pair.ours.eval(), pair.peer.eval()
    sequences = captions(options.candidates, pair.ours.config.vocab_size)
    typical = sorted(sequences, key=len)[len(sequences) // 2]
    print(f"Matching with {options.model} at {options.size} px; {machine(options.device)}\n")
    rows = []
    for dtype in options.dtype:
        pair.ours.to(getattr(torch, dtype)), pair.peer.to(getattr(torch, dtype))
        with torch.inference_mode():
            images = pictures(options.candidates, options.size, options.device).to(getattr(torch, dtype))
            tokens = torch.cat([pair.ours.vision(part) for part in images.split(4)])
            cases = {
                f"1 picture, {len(sequences)} texts": (tokens[:1], sequences),
                f"1 text, {len(tokens)} pictures": (tokens, [typical]),
            }
            for what, (seen, texts) in cases.items():
                calls = forms(pair, seen, texts)
                results = measure({n: lambda f=f: f() for n, f in calls.items()}, options.repeats, options.device)
                reference = calls["transformers"]()
                for name, result in results.items():
                    error = f"{(calls[name]() - reference).abs().max():.0e}"
                    speed = f"{results['transformers'].seconds / result.seconds:.2f}x"
                    time = milliseconds(result.seconds)
                    rows.append([what, dtype, name, time, speed, megabytes(result.peak), error])
    print(table(["scored", "dtype", "by", "time", "speed", "peak memory", "difference"], rows))


if __name__ == "__main__":
    main()
