"""Loading a model of published size: peak memory in units of its weights, and time, each in a process of its own.

    python -m benchmarks.loading [--model blip-base] [--repeats 3]

The model has random weights and is written in every form that its family has: as an export of this library, as the
authors' file (.pth; of ALBEF also that of retrieval, which has no head for words) and as folders of transformers
(safetensors), of which each holds a part of a BLIP. Memory is what the process held at most beyond what it held after
its imports; pages of a mapped file that were read count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write(name: str, folder: Path) -> dict[str, Path]:
    """The same model in every form that its family has."""
    from imglish.checkpoints import albef, blip, hf_export, native
    from imglish.data.tokenizers import Tokenizer
    from imglish.models import registry

    torch.manual_seed(0)
    config = registry.named(name)
    model = config.build().eval()
    special = getattr(config, "special_tokens", ())
    words = [*WORDS, *(f"word{number}" for number in range(config.vocab_size - len(WORDS) - len(special)))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = Tokenizer.load(folder / "vocab.txt", config.max_length).with_special(special)
    made = {"imglish": native.export(folder / "imglish", model, tokenizer)}
    tables = {
        "albef": {
            "authors": lambda: albef.table(config, True),
            "authors, retrieval": lambda: albef.table(config, False),
        },
        "blip": {"authors": lambda: blip.table(config)},
    }
    for form, table in tables.get(config.family, {}).items():
        made[form] = folder / f"{form}.pth"
        torch.save({"model": table().revert(model.state_dict())}, made[form])
    if config.family in ("blip", "clip", "vilt"):
        loaded = native.load(made["imglish"])
        for kind in hf_export.kinds(loaded):
            form = f"transformers, {kind}"
            made[form], _ = hf_export.export_transformers(folder / form, loaded, kind)
    return made


def measure(path: Path) -> dict[str, float]:
    """In this process: seconds, and the growth of the peak of its memory in bytes."""
    from imglish.checkpoints.loading import load_any

    before = peak_memory()
    start = time.perf_counter()
    loaded = load_any(path)
    seconds = time.perf_counter() - start
    size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    return {"seconds": seconds, "peak": peak_memory() - before, "weights": size}


def peak_memory() -> int:
    """What this process has held at most, in bytes. ``ru_maxrss`` would count the process that started it too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="blip-base")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for form, path in write(arguments.model, Path(folder)).items():
            command = [sys.executable, "-m", "benchmarks.loading", "--one", str(path)]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(arguments.repeats)]
            best = min(runs, key=lambda run: float(run["seconds"]))
            print(
                f"{arguments.model} {form:24} {best['weights'] / 1e6:7.1f} MB of weights, "
                f"peak {max(run['peak'] / run['weights'] for run in runs):.2f} of that, {best['seconds']:.2f} s"
            )
    seconds = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        subprocess.check_call([sys.executable, "-c", "import imglish"])
        seconds.append(time.perf_counter() - start)
    print(f"import imglish: {min(seconds):.2f} s in a new process")


if __name__ == "__main__":
    main()
