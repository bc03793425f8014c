"""Captions by BLIP: imglish against transformers, same weights, same texts.

    python -m benchmarks.caption --threads 2

Two times for each way of writing: from the pixels, and from the encoded pictures. Both have the same vision tower,
whose time stands alone in the first rows: however fast the writing, the speed from the pixels cannot go beyond the
peer's time over that of the tower.
The prompt has three words, as "a picture of" has. The weights are random, so no caption closes by itself: all of them
run to the longest length, which leaves out what finished captions save. With beams both write the same tokens; samples
differ, because each picture has random numbers of its own here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.blip_models import SEP, Pair, build_pair, pictures
from benchmarks.common import arguments, machine, measure, megabytes, milliseconds, table
from imglish.generation.config import GenerationConfig
from imglish.generation.engine import generate
from imglish.models.capabilities import EncodedImages

WAYS = {
    "greedy": GenerationConfig(min_length=20, max_length=20),
    "3 beams": GenerationConfig(beams=3, min_length=20, max_length=20),
    "5 samples": GenerationConfig(sample=True, n=5, top_p=0.9, min_length=20, max_length=20),
}


def opening(pair: Pair) -> list[int]:
    """[DEC] and three words."""
    return [pair.ours.config.decode_id, 37, 61, 97]


def write_ours(pair: Pair, tokens: Tensor, config: GenerationConfig) -> list[list[int]]:
    keys, begin = [str(i) for i in range(len(tokens))], opening(pair)
    found = generate(pair.ours, EncodedImages(tokens[:, 0], tokens), [begin] * len(keys), SEP, config, keys)
    return [[*begin, *text.ids] for texts in found for text in texts]


def write_theirs(pair: Pair, tokens: Tensor, config: GenerationConfig) -> list[list[int]]:
    """As the peer's own ``generate`` does after its vision tower."""
    given: dict[str, Any] = {"max_length": config.max_length, "min_length": config.min_length}
    if config.sample:
        given |= {"do_sample": True, "top_p": config.top_p, "top_k": config.top_k, "num_return_sequences": config.n}
    else:
        given |= {"do_sample": False, "num_beams": config.beams}
    found: list[list[int]] = pair.peer.text_decoder.generate(
        input_ids=torch.tensor([opening(pair)], device=tokens.device).repeat(len(tokens), 1),
        eos_token_id=SEP,
        pad_token_id=0,
        encoder_hidden_states=tokens,
        encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device),
        **given,
    ).tolist()
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", default="blip-base")
    parser.add_argument("--batch", type=int, default=8, help="pictures at a time")
    parser.add_argument("--size", type=int, default=384, help="pixels a side; the published captioner has 384")
    parser.add_argument("--ways", nargs="+", choices=sorted(WAYS), default=list(WAYS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    pair = build_pair(options.model, options.size, options.device)
    pair.ours.eval().to(dtype), pair.peer.eval().to(dtype)
    images = pictures(options.batch, options.size, options.device).to(dtype)
    print(f"{options.batch} pictures of {options.size} px, {options.dtype}; {machine(options.device)}\n")
    rows = []
    vision = pair.peer.retrieval.vision_model
    writers = {"transformers": write_theirs, "imglish": write_ours}
    towers = {
        "transformers": lambda: vision(images).last_hidden_state,
        "imglish": lambda: pair.ours.vision(images),
    }
    with torch.inference_mode():
        tokens = pair.ours.vision(images)
        results = measure(dict(towers), options.repeats, options.device, peaks=options.device == "cuda")
        for name, result in results.items():
            speed = f"{results['transformers'].seconds / result.seconds:.2f}x"
            rows.append(["-", "vision tower alone", name, milliseconds(result.seconds), speed, "-", "-"])
        for way in options.ways:
            config = WAYS[way]
            same = sum(a == b for a, b in zip(*(write(pair, tokens, config) for write in writers.values())))
            for start in ("pixels", "encoded pictures"):

                def call(name: str, config: GenerationConfig = config, start: str = start) -> list[list[int]]:
                    seen = towers[name]() if start == "pixels" else tokens
                    return writers[name](pair, seen, config)

                calls = {name: lambda n=name, c=call: c(n) for name in writers}
                results = measure(calls, options.repeats, options.device, peaks=options.device == "cuda")
                for name, result in results.items():
                    speed = f"{results['transformers'].seconds / result.seconds:.2f}x"
                    texts = "-" if config.sample else f"{same} of {options.batch}"
                    memory = megabytes(result.peak) if options.device == "cuda" else "-"
                    rows.append([way, start, name, milliseconds(result.seconds), speed, memory, texts])
    print(table(["written", "from", "by", "time", "speed", "peak memory", "same texts"], rows))


if __name__ == "__main__":
    main()
