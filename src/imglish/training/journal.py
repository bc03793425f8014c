"""What a run tells: a progress bar, `log.jsonl` always, TensorBoard if asked for."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from imglish import atomic
from imglish.training.settings import SettingsError

LOG = "log.jsonl"
CALM = 30.0  # seconds between two lines of progress where the output is a file


class Journal:
    """Events of a run, one JSON object a line: ``event``, ``step`` and whatever belongs to it.

    Only the first process writes (``active``); on the others every call does nothing. A line that a kill cut off, and
    lines beyond the checkpoint that a run resumes from, are removed by :meth:`rewind`.
    """

    def __init__(self, folder: Path, active: bool, tensorboard: bool = False) -> None:
        self.path = folder / LOG
        self.active = active
        self.events: list[dict[str, Any]] = []
        self._bar: tqdm[Any] | None = None
        self._board: Any = _tensorboard(folder) if tensorboard and active else None
        if active:
            folder.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Keep the events up to ``step``, in the file and in ``events``."""
        if not self.active:
            return
        self.events = [event for event in read_events(self.path) if event["step"] <= step]
        text = "".join(_line(event) for event in self.events)
        atomic.write_file(self.path, lambda file: file.write(text.encode()))

    def write(self, event: str, step: int, **fields: Any) -> None:
        """Append one event, visible in the file at once."""
        if not self.active:
            return
        entry = {"event": event, "step": step, **fields}
        self.events.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))
        if self._board is not None:
            for name, value in _numbers(fields):
                self._board.add_scalar(f"{event}/{name}", value, step)

    def say(self, text: str) -> None:
        """A line for the person, above the progress bar."""
        if self.active:
            tqdm.write(text, file=sys.stderr)

    def start_bar(self, pairs: int, done: int) -> None:
        """Progress in pairs, with rate and time left."""
        if self.active:
            calm = 0.5 if sys.stderr.isatty() else CALM
            self._bar = tqdm(
                total=pairs,
                initial=done,
                unit="pair",
                unit_scale=True,
                desc="train",
                mininterval=calm,
                dynamic_ncols=True,
            )

    def advance(self, pairs: int) -> None:
        if self._bar is not None:
            self._bar.update(pairs)

    def show(self, values: Mapping[str, float]) -> None:
        """Current losses at the end of the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(f"{name} {value:.3f}" for name, value in values.items()), refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._board is not None:
            self._board.close()
            self._board = None


def read_events(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a log; one that a kill cut off is left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            events.append(event)
    return events


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(_finite(event), ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """NaN and infinity as texts: JSON has no numbers for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _numbers(fields: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, float]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{where}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{where}{name}", value


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SettingsError(
            "log.tensorboard", "TensorBoard is not installed: pip install 'imglish[tensorboard]', or set it to false"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))
