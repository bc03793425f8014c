"""Towers and the fusion scorer as ONNX graphs, each checked with onnxruntime against the model before it is kept.

image.onnx       pixels float32 (batch, 3, H, W), normalised -> feature (batch, E); of a fusion model also tokens
text.onnx        ids int64, mask bool (batch, length) -> feature (batch, E)
match.onnx       tokens, ids, mask of pairs -> logits (batch, 2), column 1 = matched; of a fusion model only
onnx.json        inputs, picture input, score rule, greatest difference of the check
tokenizer.json   the tokenizer

The graphs are traced from the model itself over :class:`Grid`, whose lengths are a mask; nothing is written twice.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imglish import atomic
from imglish.checkpoints.native import TOKENIZER, CheckpointError, Loaded
from imglish.data.batch import TextBatch
from imglish.models.aligned import AlignedFusion
from imglish.models.capabilities import EncodedTexts, ImageMemory, text_encoder
from imglish.models.clip import Clip
from imglish.models.text_towers import GruTower, TextTower
from imglish.nn.segments import Grid, Rows, Segments

DESCRIPTION, LIMIT = "onnx.json", 1e-4
SCORES = {
    "itc": "dot product of both features",
    "itm": "logits[:, 1]",
    "itm_probability": "softmax(logits)[:, 1]",
    "itm+itc": "logits[:, 1] + dot product of both features",
}
_TEXT_SHAPE = {0: "batch", 1: "length"}


class _Images(nn.Module):
    def __init__(self, model: Clip | AlignedFusion) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        encoded = self.model.encode_images(pixels)
        return (encoded.features, encoded.tokens) if isinstance(encoded.tokens, Tensor) else (encoded.features,)


class _Texts(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        text = getattr(model, "text", None)
        self.filling = text.config.pad_id if isinstance(text, TextTower) else 0  # SigLIP reads it

    def encoded(self, ids: Tensor, mask: Tensor) -> EncodedTexts:
        rows = ids.masked_fill(~mask, self.filling).flatten()
        found: EncodedTexts = self.model.encode_texts(TextBatch(rows, Grid(ids.shape[0], ids.shape[1], mask)))
        return found

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (self.encoded(ids, mask).features,)


class _Pairs(nn.Module):
    def __init__(self, model: AlignedFusion) -> None:
        super().__init__()
        self.texts = _Texts(model)

    def forward(self, tokens: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        model: AlignedFusion = self.texts.model
        texts = self.texts.encoded(ids, mask)
        assert texts.rows is not None
        kept = model.project_images(tokens)
        memory = ImageMemory(kept.layers[:], kept.segments)  # keys and values, whatever the number of rows
        read = Rows.first(texts.segments, ids.device)
        return (
            model.itm_head(model.fuse(texts.rows, texts.segments, memory, Segments.equal(tokens.shape[0], 1), read)),
        )


@dataclass(frozen=True)
class _Graph:
    """name: of the file; traced, checked: inputs of two sizes; expected: what the model gives for ``checked``."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    traced: tuple[Tensor, ...]
    checked: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]


def export_onnx(path: str | Path, loaded: Loaded) -> tuple[Path, dict[str, float]]:
    """Write ``loaded`` to the folder ``path``; returns it and, graph by graph, the greatest difference from the model
    on random input, relative to the greatest value.

    Raises :class:`CheckpointError` without the extra ``onnx``, for a model that cannot be traced, and where a
    difference is above 1e-4; then nothing is written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise CheckpointError(f"ONNX needs the extra: pip install 'imglish[onnx]' ({error})") from error
    path, model = Path(path), loaded.model
    if path.exists() and not (path / DESCRIPTION).is_file():
        raise CheckpointError(f"{path} exists and is no ONNX export: choose another folder")
    if not isinstance(model, (Clip, AlignedFusion)) or isinstance(getattr(model, "text", None), GruTower):
        raise CheckpointError(
            f"{type(model).__name__} of family {loaded.config.family} cannot be written as ONNX: only CLIP and SigLIP "
            "with Transformers, ALBEF and BLIP can"
        )
    differences = {}
    with atomic.folder(path) as folder, torch.no_grad():
        graphs = _graphs(model)
        for graph in graphs:
            file = folder / f"{graph.name}.onnx"
            _trace(graph, file)
            session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            given = {name: value.numpy() for name, value in zip(graph.inputs, graph.checked, strict=True)}
            found = [torch.from_numpy(value) for value in session.run(list(graph.outputs), given)]
            differences[graph.name] = _difference(found, graph.expected)
            if not differences[graph.name] <= LIMIT:
                raise CheckpointError(
                    f"{graph.name}.onnx differs from the model by {differences[graph.name]:.1e} of its greatest value, "
                    f"more than {LIMIT:.0e}: nothing was written"
                )
        text = json.dumps(_description(loaded, graphs, differences), indent=2, ensure_ascii=False)
        (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        loaded.tokenizer.save(folder / TOKENIZER)
    return path, differences


def _graphs(model: Clip | AlignedFusion) -> list[_Graph]:
    """With random pictures and texts: two pairs to trace with, three of other lengths to check with."""
    config: Any = model.config
    draw = torch.Generator().manual_seed(0)
    size, longest = config.image.size, config.max_length
    pixels = [torch.randn(n, 3, size, size, generator=draw) for n in (2, 3)]
    short = min(7, longest - 1)
    ids = [torch.randint(config.vocab_size, shape, generator=draw) for shape in ((2, short), (3, longest))]
    lengths = [(short, short - 1), (longest, 2, longest // 2 + 1)]
    masks = [torch.arange(x.shape[1]) < torch.tensor(n)[:, None] for x, n in zip(ids, lengths, strict=True)]
    images = model.encode_images(pixels[1])
    texts = text_encoder(model, "ONNX")(TextBatch(ids[1][masks[1]], Segments(lengths[1])))  # packed, as everywhere else
    outputs = {"feature": images.features}
    if isinstance(images.tokens, Tensor):
        outputs["tokens"] = images.tokens
    traced, checked = (ids[0], masks[0]), (ids[1], masks[1])
    graphs = [
        _Graph(
            "image", _Images(model), ("pixels",), tuple(outputs), (pixels[0],), (pixels[1],), tuple(outputs.values())
        ),
        _Graph("text", _Texts(model), ("ids", "mask"), ("feature",), traced, checked, (texts.features,)),
    ]
    if isinstance(model, AlignedFusion):
        assert isinstance(images.tokens, Tensor)
        logits = model.match(model.project_images(images.tokens), texts, range(3), range(3))
        inputs, pairs = ("tokens", "ids", "mask"), _Pairs(model)
        graphs.append(
            _Graph(
                "match", pairs, inputs, ("logits",), (images.tokens[:2], *traced), (images.tokens, *checked), (logits,)
            )
        )
    return graphs


def _trace(graph: _Graph, file: Path) -> None:
    shapes = tuple(_TEXT_SHAPE if name in ("ids", "mask") else {0: "batch"} for name in graph.inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            program = torch.onnx.export(
                graph.module.eval(),
                graph.traced,
                input_names=graph.inputs,
                output_names=graph.outputs,
                dynamic_shapes=shapes,
                dynamo=True,
                optimize=False,  # onnxruntime does it when it loads the graph
                verbose=False,
            )
            assert program is not None
            program.save(file)
    except (RuntimeError, TypeError, OSError) as error:  # torch.onnx.OnnxExporterError is a RuntimeError
        raise CheckpointError(f"{graph.name}.onnx cannot be written: {error}") from error


def _difference(found: list[Tensor], expected: tuple[Tensor, ...]) -> float:
    """The greatest over the outputs; nan and other shapes count as endless."""
    if any(mine.shape != theirs.shape for mine, theirs in zip(found, expected, strict=True)):
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def _description(loaded: Loaded, graphs: list[_Graph], differences: dict[str, float]) -> dict[str, Any]:
    config: Any = loaded.config
    return {
        "family": config.family,
        "graphs": {
            graph.name: {"inputs": graph.inputs, "outputs": graph.outputs, "difference": differences[graph.name]}
            for graph in graphs
        },
        "image": asdict(config.image),
        "max_length": config.max_length,
        "mask": "true for tokens, false for filling, which stands behind them",
        "score_rule": loaded.score_rule,
        "score": SCORES[loaded.score_rule],
    }
