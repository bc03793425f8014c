"""A run that is killed or stopped at any moment ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from imglish.data.batch import Batch
from imglish.training.checkpoint import ResumeError
from imglish.training.journal import read_events
from imglish.training.step import Stepper
from imglish.training.trainer import train
from tests.training.runner import long_recipe
from tests.training.support import assert_same, final_state, recipe, records

ROOT = Path(__file__).parents[2]
STEPS = 60


def start(output: Path, family: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.training.runner", str(output), family, str(STEPS)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


def last_step(output: Path) -> int:
    return max((event["step"] for event in read_events(output / "log.jsonl") if event["event"] == "step"), default=0)


def wait_for_progress(process: subprocess.Popen[bytes], output: Path, more: int) -> None:
    """Until the log is ``more`` steps beyond the newest checkpoint, which is where a resumed run begins."""
    newest = max((int(p.stem[5:]) for p in (output / "checkpoints").glob("step-*.pt")), default=0)
    wanted = min(newest + more, STEPS - 1)
    deadline = time.monotonic() + 120
    while process.poll() is None and last_step(output) < wanted and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.parametrize("family", ["albef", pytest.param("clip", marks=pytest.mark.slow)])
def test_killed_runs_end_bit_identical(tmp_path: Path, family: str) -> None:
    train(long_recipe(str(tmp_path / "calm"), family, STEPS), records())
    moments = random.Random()
    output = tmp_path / "killed"
    kills = []
    for _ in range(3):
        process = start(output, family)
        wait_for_progress(process, output, more=moments.randint(5, 15))
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills.append(last_step(output))
    assert any(0 < step < STEPS for step in kills), kills
    train(long_recipe(str(output), family, STEPS), records())
    assert_same(final_state(tmp_path / "calm"), final_state(output))
    for name in ("calm", "killed"):
        steps = [e["step"] for e in read_events(tmp_path / name / "log.jsonl") if e["event"] == "step"]
        assert steps == list(range(1, STEPS + 1)), name
    assert not list((output / "checkpoints").glob("*.writing"))


def test_sigterm_saves_and_exits(tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(output, "clip")
    wait_for_progress(process, output, more=4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=200) == 75
    newest = max((output / "checkpoints").glob("step-*.pt"))
    saved = torch.load(newest, weights_only=True)["step"]
    assert saved == last_step(output)
    assert 4 <= saved < STEPS


def test_ctrl_c_stops_after_the_step_and_the_run_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe(tmp_path / "calm", "albef"), records())
    real = Stepper.__call__
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def interrupted(self: Stepper, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return real(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "__call__", interrupted)
        stopped = train(recipe(tmp_path / "stopped", "albef"), records())
    assert (stopped.step, stopped.stopped) == (7, "SIGINT")
    assert signal.signal(signal.SIGINT, inherited) is signal.default_int_handler
    resumed = train(recipe(tmp_path / "stopped", "albef"), records())
    assert resumed.step == 12
    assert_same(final_state(tmp_path / "calm"), final_state(tmp_path / "stopped"))


def test_resume_needs_the_same_recipe_and_data(tmp_path: Path) -> None:
    output = tmp_path / "run"
    train(recipe(output, "clip"), records())
    with pytest.raises(ResumeError, match=r"optimiser\.lr: 0\.002 in the checkpoint, 0\.001 now"):
        train(recipe(output, "clip", optimiser={"lr": 0.001}), records())
    with pytest.raises(ResumeError, match="other training data"):
        train(recipe(output, "clip"), records(40))
    result = train(recipe(output, "clip", log={"every": 2}, checkpoint={"keep": 5}), records())
    assert result.step == 12
    assert result.model is not None


def test_a_stopped_validation_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal during validation breaks it off; the resumed run validates first, then goes on."""
    import imglish.training.work as work

    def settings(name: str):  # type: ignore[no-untyped-def]
        return recipe(tmp_path / name, "clip", validation={"every": 1.0})

    held_out = records(8)
    calm = train(settings("calm"), records(), held_out)
    real, calls = work.validate, []

    def broken_off(*arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(work, "validate", broken_off)
    stopped = train(settings("stopped"), records(), held_out)
    assert (stopped.step, stopped.stopped, stopped.model) == (6, "SIGTERM", None)
    resumed = train(settings("stopped"), records(), held_out)
    assert resumed.best == calm.best
    validated = [[e["step"] for e in r.events if e["event"] == "validation"] for r in (calm, resumed)]
    assert validated == [[6, 12], [6, 12]]
    assert_same(final_state(tmp_path / "calm"), final_state(tmp_path / "stopped"))
