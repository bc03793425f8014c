"""Does bootstrapping help? Trainings on noisy captions, in one command that can be stopped and started again.

    python -m benchmarks.noise scenes --out runs/noise       # every arm at 0, 25 and 50 % noise, five seeds
    python -m benchmarks.noise flickr --out runs/noise       # Flickr8k with shuffled captions, filter against truth
    python -m benchmarks.noise report --out runs/noise --plot docs/images/noise.svg

Each (rate, seed) of `scenes` is one recipe of `imglish bootstrap`, all trainings have equal steps, and each arm ends in
a file of its own in OUT/results; what is there is not done again. `report` prints the tables and draws the curves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import noise_flickr, noise_report, noise_scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scenes", "flickr", "report"))
    parser.add_argument("--out", type=Path, default=Path("runs/noise"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=int, nargs="+", default=[0, 25, 50], help="percent of noisy captions")
    parser.add_argument("--steps", type=int, default=noise_scenes.STEPS, help="of every training of scenes")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/flickr8k"), help="folder of Flickr8k")
    parser.add_argument("--model", type=Path, help="of flickr: also a model that was trained on clean captions")
    parser.add_argument("--plot", type=Path, help="of report: an SVG to write")
    arguments = parser.parse_args()
    if arguments.what == "scenes":
        for seed in arguments.seeds:
            for rate in arguments.rates:
                noise_scenes.run(arguments.out, rate, seed, arguments.steps)
    elif arguments.what == "flickr":
        for rate in arguments.rates:
            if rate:
                noise_flickr.run(arguments.out, arguments.data, rate, arguments.model)
    else:
        noise_report.report(arguments.out, arguments.plot)


if __name__ == "__main__":
    main()
