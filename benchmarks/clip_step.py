"""One training step of CLIP (forward, loss, backward, AdamW): imglish against transformers.CLIPModel, same weights.

    python -m benchmarks.clip_step --threads 2 --batch 16
    python -m benchmarks.clip_step --device cuda --model clip-vit-b-16 --batch 512 --dtype bfloat16 --compile

Texts have 13 tokens on average; the peer gets them padded to the longest of the batch and to 77. bfloat16 is autocast
over float32 weights for both. The difference is that of the losses in float32. ``--compile``: the whole peer; of ours
the blocks of the vision Transformer, as training does. MFU counts the FLOPs that each form really has to do for its
rows (2 a multiply-add, forward + backward, no optimiser) against the dense bf16 peak of an H200.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clip_models import PATCHES, batch_of, build_pair, captions, padded, pictures
from benchmarks.common import H200_BF16_PEAK, arguments, machine, measure, megabytes, milliseconds, table
from imglish.training.cost import flop_counter
from imglish.training.setup import compile_towers


class Trained:
    """A model with its optimiser."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.model, self.device = model.train(), device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def forward(self, loss: Callable[[nn.Module], Tensor], dtype: str) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return loss(self.model)

    def step(self, loss: Callable[[nn.Module], Tensor], dtype: str) -> None:
        self.forward(loss, dtype).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def forms(options: Any, images: Tensor) -> dict[str, tuple[str, Callable[[nn.Module], Tensor]]]:
    """Name -> which model, and its loss on the batch."""
    sequences = captions(len(images))
    batch = batch_of(sequences, images)

    def peer(length: int) -> Callable[[nn.Module], Tensor]:
        given = padded(sequences, length, options.device)
        return lambda model: model(**given, pixel_values=images, return_loss=True).loss

    return {
        "transformers, padded to 77": ("peer", peer(77)),
        "transformers, padded to longest": ("peer", peer(max(map(len, sequences)))),
        "imglish, packed": ("ours", lambda model: model(batch)["itc"]),
    }


def flops(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    with flop_counter() as counter:
        loss(model).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", default="clip-vit-b-32", choices=sorted(PATCHES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = build_pair(options.model, options.device)
    images = pictures(options.batch, options.device)
    contenders = forms(options, images)
    print(f"Training step of {options.model}, {options.batch} pairs; {machine(options.device)}\n")
    models = {"ours": pair.ours, "peer": pair.peer}
    with torch.no_grad():
        losses = {name: loss(models[which]).item() for name, (which, loss) in contenders.items()}
    work = {name: flops(models[which], loss) for name, (which, loss) in contenders.items()}
    if options.compile:
        compile_towers(pair.ours)
        pair.peer.compile()
    trained = {which: Trained(model, options.device) for which, model in models.items()}
    rows = []
    for dtype in options.dtype:
        steps = {n: lambda w=w, f=f, d=dtype: trained[w].step(f, d) for n, (w, f) in contenders.items()}
        results = measure(steps, options.repeats, options.device)
        first = next(iter(results))
        for name, result in results.items():
            mfu = f"{work[name] / result.seconds / H200_BF16_PEAK:.1%}" if options.device == "cuda" else "-"
            speed = f"{results[first].seconds / result.seconds:.2f}x"
            rate = f"{options.batch / result.seconds:.1f}"
            cost = f"{work[name] / options.batch / 1e9:.1f}"
            error = f"{abs(losses[name] - losses[first]):.0e}"
            time = milliseconds(result.seconds)
            rows.append([dtype, name, time, speed, rate, cost, mfu, megabytes(result.peak), error])
    headers = ["dtype", "by", "time", "speed", "pairs/s", "GFLOP/pair", "MFU", "peak memory", "difference"]
    print(table(headers, rows))


if __name__ == "__main__":
    main()
