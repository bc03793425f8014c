"""`imglish quickstart`: train and evaluate a small model on data drawn here, and write a report."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Draws scenes of two people in coloured garments, trains a small ALBEF on them and, for comparison, its towers by
contrast alone, asks both who wears what, and writes report.html. Nothing is downloaded. About 6 minutes on 2 CPU cores.
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 1 a training failed, 2 wrong arguments, 75 stopped (the same command continues)."""
    parser = argparse.ArgumentParser(
        "imglish quickstart", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="steps of each training")
    length.add_argument("--minutes", type=float, help="of both trainings together; steps are chosen for this machine")
    parser.add_argument("--out", default="quickstart-out", help="folder of the results (default: quickstart-out)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads of each training (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="seconds: tries the machinery, learns next to nothing")
    arguments = parser.parse_args(argv)

    from imglish.quickstart import QuickstartConfig, Stopped, TrainingFailed, run
    from imglish.quickstart_report import verdict
    from imglish.training.settings import SettingsError

    try:
        out = Path(arguments.out)
        config = QuickstartConfig.tiny(out) if arguments.tiny else QuickstartConfig(out)
        given = {"steps": arguments.steps, "minutes": arguments.minutes, "threads": arguments.threads}
        changes = {name: value for name, value in given.items() if value is not None}
        scenes = dataclasses.replace(config.scenes, seed=arguments.seed)
        outcome = run(dataclasses.replace(config, seed=arguments.seed, scenes=scenes, **changes))
    except Stopped as stopped:
        print(f"imglish quickstart: {stopped}", file=sys.stderr)
        return 75
    except TrainingFailed as failed:
        print(f"imglish quickstart: {failed}", file=sys.stderr)
        return 1
    except (ValueError, SettingsError, OSError) as error:
        print(f"imglish quickstart: {error}", file=sys.stderr)
        return 2
    print(verdict(outcome).replace("**", "").replace("\n\n", "\n"))
    print(f"report: {outcome.report}")
    return 0
