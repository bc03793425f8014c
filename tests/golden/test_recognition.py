"""Every official state dict of the golden cases as a file: recognised by its names, sized by its shapes, converted with
every number of it. (That each number lies in its place is what the families' own cases show, by the same tables.)"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imglish.checkpoints import clip, sizes
from imglish.checkpoints.foreign import load_foreign, recognise
from imglish.checkpoints.native import built
from imglish.checkpoints.source import Source
from tests.golden import test_albef, test_beit, test_beit3, test_blip, test_vilt, test_vlmo
from tests.golden.support import Case, cases, golden_root

FORMATS = {  # beginning of a case's name -> how the file is recognised
    "albef-pretrain": "albef",
    "albef-retrieval": "albef",
    "albef-ve": "albef-task",
    "albef-nlvr": "albef-task",
    "albef-vqa": "albef-vqa",
    "blip-pretrain": "blip",
    "blip-retrieval": "blip",
    "blip-itm": "blip",
    "blip-caption": "blip",
    "blip-nlvr": "blip-nlvr2",
    "blip-vqa": "blip-vqa",
    "clip-vit": "clip",
    "clip-resnet": "clip",
    "vilt-pretrain": "vilt",
    "vilt-base": "vilt",
    "vilt-irtr": "vilt",
    "vilt-vqa": "vilt-vqa",
    "vilt-nlvr2": "vilt-nlvr2",
    "vlmo-pretrain": "vlmo",
    "vlmo-irtr": "vlmo-towers",
    "vlmo-textmlm": "vlmo-towers",
    "vlmo-vqa": "vlmo-vqa",
    "vlmo-nlvr2": "vlmo-nlvr2",
    "beit-mim": "beit",
    "beit3-retrieval": "beit3",
    "beit3-captioning": "beit3",
    "beit3-vqa": "beit3-vqa",
    "beit3-nlvr2": "beit3-nlvr2",
    "beit3-imagenet": "beit3-classes",
    "coca": "open_clip-coca",
    "openclip-clip": "open_clip",
    "openclip-siglip": "open_clip",
}
WORDS = ("word_embeddings.weight", "token_embedding.weight", "text_embed.weight")


def format_of(name: str) -> str | None:
    return next((kind for start, kind in FORMATS.items() if name.startswith(start)), None)


OTHERWISE = ("albef-vqa", "blip-nlvr")
"""Tiny cases that are not as deep as the released models are: as many layers that write answers as layers that fuse
(ALBEF), and as many that merge two pictures as layers that do not (BLIP). Nothing in a file says these numbers."""
FOLDERS = [
    folder
    for folder in cases("albef", "blip", "clip", "vilt", "vlmo", "beit", "coca", "openclip")
    if format_of(folder.name)
    and not folder.name.startswith(OTHERWISE)
    and "base" not in folder.name
    and Case(folder).meta.get("parameters")
]


def numbers(tensors: dict[str, Tensor]) -> Tensor:
    """All floating numbers, in order of size."""
    return torch.cat([t.reshape(-1) for t in tensors.values() if t.is_floating_point()]).sort().values


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_every_number_arrives(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "HEAD", 4)  # of the tiny models; heads of 64 are what released ones have
    case = Case(folder)
    weights, kind = case.weights(), format_of(folder.name)
    if "vlmo_config" in case.config:  # the longest text of released files is 196
        monkeypatch.setattr(sizes, "VLMO_DISTANCES", case.config["vlmo_config"]["max_text_len_of_initckpt"])
    rows = next((t.shape[0] for name, t in weights.items() if name.endswith(WORDS)), 5)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    count = rows - (2 if folder.name.startswith("blip") else 0)
    (tmp_path / "vocab.txt").write_text("\n".join([*special, *(f"w{n}" for n in range(count - 5))]) + "\n")
    path = tmp_path / "official.pth"
    if kind is not None and kind.startswith("open_clip"):
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": case.config}))
        path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save({"model": weights}, path)
    loaded = load_foreign(tmp_path if kind is not None and kind.startswith("open_clip") else path)
    assert loaded.meta["from"]["format"] == kind
    report = loaded.meta["conversion"]
    prefix = "inner." if hasattr(loaded.model, "head") and hasattr(loaded.model, "inner") else ""
    ours = {name.removeprefix(prefix): value for name, value in loaded.model.state_dict().items()}
    if folder.name.startswith("vilt-irtr"):
        return  # its score becomes a row of the ITM head, beside a row of zeros
    if folder.name.startswith("beit3"):  # two rows in front of the positions that nothing reads
        weights = {n: v[2:] if ".embed_positions." in n else v for n, v in weights.items()}
    given = {name: value for name, value in weights.items() if name not in report}
    made = {name: value for name, value in ours.items() if name not in report}
    torch.testing.assert_close(numbers(made), numbers(given), rtol=0, atol=0)


BASES = [folder for folder in cases(*FORMATS) if "base" in folder.name and Case(folder).meta.get("parameters")]
CONFIGS: dict[str, Callable[[Case], Any]] = {  # family -> what its own golden tests build
    "albef": test_albef.config_of,
    "blip": test_blip.config_of,
    "beit": test_beit.config_of,
    "beit3": test_beit3.config_of,
    "clip": lambda case: clip.config_from_arguments(case.config),
    "vilt": test_vilt.config_of,
    "vlmo": lambda case: test_vlmo.config_of(case.config),
}
OF_TRAINING = ("dropout", "drop_path", "teacher", "mask_id", "temperature")


@pytest.mark.parametrize("folder", BASES, ids=[folder.name for folder in BASES])
def test_base_models_become_what_their_own_cases_test(folder: Path) -> None:
    """Sizes and heads from names and shapes alone are the case's, and its conversion accounts for every name: so what a
    user loads is the model whose states, losses and gradients the family's golden test compares."""
    case, kind = Case(folder), format_of(folder.name)
    ties = case.meta["ties"]
    tied = ties if isinstance(ties, dict) else {other: first for first, other in ties}
    weights: dict[str, Tensor] = {}
    for name, shape, *_ in case.meta["parameters"]:
        weights[name] = weights[tied[name]] if name in tied else torch.empty(shape, device="meta")
    if kind is not None and kind.startswith("open_clip"):
        source = Source(folder, "open_clip", weights, {"model_cfg": case.config})
    else:
        source = Source(folder, "file", weights)
    name, form = recognise(source)
    assert name == kind
    config = form.config(source)
    if source.layout == "file":
        found, expected = (
            {key: value for key, value in asdict(one).items() if key not in OF_TRAINING}
            for one in (config, CONFIGS[config.family](case))
        )
        assert found == expected
    with torch.device("meta"):
        head = None if form.head is None else form.head(source)
        target = built(config, head).state_dict()
    inner = "inner." if head is not None else ""
    target = {name.removeprefix(inner): value for name, value in target.items()}
    assert set(form.convert(source.weights, target, config).state) == set(target)  # or it raises


LISTS = sorted(golden_root().rglob("param-shapes/*.json"))
PUBLISHED = {
    "vlmo-pretrain": "vlmo",
    "vlmo-irtr": "vlmo-towers",
    "vlmo-textmlm": "vlmo-towers",
    "vlmo-vqa": "vlmo-vqa",
    "vlmo-nlvr2": "vlmo-nlvr2",
    "beit_": "beit",
}


@pytest.mark.parametrize("path", LISTS, ids=[path.stem for path in LISTS])
def test_published_sizes_are_recognised(path: Path) -> None:
    """By names and shapes alone: nothing is allocated."""
    listed = json.loads(path.read_text())
    if path.stem.startswith("openclip"):
        pytest.skip("open_clip's files come with settings")
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape, *_ in listed["state_dict"]}
    name, form = recognise(Source(path, "file", weights))
    task = next((kind for kind in ("vqa", "nlvr2") if kind in path.stem), None)
    task = "classes" if "imageclassification" in path.stem else task
    wanted = next((kind for start, kind in PUBLISHED.items() if path.stem.startswith(start)), "beit3")
    assert name == (f"beit3-{task}" if task and wanted == "beit3" else wanted)
    with torch.device("meta"):
        model = form.config(Source(path, "file", weights)).build()
    parameters = listed.get("parameter_count")
    if task is None and isinstance(parameters, int):
        held = sum(p.numel() for p in model.parameters())
        assert abs(held - parameters) / parameters < 0.01
