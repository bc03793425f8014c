from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import imglish
from imglish.checkpoints import onnx_export
from imglish.cli import main
from imglish.data.batch import TextBatch
from imglish.nn.segments import Segments
from tests.checkpoints import official


@pytest.mark.parametrize("family", ["clip", "albef", pytest.param("blip", marks=pytest.mark.slow)])
def test_the_graphs_compute_what_the_model_does(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    _, path = official.write(family, tmp_path)
    out = tmp_path / "graphs"
    assert main(["export", str(path), str(out), "--layout", "onnx"]) == 0
    assert "text.onnx: at most" in capsys.readouterr().out
    said = json.loads((out / "onnx.json").read_text())
    assert max(graph["difference"] for graph in said["graphs"].values()) <= 1e-4
    assert (out / "tokenizer.json").is_file()

    model = imglish.load(path, device="cpu")
    assert said["image"]["mean"] == list(model.config.image.mean)
    run = {name: onnxruntime.InferenceSession(out / f"{name}.onnx").run for name in said["graphs"]}
    pixels = torch.randn(1, 3, official.SIZE, official.SIZE)  # one pair, and a text that is shorter than its row
    ids, mask = np.array([[2, 5, 9, 3, 0, 0]]), np.array([[True] * 4 + [False] * 2])
    texts = model.network.encode_texts(TextBatch(torch.from_numpy(ids[mask]), Segments((4,))))
    images = model.network.encode_images(pixels)
    feature, *tokens = run["image"](None, {"pixels": pixels.numpy()})
    np.testing.assert_allclose(feature, images.features.detach(), atol=1e-5)
    [feature] = run["text"](None, {"ids": ids, "mask": mask})
    np.testing.assert_allclose(feature, texts.features.detach(), atol=1e-5)
    assert ("match" in run) == (family != "clip")
    if family != "clip":
        [logits] = run["match"](None, {"tokens": tokens[0], "ids": ids, "mask": mask})
        expected = model.network.match(model.network.project_images(images.tokens), texts, [0], [0])
        np.testing.assert_allclose(logits, expected.detach(), atol=1e-5)


def test_what_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, path = official.write("vilt", tmp_path)
    given = ["export", str(path), str(tmp_path / "graphs"), "--layout", "onnx"]
    assert main(given) == 2
    assert "Vilt of family vilt cannot be written as ONNX" in capsys.readouterr().err
    (tmp_path / "graphs").mkdir()
    assert main(given) == 2
    assert "exists and is no ONNX export" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(given) == 2
    assert "pip install 'imglish[onnx]'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*given, "--push", "me/vilt"])


def test_other_numbers_and_shapes_are_a_difference() -> None:
    one = torch.tensor([[1.0, -4.0]])
    assert onnx_export._difference([one + 0.4], (one,)) == pytest.approx(0.1)
    assert onnx_export._difference([one[0]], (one,)) == float("inf")
    assert not onnx_export._difference([one * float("nan")], (one,)) <= onnx_export.LIMIT
