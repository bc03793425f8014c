"""Other sizes of pictures and lengths of texts, by each family's rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import imglish
from imglish.checkpoints import native
from imglish.checkpoints.loading import load_any
from imglish.checkpoints.native import CheckpointError
from imglish.data.batch import TextBatch
from imglish.models import registry
from imglish.models.depths import depths
from imglish.nn.embed import resize_grid, resize_line
from imglish.nn.relative import resize_relative
from tests.checkpoints import official

TABLES = {
    "albef": ("vision.positions", "embedding.positions.weight"),
    "blip": ("vision.positions", "embedding.positions.weight"),
    "clip": ("vision.positions", "text.positions"),
    "coca": ("vision.positions", "text.positions"),
    "vilt": ("pictures.positions", "embedding.positions.weight"),
    "vlmo": ("relative.table", None),
    "beit": ("relative.table", None),
    "beit3": ("body.image_positions", "body.text_positions"),
}


def expected(family: str, table: torch.Tensor) -> torch.Tensor:
    """The table of 4 x 4 patches for 6 x 6, as each family's code resamples it."""
    if family in ("vlmo", "beit"):
        return resize_relative(table, 4, 6)
    if family == "vilt":
        grid = table[1:].T.reshape(1, -1, 4, 4)
        grid = F.interpolate(grid, (6, 6), mode="bilinear", align_corners=True)
        return torch.cat([table[:1], grid.flatten(2)[0].T])
    return resize_grid(table, (6, 6), prefix=1, antialias=family in ("clip", "coca"))


@pytest.mark.parametrize("family", official.FAMILIES)
def test_every_family_by_its_own_rule(family: str, tmp_path: Path) -> None:
    model, path = official.write(family, tmp_path)
    length = None if family == "beit" else 9
    loaded = load_any(path, image_size=48, max_length=length)
    picture, text = TABLES[family]
    before, after = model.state_dict(), loaded.model.state_dict()
    assert loaded.config.image.size == 48
    torch.testing.assert_close(after[picture], expected(family, before[picture]))
    if text is not None:
        rows = resize_line(before[text], after[text].shape[0]) if family in ("clip", "coca") else before[text][:9]
        torch.testing.assert_close(after[text], rows)
    assert set(loaded.meta["resized"]) == {name for name in (picture, text) if name is not None}
    for name in set(before) - {picture, text}:
        torch.testing.assert_close(after[name], before[name])
    again = native.load(native.export(tmp_path / "out", loaded.model, loaded.words, loaded.meta, loaded.score_rule))
    assert again.config == loaded.config
    with torch.no_grad():
        images = torch.zeros(2, 3, 48, 48)
        encode: Any = getattr(loaded.model, "encode_images", None) or loaded.model.embed_images
        encode(images)
        if length is not None:
            assert max(len(ids) for ids in loaded.tokenizer.encode(["a dog " * 9])) == 9


def test_the_same_sizes_change_nothing(tmp_path: Path) -> None:
    model, path = official.write("albef", tmp_path)
    loaded = load_any(path, image_size=32, max_length=12)
    assert "resized" not in loaded.meta
    torch.testing.assert_close(loaded.model.state_dict(), model.state_dict())


def test_positions_that_nobody_has_learned_begin_anew_and_the_others_stay(tmp_path: Path) -> None:
    model, path = official.write("albef", tmp_path)
    loaded = load_any(path, max_length=20)
    table = loaded.model.state_dict()["embedding.positions.weight"]
    torch.testing.assert_close(table[:12], model.state_dict()["embedding.positions.weight"])
    assert 0 < float(table[12:].std()) < 0.1
    assert loaded.meta["resized"] == {"embedding.positions.weight": "fitted from (12, 64) to (20, 64)"}


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    _, path = official.write("vlmo", tmp_path)
    with pytest.raises(CheckpointError, match="image size 50 is not a multiple of patch size 8"):
        load_any(path, image_size=50)
    with pytest.raises(CheckpointError, match="max_length 300 is above text_distances"):
        load_any(path, max_length=300)
    _, path = official.write("beit", tmp_path)
    with pytest.raises(CheckpointError, match="reads no texts"):
        load_any(path, max_length=9)


@pytest.mark.parametrize("name", [name for name in registry.names() if name.endswith(("-tiny", "-small"))])
def test_every_model_knows_how_deep_its_layers_lie(name: str) -> None:
    with torch.device("meta"):
        model: Any = registry.named(name).build()
    if name.startswith(("dvae", "vqkd")):
        return
    found = depths(model)
    assert found.keys() == {n for n, _ in model.named_parameters()}
    shallow = {n for n, depth in found.items() if depth == 0}
    assert not any("blocks" in n or "layers" in n or "embed" in n.replace("embedding", "embed") for n in shallow), (
        shallow
    )
    assert len(set(found.values())) > 2


def test_depths_of_an_albef() -> None:
    """Twelve text layers, of which six fuse, count as one stack; each tower has its own top."""
    with torch.device("meta"):
        model = registry.named("albef-base").build()
    found = depths(model)
    assert found["fusion_layers.5.mlp.fc1.weight"] == found["vision.blocks.11.mlp.fc1.weight"] == 1
    assert found["fusion_layers.0.mlp.fc1.weight"] == 6
    assert found["text_layers.5.mlp.fc1.weight"] == 7
    assert found["embedding.words.weight"] == found["vision.patch_embed.weight"] == found["vision.positions"] == 13
    assert found["vision.norm.weight"] == found["itm_head.weight"] == found["temperature"] == 0


def test_imglish_load_takes_the_sizes(tmp_path: Path) -> None:
    _, path = official.write("clip", tmp_path)
    model = imglish.load(path, device="cpu", image_size=48, max_length=9)
    assert model.config.image.size == 48
    assert model.encode_texts(["a dog"]).shape == (1, 32)
    assert TextBatch.of(model.tokenizer.encode(["a dog " * 20])).segments.longest == 9
