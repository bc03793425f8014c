"""Captions and scores of a source by `imglish caption` and `imglish score`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import imglish
from imglish.bootstrapping.captioning import fingerprint
from imglish.bootstrapping.scoring import Scorer
from imglish.bootstrapping.stage import Stage
from imglish.checkpoints import native
from imglish.cli import main
from imglish.data.images import ImageError
from imglish.data.sources import open_source
from imglish.models import registry


def captions(models: Path, photos: Path, out: Path, *more: str) -> list[str]:
    options = ["--top-p", "0.9", "--n", "3", "--max-length", "9", "--device", "cpu", "--out", str(out), *more]
    return ["caption", str(photos), "--model", str(models / "blip-tiny"), *options]


def test_captions_depend_on_seed_and_picture_alone(
    models: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(captions(models, photos, tmp_path / "a", "--per-shard", "3")) == 0
    said = capsys.readouterr().out
    assert "18 captions of 7 pictures" in said
    assert "captions/s" in said
    assert "1 pictures could not be read" in said
    assert main(captions(models, photos, tmp_path / "b", "--per-shard", "100", "--batch", "2")) == 0
    assert main(captions(models, photos, tmp_path / "c", "--per-shard", "100", "--seed", "5")) == 0
    a, b, c = (Stage.open(tmp_path / name).tables() for name in "abc")
    assert a["captions"].to_pylist() == b["captions"].to_pylist() != c["captions"].to_pylist()
    assert [len(texts) for texts in a["captions"].to_pylist()] == [3, 3, 3, 0, 3, 3, 3]
    assert [problem is not None for problem in a["problem"].to_pylist()] == [i == 3 for i in range(7)]


def test_scores_of_web_and_synthetic_texts(
    models: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(captions(models, photos, tmp_path / "captions", "--per-shard", "3")) == 0
    score = ["score", str(tmp_path / "captions"), "--model", str(models / "blip-tiny"), "--device", "cpu"]
    score += ["--ranker", str(models / "clip-tiny"), "--out", str(tmp_path / "scores")]
    assert main([*score, "--batch", "2"]) == 0
    assert "32 texts scored in 3 shards" in capsys.readouterr().out
    table = Stage.open(tmp_path / "scores").tables()
    assert table["origin"].to_pylist().count("synthetic") == 18
    assert table["ranker_itm"].null_count == len(table)
    assert table["ranker_itc"].null_count == table["itm"].null_count == 2  # of the picture that cannot be read
    model = imglish.load(models / "blip-tiny", "cpu")
    for row in table.slice(0, 6).to_pylist():
        picture = Path(row["root"]) / row["image"]
        assert row["itm"] == pytest.approx(float(model.match([picture], [row["text"]])), abs=1e-5)
        cosine = model.encode_images([picture]) @ model.encode_texts([row["text"]]).T
        assert row["itc"] == pytest.approx(float(cosine), abs=1e-5)
    assert main(score) == 0
    assert "0 texts scored" in capsys.readouterr().out

    # many captions, the best by one model, and of these the best by another (LAION-COCO)
    rule = ["--texts", "synthetic", "--no-min-itm", "--best", "2:itc", "--best", "1:ranker_itc"]
    assert main(["filter", str(tmp_path / "scores"), *rule, "--out", str(tmp_path / "kept"), "--no-report"]) == 0
    kept = open_source(tmp_path / "kept" / "keep.yaml")
    assert len(kept) == 6
    for record in kept:
        rows = [row for row in table.to_pylist() if row["key"] == record.key and row["origin"] == "synthetic"]
        first = sorted({row["text"]: row for row in rows}.values(), key=lambda row: -row["itc"])[:2]
        assert record.captions == (max(first, key=lambda row: row["ranker_itc"])["text"],)


def test_models_with_one_kind_of_score(models: Path, photos: Path) -> None:
    records = open_source(photos)
    texts = [list(record.captions) for record in records]
    vilt = list(Scorer(imglish.load(models / "vilt-tiny", "cpu"), pairs=3).score(records, texts))
    assert isinstance(vilt[3], ImageError)
    assert not isinstance(vilt[0], ImageError)
    assert np.isfinite(vilt[0][0]).all()
    assert np.isnan(vilt[0][1]).all()


def test_wrong_use(models: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = ["--model", str(models / "clip-tiny"), "--out", str(tmp_path / "out")]
    assert main(["caption", str(photos), *clip]) == 2
    assert "Families that do: " in capsys.readouterr().err
    assert main(["score", str(tmp_path), *clip]) == 2
    assert main(captions(models, photos, tmp_path / "x")) == 0
    assert main(captions(models, photos, tmp_path / "x", "--seed", "1")) == 2
    assert "begun with other settings (generation)" in capsys.readouterr().err
    assert main(captions(models, photos, tmp_path / "y", "--worker", "2/2")) == 2


def test_the_fingerprint_changes_with_a_weight(models: Path) -> None:
    network = imglish.load(models / "clip-tiny", "cpu").network
    before = fingerprint(network)
    next(network.parameters()).data.add_(1)
    assert fingerprint(network) != before


def test_scores_of_a_broken_model_are_no_numbers_and_nothing_is_kept(
    models: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = imglish.load(models / "blip-tiny", "cpu")
    broken.network.itm_head.weight.data.fill_(float("nan"))  # type: ignore[union-attr]
    native.export(tmp_path / "broken", broken.network, broken.tokenizer)
    assert main(["score", str(photos), "--model", str(tmp_path / "broken"), "--out", str(tmp_path / "scores")]) == 0
    table = Stage.open(tmp_path / "scores").tables()
    assert table["itm"].null_count == table["itc"].null_count == 2
    assert np.isnan(table["itm"].drop_null().to_numpy()).all()
    assert main(["filter", str(tmp_path / "scores"), "--out", str(tmp_path / "kept")]) == 1
    assert "12 itm is not a number" in capsys.readouterr().err
    assert main(["filter", str(tmp_path / "scores"), "--no-min-itm", "--min-itc", "-1"]) == 0


def test_a_model_of_pictures_alone_is_refused_with_those_that_can(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native.export(tmp_path / "beit", registry.build(registry.named("beit-tiny")), None)
    command = ["score", str(photos), "--model", str(tmp_path / "beit"), "--out", str(tmp_path / "scores")]
    assert main(command) == 2
    assert "Families that do: " in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


def test_captions_that_went_away_are_named(
    models: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(captions(models, photos, tmp_path / "captions", "--per-shard", "4")) == 0
    (tmp_path / "captions" / "00001.parquet").unlink()
    score = ["score", str(tmp_path / "captions"), "--model", str(models / "blip-tiny"), "--out", str(tmp_path / "s")]
    assert main(score) == 1
    said = capsys.readouterr().err
    assert "the captions of shard 00001 are not written yet" in said
    assert "1 of 2 shards failed" in said
