"""Released VLMo files: recognised by their names, sizes told by their shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from imglish.checkpoints import vlmo as official
from imglish.checkpoints.foreign import load_foreign
from imglish.checkpoints.native import CheckpointError
from imglish.checkpoints.sizes import vlmo_config
from imglish.data.batch import TextBatch
from imglish.models.expert_sizes import HALF
from imglish.models.vlmo import VlmoConfig, vlmo_base, vlmo_base_plus, vlmo_large, vlmo_tiny

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "man", "red", "top", "in", "the", "snow"]


def released(config: VlmoConfig) -> dict[str, torch.Tensor]:
    """An official state dict, with the positions that the official code keeps and does not use."""
    model = config.build()
    state = official.table(config).revert(model.state_dict())
    state["text_embeddings.position_ids"] = torch.arange(config.max_length)[None]
    state.setdefault("text_embeddings.position_embeddings.weight", torch.zeros(config.max_length, config.width))
    return state


@pytest.mark.parametrize("make", [vlmo_base, vlmo_base_plus, vlmo_large])
@pytest.mark.parametrize("kind", ["pretrain", "texts", "retrieval"])
def test_sizes_are_told_by_the_shapes(make: Any, kind: str) -> None:
    config = make()
    if kind == "texts":
        config = replace(config, itc=False, itc_fused=False, itm=False, fused_layers=0, embed_dim=config.width)
    if kind == "retrieval":
        config = replace(config, itc_fused=False, itm=False, mlm=False)
    with torch.device("meta"):
        found = vlmo_config(released(config))
    assert found == config


@pytest.mark.parametrize("itm", [True, False])
def test_files_are_recognised_and_loaded(tmp_path: Path, itm: bool) -> None:
    config = replace(vlmo_tiny(), vocab_size=len(WORDS), text_distances=196, heads=1, itm=itm, mlm=itm, itc_fused=itm)
    torch.manual_seed(0)
    model = config.build().eval()
    state = {name: value.contiguous() for name, value in official.table(config).revert(model.state_dict()).items()}
    state["text_embeddings.position_ids"] = torch.arange(config.max_length)[None]
    state["text_embeddings.position_embeddings.weight"] = torch.zeros(config.max_length, config.width)
    save_file(state, tmp_path / "vlmo.safetensors")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    loaded = load_foreign(tmp_path / "vlmo.safetensors")
    assert loaded.meta["from"]["format"] == ("vlmo" if itm else "vlmo-towers")
    assert loaded.score_rule == ("itm" if itm else "itc")
    assert loaded.config.image.mean == HALF
    assert not any(value.is_meta for value in [*loaded.model.state_dict().values(), *loaded.model.buffers()])
    texts = TextBatch.of(loaded.tokenizer.encode(["a dog in the snow"]))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.encode_texts(texts).features, model.encode_texts(texts).features)


def test_a_table_of_unknown_size_is_refused(tmp_path: Path) -> None:
    config = replace(vlmo_tiny(), vocab_size=len(WORDS), heads=1)
    state = released(config)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "vlmo.safetensors")
    with pytest.raises(CheckpointError, match="size of the pictures"):
        load_foreign(tmp_path / "vlmo.safetensors")
