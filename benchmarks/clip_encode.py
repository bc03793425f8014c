"""Encoding of pictures and texts with CLIP: imglish against transformers.CLIPModel, same weights, same outputs.

    python -m benchmarks.clip_encode --threads 2

Texts have 13 tokens on average. The peer gets them padded to the longest of the batch, and to 77 as its tokenizer
does by default (``padding="max_length"``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.clip_models import PATCHES, Pair, build_pair, captions, padded, pictures
from benchmarks.common import arguments, machine, measure, megabytes, milliseconds, table
from imglish.data.batch import TextBatch


def contenders(pair: Pair, images: int, texts: int, device: str) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """What is encoded -> who encodes it -> the call, which returns normalised features."""
    pixels, sequences = pictures(images, device), captions(texts)
    packed = TextBatch.of(sequences).to(device)
    longest = padded(sequences, max(map(len, sequences)), device)
    full = padded(sequences, 77, device)

    def peer_text(given: dict[str, Tensor]) -> Tensor:
        return F.normalize(pair.peer.get_text_features(**given).pooler_output.float(), dim=-1)

    def peer_image() -> Tensor:
        return F.normalize(pair.peer.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    return {
        f"{images} pictures": {
            "transformers": peer_image,
            "imglish": lambda: pair.ours.encode_images(pixels).features,
        },
        f"{texts} texts": {
            "transformers, padded to 77": lambda: peer_text(full),
            "transformers, padded to longest": lambda: peer_text(longest),
            "imglish, packed": lambda: pair.ours.encode_texts(packed).features,
        },
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", default="clip-vit-b-32", choices=sorted(PATCHES))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = build_pair(options.model, options.device)
    pair.ours.eval(), pair.peer.eval()
    print(f"Encoding with {options.model}; {machine(options.device)}\n")
    rows = []
    for dtype in options.dtype:
        pair.ours.to(getattr(torch, dtype)), pair.peer.to(getattr(torch, dtype))
        with torch.inference_mode():
            for what, forms in contenders(pair, options.images, options.texts, options.device).items():
                calls = {name: lambda f=f: f() for name, f in forms.items()}
                results = measure(calls, options.repeats, options.device)
                first = next(iter(forms))
                reference = forms[first]()
                for name, result in results.items():
                    error = f"{(forms[name]() - reference).abs().max():.0e}"
                    speed = f"{results[first].seconds / result.seconds:.2f}x"
                    time = milliseconds(result.seconds)
                    rows.append([what, dtype, name, time, speed, megabytes(result.peak), error])
    print(table(["encoded", "dtype", "by", "time", "speed", "peak memory", "difference"], rows))


if __name__ == "__main__":
    main()
