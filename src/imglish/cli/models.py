"""`imglish models`: what can be trained, and which public checkpoints can be loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

DESCRIPTION = """\
Named configurations (`model: {name: ...}` in a recipe) with parameters and what each can do, and public checkpoints
(for `imglish convert` and `imglish.load`) with their licence and the score that their authors report.
"""


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 2 a family that does not exist."""
    parser = argparse.ArgumentParser("imglish models", description=DESCRIPTION)
    parser.add_argument("family", nargs="?", help="only this family (albef, beit3, blip, clip, coca, vilt, vlmo, ...)")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    arguments = parser.parse_args(argv)

    from imglish.checkpoints.known import architectures, public_checkpoints
    from imglish.models import registry

    if arguments.family is not None and arguments.family not in registry.FAMILIES:
        parser.error(f"there is no family {arguments.family!r}; there are: {', '.join(sorted(registry.FAMILIES))}")
    wanted = [a for a in architectures() if arguments.family in (None, a.family)]
    public = [c for c in public_checkpoints() if arguments.family in (None, c.family)]
    if arguments.json:
        print(json.dumps({"configurations": [asdict(a) for a in wanted], "checkpoints": [asdict(c) for c in public]}))
        return 0
    width = max(len(a.name) for a in wanted)
    print(f"{'configuration':<{width}}  parameters  image  can")
    for a in wanted:
        print(f"{a.name:<{width}}  {a.parameters / 1e6:8.1f} M  {a.image or '-':>5}  {', '.join(a.can)}")
    if public:
        print("\npublic checkpoints")
    for c in public:
        print(f"  {c.where}\n      {c.image} px, {c.licence}; for {c.for_}. {c.score}")
    return 0
