"""CoCa against open_clip: states, features, losses, gradients, captions, published sizes.

Official texts are padded and every position is computed; here texts end where they end. So the comparison is over the
positions that exist: tokens, the one token of filling that the released [CLS] sees, and [CLS].
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imglish.checkpoints import coca as official
from imglish.data.batch import Batch, TextBatch
from imglish.generation.beam import CURRENT, PUBLISHED_COCA
from imglish.generation.config import GenerationConfig, Written
from imglish.generation.engine import generate
from imglish.models import coca_decoder
from imglish.models.capabilities import EncodedImages, ImageMemory
from imglish.models.captioning import CaptionForm, CaptionState
from imglish.models.coca import CONFIGS, Coca
from imglish.nn.segments import Segments, upload_index
from imglish.objectives.lm import lm_rows
from tests.golden.support import Case, cases, check, check_grad_norms, filled, golden_root, official_gradients
from tests.golden.test_clip import recorded

CASES = cases("coca-")
MODELS = [path for path in CASES if "loss_total" in Case(path).outputs]
WRITING = [path for path in CASES if Case(path).meta.get("generation")]
SIZES = sorted(golden_root().rglob("openclip-coca*.json"))
GROUPS = "diverse beam groups are not built: the current official code has dropped them"


def build(case: Case) -> Coca:
    config = official.config_from_json(case.config)
    return filled(config.build, lambda _: official.convert(case.weights(), config).state).eval()


def texts_of(ids: Tensor) -> TextBatch:
    return TextBatch.of([[token for token in row if token != coca_decoder.PAD] for row in ids.tolist()])


def spread(rows: Tensor, segments: Segments, length: int) -> Tensor:
    """Packed rows as ``(N, length, D)``, not a number where there is none."""
    out = rows.new_full((segments.count * length, *rows.shape[1:]), torch.nan)
    place = segments.indices(rows.device) * length + segments.positions(rows.device)
    return out.index_copy(0, place, rows).unflatten(0, (segments.count, length))


def compare(case: Case, name: str, actual: Tensor) -> None:
    """The positions that exist, sliced as the case says."""
    for piece in str(case.meta.get("slices") or "").split(";"):
        if piece.strip() and name == f"{piece.split()[0]}.slice":
            steps = re.findall(r"::?(\d*)", piece.split("[")[1])
            actual = actual[tuple(slice(None, None, int(step or 1)) for step in steps)]
    expected = case.outputs[name]
    exists = ~actual.isnan()
    assert float(exists.float().mean()) > 0.1, f"{name}: nothing to compare"
    check(case, name, torch.where(exists, actual, expected))


def hidden_states(model: Coca, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Outputs of all blocks of the picture tower and the lower half, ``(layers, B, L, D)``."""
    length, count = model.config.max_length, len(batch)
    layers: list[Tensor] = []

    def keep(*args: Any) -> Tensor:
        layers.append(real(*args))
        return layers[-1]

    real = coca_decoder.released_block
    monkeypatch.setattr(coca_decoder, "released_block", keep)
    with torch.no_grad(), recorded({str(i): block for i, block in enumerate(model.vision.blocks)}) as rows:
        model.pool_images(batch.images)
        model.text(batch.texts)
    monkeypatch.undo()
    filled = coca_decoder.released_layout(batch.texts.segments, length)[0]
    text = [torch.cat([spread(x[: filled.total], filled, length), x[filled.total :, None]], 1) for x in layers]
    return {
        "visual.hidden": torch.stack(list(rows.values())).unflatten(1, (count, -1)),
        "text.hidden": torch.stack(text),
    }


def released_mask(segments: Segments, length: int) -> Tensor:
    """The additive mask that the rows of the packed computation amount to, for the positions that exist."""
    filled, _, keys, seen = coca_decoder.released_layout(segments, length)
    mask = torch.full((segments.count, length + 1, length + 1), torch.nan)
    for text in range(segments.count):
        there = filled.lengths[text]
        causal = torch.full((there, length + 1), -torch.inf)
        mask[text, :there] = causal.masked_fill(torch.ones(there, length + 1).tril().bool(), 0.0)
        visible = keys[seen.bounds[text] : seen.bounds[text + 1]]
        mask[text, -1] = -torch.inf
        start = int(filled.bounds[text])
        for row in visible:
            mask[text, -1, length if row >= filled.total else int(row) - start] = 0
    return mask


def outputs(case: Case, model: Coca, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    segments, length = batch.texts.segments, model.config.max_length
    found = hidden_states(model, batch, monkeypatch) | {"text.attn_mask": released_mask(segments, length)}
    pooled, tokens = model.pool_images(batch.images)
    rows, cls = model.text(batch.texts)
    found |= {"image_embs": tokens, "token_embs": spread(rows, segments, length)}
    image, text = model.image_proj(pooled), model.text_proj(cls)
    found |= {"image_latent_unnormalised": image, "text_latent_unnormalised": text}
    embedded = model.text.embed(batch.texts.ids, segments.positions(rows.device))
    classes = (model.text.cls + model.text.positions[-1]).expand(len(batch), 1, -1)
    found["text.embeds"] = torch.cat([spread(embedded, segments, length), classes], 1)
    given = torch.from_numpy(lm_rows(segments)[0])
    inputs, one = Segments.of(n - 1 for n in segments.lengths), Segments.equal(len(batch), 1)
    logits = model.head(model.decode(rows[given], inputs, model.project_images(tokens), one))
    found["logits"] = spread(logits, inputs, length - 1)
    found |= {"image_features": model.encode_images(batch.images).features}
    found |= {"text_features": model.encode_texts(batch.texts).features, "logit_scale_exp": model.logit_scale.exp()}
    return found | {f"{name}.slice": value for name, value in found.items()}


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.name)
def test_against_open_clip(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(path)
    model = build(case)
    ids = case.inputs["text"]
    batch = Batch(case.inputs["image"], texts_of(ids), torch.arange(len(ids)), torch.zeros(len(ids), 2))
    actual = outputs(case, model, batch, monkeypatch)
    losses = model.losses(batch)
    total = losses["itc"] + losses["caption"]
    actual |= {"contrastive_loss": losses["itc"], "caption_loss_times_weight": losses["caption"], "loss_total": total}
    assert torch.equal(ids[:, 1:], case.outputs["labels"])
    total.backward()
    names = [name for name in case.outputs if not name.startswith(("grad.", "generate.")) and name != "labels"]
    assert "logits" in " ".join(names)
    for name in names:
        compare(case, name, actual[name])
    if case.grad_norms:
        shapes = {name: torch.Size(shape) for name, shape, _ in case.meta["parameters"]}
        target = {name: value.double() for name, value in model.state_dict().items()}  # numbers need more digits
        table = official.table(model.config)
        gradients = official_gradients(lambda w: table.convert(w, target).state, shapes, model)
        check_grad_norms(case, case.grad_norms, {name: gradients[name] for name in case.grad_norms})
        for name in (n for n in case.outputs if n.startswith("grad.")):
            gradient = gradients[name.removeprefix("grad.")]
            assert gradient is not None
            flat = gradient.reshape(-1)
            check(case, name, flat[:2000] if len(flat) > 20000 else gradient)


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.name)
def test_weights_survive_both_directions(path: Path) -> None:
    case = Case(path)
    config, weights = official.config_from_json(case.config), case.weights()
    back = official.table(config).revert(official.convert(weights, config).state)
    assert set(back) == {name for name, _, _ in case.meta["parameters"]}
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    with torch.device("meta"):
        model = config.build()
    ours = sorted(m.eps for m in model.modules() if isinstance(m, nn.LayerNorm))
    assert ours == sorted(float(eps) for eps, names in case.meta["layer_norm_eps"].items() for _ in names)


# ---- captions -----------------------------------------------------------------------------------------------------


def uniforms_by_row(drawn: Tensor, expected: Tensor, start: int, closing: tuple[int, ...]) -> np.ndarray:
    """The numbers that each picture was given, ``(B, steps)``: officially only rows that go on take a number."""
    steps = expected.shape[1] - start
    found = np.zeros((len(expected), steps + 1))
    for step in range(steps):
        last = expected[:, start + step - 1]
        active = [row for row in range(len(expected)) if step == 0 or int(last[row]) not in closing]
        for place, row in enumerate(active):
            found[row, step] = float(drawn[step, place])
    return found


def as_rows(
    texts: list[list[Written]], prompts: Sequence[Sequence[int]], how: dict[str, Any], filling: int, forced: bool
) -> Tensor:
    """Our texts in the official form: with prompt and closing token, filled up.

    forced: a text that is cut at its longest has the closing token in the last place.
    """
    length, end, pad = how["seq_len"], how["eos_token_id"], how["pad_token_id"]
    rows = []
    for prompt, (text, *_) in zip(prompts, texts, strict=True):
        row = [*prompt, *text.ids, *([end] * text.ended)]
        if forced and len(row) == length and not text.ended:
            row[-1] = end
        for stop in (end, pad):  # the filling counts as an end there, and so does an end in the prompt
            if forced and stop in row:
                row = row[: row.index(stop) + 1]
        rows.append(row)
    return torch.tensor([row + [filling] * (length - len(row)) for row in rows])


def holds_filling(row: Tensor, how: dict[str, Any]) -> bool:
    """Whether the id of the filling stands among the tokens of a text, where the official mask hides the next token."""
    tokens = row.tolist()
    while tokens and tokens[-1] in (how["pad_token_id"], how["eos_token_id"]):
        tokens.pop()
    return how["pad_token_id"] in tokens


@dataclass
class _Prefixes(CaptionState):
    """What the sequences hold, as ids."""

    ids: list[list[int]] = field(default_factory=list)

    def select(self, order: Sequence[int]) -> None:
        super().select(order)
        self.ids = [self.ids[i] for i in order]


class Reencoding(nn.Module):
    """Captions in the official order of work: every step computes whole texts anew, and the official mask hides from
    every row the token behind one whose id is that of the filling. (Trained weights do not write that id.)"""

    def __init__(self, model: Coca) -> None:
        super().__init__()
        self.model = model

    def caption_form(self) -> CaptionForm:
        return self.model.caption_form()

    def start_captions(self, images: EncodedImages, room: int) -> CaptionState:
        plain = self.model.start_captions(images, room)
        return _Prefixes(plain.memory, plain.texts, plain.cache, [[] for _ in range(plain.texts.count)])

    def continue_captions(self, state: CaptionState, texts: TextBatch) -> Tensor:
        assert isinstance(state, _Prefixes)
        state.cache.extend(texts.segments, state.device)
        bounds = texts.segments.bounds
        state.ids = [old + texts.ids[a:b].tolist() for old, a, b in zip(state.ids, bounds, bounds[1:])]
        return torch.cat([self.logits(state, number) for number in range(len(state.ids))])

    def logits(self, state: _Prefixes, number: int) -> Tensor:
        model, ids = self.model, torch.tensor(state.ids[number])
        length = Segments.equal(1, len(ids))
        sees = torch.ones(len(ids), len(ids)).tril().bool()
        sees[:, 1:] &= ids[:-1] != coca_decoder.PAD
        rows = model.text.embed(ids, torch.arange(len(ids)))
        for block in model.text.blocks:
            q, k, v = block.attn.qkv(block.norm1(rows)).unflatten(1, (3, block.attn.heads, -1)).permute(1, 2, 0, 3)
            read = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees)
            rows = rows + block.attn.out(read.transpose(0, 1).flatten(1))
            rows = rows + block.mlp(block.norm2(rows))
        picture = int(np.repeat(np.arange(state.texts.count), state.texts.lengths)[number])
        mine = upload_index(state.memory.segments.rows_of([picture]), rows.device)
        layers = tuple((k[mine], v[mine]) for k, v in state.memory.layers)
        memory = ImageMemory(layers, state.memory.segments.select([picture]))
        return model.head(model.decode(rows, length, memory, Segments.equal(1, 1))[-1:])


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in WRITING for name in Case(path).meta["generation"]],
    ids=lambda x: x.name if isinstance(x, Path) else x,
)
def test_captions_against_open_clip(path: Path, name: str) -> None:
    case = Case(path)
    how, expected = case.meta["generation"][name], case.outputs[f"generate.{name}"]
    if how.get("num_beam_groups", 1) > 1:
        pytest.skip(GROUPS)
    current = "generation_config" in how
    model = build(case)
    images = model.encode_images(case.inputs["image"])
    prompts = case.inputs[f"{name}.prompt"].tolist() if f"{name}.prompt" in case.inputs else None
    prompts = prompts or [[how["sot_token_id"]]] * len(expected)
    beams, kind = how.get("num_beams", 1), how.get("generation_type", "")
    beams = (how.get("generation_config") or {}).get("num_beams", beams)
    top_k, top_p = how.get("top_k", 0), how.get("top_p", 1.0)
    sample = kind == "top_p" or top_k > 1
    config = GenerationConfig(
        beams=beams,
        sample=sample,
        min_length=how["min_seq_len"],
        max_length=how["seq_len"],
        temperature=how.get("temperature", 1.0) if sample else 1.0,
        top_k=top_k if sample else 0,
        top_p=top_p if sample else 1.0,
        repetition_penalty=how.get("repetition_penalty", 1.0),
    )
    draws = None
    if sample:
        closing = (how["eos_token_id"], how["pad_token_id"])
        table = uniforms_by_row(case.inputs[f"{name}.uniforms"], expected, len(prompts[0]), closing)
        draws = lambda picture, _: table[picture]  # noqa: E731
    rule = CURRENT if current else PUBLISHED_COCA
    keys = [str(i) for i in range(len(expected))]
    filling = how["eos_token_id" if current and beams > 1 else "pad_token_id"]
    for writer in (model, Reencoding(model)):
        texts = generate(writer, images, prompts, how["eos_token_id"], config, keys, rule, draws)
        actual = as_rows(texts, prompts, how, filling, forced=not current and beams == 1)
        same = (actual == expected).all(1)
        reads_filling = [holds_filling(row, how) or holds_filling(other, how) for row, other in zip(actual, expected)]
        if writer is model:
            same |= torch.tensor(reads_filling)
        assert same.all(), f"{name}:\n{actual}\n{expected}"


NAMED = {
    "openclip-coca_ViT-B-32": "openclip-coca-vit-b-32",
    "openclip-coca_ViT-L-14": "openclip-coca-vit-l-14",
}


@pytest.mark.parametrize("path", SIZES, ids=lambda p: p.stem)
def test_published_state_dicts(path: Path) -> None:
    """Every name and shape of the published sizes, and the number of parameters."""
    listed = json.loads(path.read_text())
    config = CONFIGS[NAMED[listed["model"]]]()
    with torch.device("meta"):
        model = config.build()
        weights = {name: torch.empty(shape) for name, shape, _, _ in listed["state_dict"]}
    assert set(official.convert(weights, config).state) == set(model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == listed["parameter_count"]
