"""The `imglish` command. Each subcommand is a module with `main(argv) -> int`, imported when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

INTERRUPTED = 130  # as shells say of a program that Ctrl-C ended
UNREAD = 141  # as they say of one whose output nobody reads any more

COMMANDS = {
    "train": ("imglish.cli.train", "train a model by a recipe; the same command resumes a run that was stopped"),
    "finetune": ("imglish.cli.finetune", "fine-tune a model for a task by a recipe: questions, statements, ..."),
    "eval": ("imglish.cli.evaluate", "measure a checkpoint: retrieval, captioning and other tasks"),
    "explain": ("imglish.cli.explain", "show where in a picture a model finds the words of a text"),
    "caption": ("imglish.cli.caption", "write captions for pictures: files, folders, data of any layout"),
    "score": ("imglish.cli.score", "how well captions fit their pictures, for all pairs of a source"),
    "filter": ("imglish.cli.filter", "choose pairs by their scores, and say why"),
    "bootstrap": ("imglish.cli.bootstrap", "train, caption, score, filter and train again, as one recipe"),
    "convert": ("imglish.cli.convert", "read a released checkpoint and write it as a folder of this library"),
    "export": ("imglish.cli.export", "write a model in another layout, at another size, or put it on the hub"),
    "models": ("imglish.cli.models", "what can be trained, and which public checkpoints can be loaded"),
    "index": ("imglish.cli.index", "make an index of pictures for searching, and bring it up to date"),
    "search": ("imglish.cli.search", "find pictures in an index by words, by a picture, or by both"),
    "serve": ("imglish.cli.serve", "search an index in a browser and over HTTP"),
    "data": ("imglish.cli.data", "look at data, write them in another layout, draw scenes"),
    "quickstart": ("imglish.cli.quickstart", "train and evaluate a small model on data drawn here, and write a report"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: imglish COMMAND ...\n\ncommands:\n{rows}\n\n"
        "imglish COMMAND --help shows what a command takes; imglish --version the version."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (0 well, 2 wrong usage or settings, 130 Ctrl-C, else by command)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from imglish import __version__

        print(f"imglish {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"imglish: there is no command {command!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        status: int = import_module(COMMANDS[command][0]).main(rest)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"imglish {command}: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who reads the output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to write goes nowhere
        return UNREAD
    return status
