"""Reading pairs with ViLT: imglish against transformers.ViltModel, same weights and outputs, pictures of mixed shapes.

    python -m benchmarks.vilt_encode --threads 2

The peer pads pictures to the largest of the batch and texts to 40 tokens, as ViLT was trained, or to the longest. The
shapes are those of photographs: 4:3 and 3:2 lying and standing, 16:9 and squares, resized by the paper's rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ViltConfig as PeerConfig
from transformers import ViltModel

from benchmarks.common import arguments, machine, measure, megabytes, milliseconds, table
from imglish.checkpoints.hf_vilt import convert
from imglish.data.batch import TextBatch
from imglish.data.patches import PatchBatch
from imglish.models.vilt import Pairs, Vilt, vilt_base
from imglish.nn.segments import Ragged, Rows

SHAPES = [(640, 480), (480, 640), (500, 375), (375, 500), (640, 427), (427, 640), (640, 360), (480, 480)]


def build(depth: int) -> tuple[Vilt, Any]:
    torch.manual_seed(0)
    peer = ViltModel(PeerConfig(num_hidden_layers=depth, max_image_length=-1)).eval()
    config = vilt_base()
    ours = type(config)(image=config.image, depth=depth).build().eval()
    ours.load_state_dict(ours.state_dict() | convert(peer.state_dict(), ours.state_dict()).state)
    return ours, peer


def inputs(count: int) -> tuple[list[Tensor], list[list[int]]]:
    """Normalised pictures ``(3, H, W)`` in the shapes that the rule gives, and texts of 8 to 18 tokens."""
    generator = torch.Generator().manual_seed(1)
    transform = vilt_base().image.transform()
    assert transform is not None
    shapes = [transform.shape(*SHAPES[i % len(SHAPES)]) for i in range(count)]
    lengths = torch.randint(8, 19, (count,), generator=generator).tolist()
    texts = [[101, *torch.randint(1000, 30000, (n - 2,), generator=generator).tolist(), 102] for n in lengths]
    return [torch.randn(3, *shape, generator=generator) for shape in shapes], texts


def padded(pictures: list[Tensor], texts: list[list[int]], length: int, device: str) -> dict[str, Tensor]:
    """The peer's input: pictures in the upper left corner of the largest, texts filled up to ``length``."""
    high, wide = (max(p.shape[side] for p in pictures) for side in (1, 2))
    pixels, mask = torch.zeros(len(pictures), 3, high, wide), torch.zeros(len(pictures), high, wide, dtype=torch.int64)
    for number, picture in enumerate(pictures):
        pixels[number, :, : picture.shape[1], : picture.shape[2]] = picture
        mask[number, : picture.shape[1], : picture.shape[2]] = 1
    made = {
        "input_ids": torch.tensor([text + [0] * (length - len(text)) for text in texts]),
        "attention_mask": torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts]),
        "pixel_values": pixels,
        "pixel_mask": mask,
    }
    return {name: value.to(device) for name, value in made.items()}


def contenders(ours: Vilt, peer: Any, count: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Who reads the pairs -> the call, which returns pooled pairs ``(N, D)``."""
    pictures, texts = inputs(count)
    parts = [PatchBatch.cut(picture[None].to(dtype), 32) for picture in pictures]
    grids = tuple(part.grids[0] for part in parts)
    packed = PatchBatch(torch.cat([part.pixels for part in parts]), grids, (None,) * count).to(device)
    words = TextBatch.of(texts).to(device)
    longest = max(map(len, texts))
    given = {n: padded(pictures, texts, n, device) for n in (40, longest)}
    for batch in given.values():
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    number = np.arange(count)

    def pairs() -> Pairs:
        tokens, embedded = ours.embed_images(packed).tokens, ours.embed_texts(words)
        assert isinstance(tokens, Ragged)
        assert embedded.rows is not None
        return Pairs.of(Ragged(embedded.rows, embedded.segments), tokens, number, number)

    def all_states() -> Tensor:
        made = pairs()
        return ours.pool(ours.read_pairs(made)[made.segments.starts(made.rows.device)])

    def pooled() -> Tensor:
        made = pairs()
        return ours.pool(ours.read_pairs(made, Rows.first(made.segments, made.rows.device)))

    return {
        "transformers, texts padded to 40": lambda: peer(**given[40]).pooler_output,
        "transformers, texts padded to longest": lambda: peer(**given[longest]).pooler_output,
        "imglish, packed, all states": all_states,
        "imglish, packed, pooled alone": pooled,
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--depth", type=int, default=12, help="layers (published: 12)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours, peer = build(options.depth)
    print(f"ViLT-B/32 of {options.depth} layers, {options.pairs} pairs; {machine(options.device)}\n")
    rows = []
    for name in options.dtype:
        dtype = getattr(torch, name)
        ours.to(options.device, dtype), peer.to(options.device, dtype)
        with torch.inference_mode():
            forms = contenders(ours, peer, options.pairs, options.device, dtype)
            results = measure(dict(forms), options.repeats, options.device)
            first = next(iter(forms))
            reference = forms[first]()
            for who, result in results.items():
                error = f"{(forms[who]() - reference).abs().max():.0e}"
                speed = f"{results[first].seconds / result.seconds:.2f}x"
                rows.append([name, who, milliseconds(result.seconds), speed, megabytes(result.peak), error])
    print(table(["dtype", "by", "time", "speed", "peak memory", "difference"], rows))


if __name__ == "__main__":
    main()
