from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imglish import quickstart, quickstart_report
from imglish.cli import main
from imglish.quickstart import Outcome, QuickstartConfig


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    torch.set_num_threads(1)
    return quickstart.run(QuickstartConfig.tiny(tmp_path_factory.mktemp("quickstart") / "out", seed=3))


def test_both_trainings_ran_with_their_objectives(outcome: Outcome) -> None:
    losses = {
        name: set(run.events[-2]["losses"]) for name, run in outcome.runs.items() if run.events[-2]["event"] == "step"
    }
    assert losses == {"main": {"itc", "itm", "mlm"}, "rival": {"itc"}}
    for name, run in outcome.runs.items():
        recipe = next(e for e in run.events if e["event"] == "start")
        assert recipe["pairs"] == outcome.config.scenes.scenes, name
        assert outcome.config.recipe(name, 10).data.swapped  # both are given the wrong captions
    assert outcome.config.recipe("rival", 10).model["itc_swapped"]


def test_everything_is_measured(outcome: Outcome) -> None:
    table = quickstart_report.binding_table(outcome)
    assert set(table) == {"towers", "reranked", "rival"}
    assert all(set(table[r]) == {"seen", "heldout"} for r in table)
    assert set(table["rival"]["heldout"]) == {"text", "image", "group"}
    recalls = quickstart_report.recall_table(outcome)
    assert 0 <= recalls["reranked"]["heldout"]["t2i_r1"] <= 100
    held = json.loads((outcome.config.out / "measured.json").read_text())
    assert held["binding"] == table
    queries = {(q.language, q.text) for q in outcome.searched}
    assert {language for language, _ in queries} == {"en", "zh"}
    for query in outcome.searched:
        for found in query.found.values():
            assert len(found) == len(set(found)) == len(outcome.benchmarks["seen"].records)


def test_the_report_is_one_file_with_pictures_curves_and_tables(outcome: Outcome) -> None:
    page = outcome.report.read_text(encoding="utf-8")
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    assert page.count("<svg") >= 5
    assert page.count("data:image/png") > 50
    assert 'class="pic good"' in page
    assert "rival towers" in page
    assert "held out" in page


def test_the_verdict_says_who_is_ahead_and_who_cannot_be_told_apart(outcome: Outcome) -> None:
    right = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).expand(50, 2, 2)
    wrong = 3 - right
    mixed = torch.cat([right[:25], wrong[:25]])
    assert quickstart_report.compared(right, wrong, "group") == (100.0, 0.0)
    by, error = quickstart_report.compared(mixed, torch.cat([wrong[:24], right[:26]]), "group")
    assert by == pytest.approx(-2.0)
    assert error == pytest.approx(14.0, abs=0.1)

    def verdict(fusion: torch.Tensor, towers: torch.Tensor) -> str:
        measured = {}
        for key, value in outcome.measured.items():
            binding = dataclasses.replace(value.binding, tower_scores=towers, fusion_scores=fusion)
            measured[key] = dataclasses.replace(value, binding=binding)
        return quickstart_report.verdict(dataclasses.replace(outcome, measured=measured))

    assert "is ahead of its own towers" in verdict(right, wrong)
    assert "is behind the rival" in verdict(wrong, right)
    assert "is not told apart from the rival" in verdict(mixed, mixed)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--tiny", "--steps", "10", "--threads", "1", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "Group score of" in printed
    assert str(tmp_path / "out" / "report.html") in printed
    held = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert held["steps"] == {"main": 10, "rival": 10}


def test_the_rival_trained_in_its_own_process_is_the_same(outcome: Outcome, tmp_path: Path) -> None:
    config = dataclasses.replace(outcome.config, out=tmp_path / "out", together=True)
    beside = quickstart.run(config)
    assert (tmp_path / "out" / "rival.txt").is_file()
    for name in ("main", "rival"):
        one, two = (load_file(o.config.out / name / "model" / "model.safetensors") for o in (outcome, beside))
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert [e["step"] for e in beside.runs["rival"].events] == [e["step"] for e in outcome.runs["rival"].events]


def test_a_stopped_quickstart_continues_and_a_finished_one_starts_anew(outcome: Outcome, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(outcome.config.out, out)
    (out / "measured.json").unlink()  # as if it had been stopped before its end
    shutil.rmtree(out / "rival")
    before = (out / "main" / "log.jsonl").stat().st_mtime_ns
    config = dataclasses.replace(outcome.config, out=out)
    quickstart.run(config)
    assert (out / "main" / "log.jsonl").read_text() == (outcome.config.out / "main" / "log.jsonl").read_text()
    quickstart.run(config)
    assert (out / "main" / "log.jsonl").read_text() != (outcome.config.out / "main" / "log.jsonl").read_text()
    assert before < (out / "main" / "log.jsonl").stat().st_mtime_ns


def test_a_failed_rival_is_named(outcome: Outcome, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(outcome.config.out, out)
    with pytest.raises(quickstart.TrainingFailed, match=r"status 1: see .*rival\.txt"):
        quickstart._of_rival(dataclasses.replace(outcome.config, out=out), 1)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "main" / "model").mkdir(parents=True)
    (tmp_path / "main" / "diary.txt").write_text("mine")
    assert main(["quickstart", "--tiny", "--out", str(tmp_path)]) == 2
    assert "no training of the quickstart" in capsys.readouterr().err
    assert (tmp_path / "main" / "diary.txt").exists()
    assert main(["quickstart", "--steps", "3", "--out", str(tmp_path)]) == 2


def test_minutes_become_steps_by_timing() -> None:
    config = dataclasses.replace(QuickstartConfig.tiny(Path("unused")), minutes=0.5)
    from imglish.data.scenes import SceneSource

    records = SceneSource(config.scenes).training()
    few = quickstart.affordable_steps(config, records, probe=2)
    many = quickstart.affordable_steps(dataclasses.replace(config, minutes=50.0), records, probe=2)
    assert 10 <= few < many
