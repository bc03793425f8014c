"""The moving average of a momentum teacher: one fused call against a loop over parameters.

Peer: the loop of the official ALBEF and MoCo code, ``p_m.data = p_m.data * m + p.data * (1 - m)``.

    python -m benchmarks.ema --model albef-base
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.common import arguments, machine, measure, megabytes, milliseconds, table
from imglish.models import registry
from imglish.objectives.momentum import MomentumTeacher, TeacherConfig


@torch.no_grad()
def naive(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.data = mine.data * momentum + theirs.data * (1.0 - momentum)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", default="albef-base")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    student = registry.build(registry.named(options.model)).to(options.device)
    config = TeacherConfig(queue_size=0)
    teacher = MomentumTeacher(student, config, embed_dim=1)
    count = sum(p.numel() for p in student.parameters()) / 1e6
    print(f"EMA of {options.model}, {count:.0f} M parameters; {machine(options.device)}\n")
    results = measure(
        {
            "naive loop (official ALBEF)": lambda: naive(teacher.model, student, config.momentum),
            "imglish, one fused lerp": lambda: teacher.blend(student),
        },
        options.repeats,
        options.device,
    )
    first = next(iter(results.values())).seconds
    rows = [
        [name, milliseconds(r.seconds), f"{first / r.seconds:.2f}x", megabytes(r.peak)] for name, r in results.items()
    ]
    print(table(["form", "time", "speed", "peak memory"], rows))


if __name__ == "__main__":
    main()
