"""One training step of VLMo (ITC, ITM, MLM): packed experts against one forward an objective of the same model.

    python -m benchmarks.vlmo_step --model vlmo-small --batch 16
    python -m benchmarks.vlmo_step --device cuda --model vlmo-base --batch 64 --dtype bfloat16

The other form pads texts to 40 tokens, computes every row and MLM logits at every position, as the official code does.
Texts have 10 tokens on average. MFU counts the FLOPs that each form does (2 a multiply-add, forward + backward)
against the dense bf16 peak of an H200. The difference is that of the sum of the losses in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.common import H200_BF16_PEAK, arguments, machine, measure, megabytes, milliseconds, table
from benchmarks.vlmo_plain import PlainVlmo, make_batch
from imglish.models import registry
from imglish.models.vlmo import Vlmo, VlmoConfig
from imglish.training.cost import flop_counter

LENGTHS = (7, 8, 9, 10, 10, 11, 12, 13)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([value for name, value in losses.items() if not name.startswith("metric/")]).sum()


def flops(loss: Callable[[], Tensor]) -> int:
    with flop_counter() as counter:
        loss().backward()
    return counter.get_total_flops()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", default="vlmo-small", choices=[n for n in registry.names() if n.startswith("vlmo-")])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = registry.named(options.model)
    assert isinstance(config, VlmoConfig)
    model = Vlmo(replace(config, drop_path=0.0)).to(options.device).train()
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(options.batch)]
    batch = make_batch(config.image.size, lengths, config.vocab_size).to(options.device)
    plain = PlainVlmo(model)
    forms = {
        "one forward an objective": lambda: total(plain.losses(batch)),
        "packed": lambda: total(model.losses(batch)),
    }
    print(f"Training step of {options.model}, {options.batch} pairs; {machine(options.device)}\n")
    with torch.no_grad():
        values = {name: loss().item() for name, loss in forms.items()}
    work = {name: flops(loss) for name, loss in forms.items()}
    rows = []
    for dtype in options.dtype:

        def step(loss: Callable[[], Tensor], dtype: str = dtype) -> None:
            with torch.autocast(options.device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                value = loss()
            value.backward()
            model.zero_grad(set_to_none=True)

        steps = {name: lambda loss=loss, run=step: run(loss) for name, loss in forms.items()}
        results = measure(steps, options.repeats, options.device)
        first = next(iter(results))
        for name, result in results.items():
            mfu = f"{work[name] / result.seconds / H200_BF16_PEAK:.1%}" if options.device == "cuda" else "-"
            rows.append(
                [
                    dtype,
                    name,
                    milliseconds(result.seconds),
                    f"{results[first].seconds / result.seconds:.2f}x",
                    f"{work[name] / options.batch / 1e9:.1f}",
                    f"{work[name] / work[first] - 1:+.1%}",
                    mfu,
                    megabytes(result.peak),
                    f"{abs(values[name] - values[first]):.0e}",
                ]
            )
    headers = ["dtype", "form", "time", "speed", "GFLOP/pair", "FLOPs", "MFU", "peak memory", "difference"]
    print(table(headers, rows))


if __name__ == "__main__":
    main()
