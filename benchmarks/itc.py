"""The contrastive loss, forward and backward: ours dense and chunked against the naive form.

Peer: the two logit matrices and two cross-entropies of the pseudo-code in the CLIP paper (figure 3), as most
implementations have it.

    python -m benchmarks.itc --rows 4096
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import arguments, machine, measure, megabytes, milliseconds, table
from imglish.objectives.itc import itc_loss


def naive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    target = torch.arange(image.shape[0], device=image.device)
    logits_image, logits_text = scale * image @ text.T, scale * text @ image.T
    return (F.cross_entropy(logits_image, target) + F.cross_entropy(logits_text, target)) / 2


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096, 8192], help="batch sizes")
    parser.add_argument("--width", type=int, default=512, help="embedding")
    parser.add_argument("--chunk", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"ITC forward + backward, float32, width {options.width}; {machine(options.device)}\n")
    rows = []
    for count in options.rows:
        generator = torch.Generator().manual_seed(0)
        image, text = (
            F.normalize(torch.randn(count, options.width, generator=generator), dim=1)
            .to(options.device)
            .requires_grad_()
            for _ in range(2)
        )
        scale = torch.tensor(14.3, device=options.device, requires_grad=True)
        ids = torch.arange(count, device=options.device)
        losses = {
            "naive (paper's pseudo-code)": lambda i=image, t=text, s=scale: naive(i, t, s),
            "imglish dense": lambda i=image, t=text, s=scale: itc_loss(i, t, s),
            "imglish dense, image ids": lambda i=image, t=text, s=scale, n=ids: itc_loss(i, t, s, n),
            f"imglish chunk {options.chunk}, image ids": lambda i=image, t=text, s=scale, n=ids: itc_loss(
                i, t, s, n, options.chunk
            ),
        }
        contenders = {
            name: lambda f=f, i=image, t=text, s=scale: torch.autograd.grad(f(), (i, t, s))
            for name, f in losses.items()
        }
        results = measure(contenders, options.repeats, options.device)
        first = next(iter(results.values())).seconds
        reference = naive(image, text, scale).item()
        for name, result in results.items():
            error = f"{abs(losses[name]().item() - reference):.0e}"
            speed = f"{first / result.seconds:.2f}x"
            rows.append([str(count), name, milliseconds(result.seconds), speed, megabytes(result.peak), error])
    print(table(["rows", "form", "time", "speed", "peak memory", "difference"], rows))


if __name__ == "__main__":
    main()
