from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import imglish
from imglish.checkpoints import beit, beit3, native
from imglish.checkpoints.foreign import load_foreign
from imglish.checkpoints.native import CheckpointError
from imglish.data.batch import TextBatch
from imglish.models.heads import HeadConfig, with_head
from tests.checkpoints import official

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "man", "red", "top", "in", "the", "snow"]
TEXTS = ["a dog in the snow", "a man in a red top"]
CLASSES = HeadConfig("classification", classes=("a", "b", "c"), texts=False)
SMALL = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def saved(model: Any, folder: Path, words: int | None = None) -> Path:
    model.eval().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS[:words]) + "\n")
    return folder


def blip(cls: str, folder: Path) -> tuple[Any, Path]:
    text = SMALL | {"vocab_size": len(WORDS) + 2, "max_position_embeddings": 32, "encoder_hidden_size": 128}
    text |= {"bos_token_id": len(WORDS), "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0, "projection_dim": 32}
    config = transformers.BlipConfig(
        text_config=text,
        vision_config=SMALL | {"image_size": 32, "patch_size": 16, "projection_dim": 32},
        image_text_hidden_size=32,
    )
    model = getattr(transformers, cls)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model, saved(model, folder)


def vilt(folder: Path) -> tuple[Any, Path]:
    config = transformers.ViltConfig(
        **SMALL, vocab_size=len(WORDS), max_position_embeddings=32, image_size=64, patch_size=32, max_image_length=-1
    )
    model = transformers.ViltForMaskedLM(config)
    return model, saved(model, folder)


def pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


def encoded(loaded: native.Loaded) -> TextBatch:
    return TextBatch.of(loaded.tokenizer.encode(TEXTS))


def test_blip_of_transformers_matches_and_says_what_is_new(tmp_path: Path) -> None:
    theirs, folder = blip("BlipForImageTextRetrieval", tmp_path)
    loaded = load_foreign(folder)
    assert loaded.meta["from"]["format"] == "hf-blip"
    assert len(loaded.meta["from"]["sha256"]) == 64
    assert any("no text decoder" in reason for reason in loaded.meta["conversion"].values())
    images = pixels(32)
    model: Any = loaded.model
    texts = encoded(loaded)
    with torch.no_grad():
        features = model.encode_images(images).features
        expected = torch.nn.functional.normalize(
            theirs.vision_proj(theirs.vision_model(images).last_hidden_state[:, 0]), dim=-1
        )
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert texts.ids.max() < len(WORDS)


def test_vilt_of_transformers_gives_the_same_states(tmp_path: Path) -> None:
    theirs, folder = vilt(tmp_path)
    loaded = load_foreign(folder)
    assert loaded.meta["from"]["format"] == "hf-vilt"
    ours = loaded.model.state_dict()
    torch.testing.assert_close(ours["norm.weight"], theirs.vilt.layernorm.weight)
    assert any("does not score pairs" in reason for reason in loaded.meta["conversion"].values())
    assert not any(value.is_meta for value in [*ours.values(), *loaded.model.buffers()])


def test_what_was_loaded_is_exported_and_loaded_again_byte_for_byte(tmp_path: Path) -> None:
    _, folder = blip("BlipForConditionalGeneration", tmp_path / "theirs")
    loaded = load_foreign(folder)
    first = native.export(tmp_path / "one", loaded.model, loaded.tokenizer, loaded.meta, loaded.score_rule)
    again = native.load(first)
    second = native.export(tmp_path / "two", again.model, again.tokenizer, again.meta, again.score_rule)
    for name in (native.WEIGHTS, native.DESCRIPTION, native.TOKENIZER):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert again.meta["from"]["format"] == "hf-blip"
    assert imglish.load(second, device="cpu").meta == loaded.meta


def test_weights_in_half_precision_become_float32(tmp_path: Path) -> None:
    _, folder = blip("BlipForConditionalGeneration", tmp_path)
    file = folder / "model.safetensors"
    whole = load_file(file)
    save_file({name: value.bfloat16() for name, value in whole.items()}, file)
    state = load_foreign(folder).model.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    name = "vision_model.post_layernorm.weight"
    torch.testing.assert_close(state["vision.norm.weight"], whole[name].bfloat16().float())


def test_a_file_of_another_kind_is_told_what_it_resembles(tmp_path: Path) -> None:
    torch.save(
        {"visual_encoder.blocks.0.norm1.weight": torch.ones(4), "other.weight": torch.ones(2)}, tmp_path / "x.pth"
    )
    with pytest.raises(
        CheckpointError, match=r"x\.pth is of no known kind.*Nearest is .*text_.*first names: visual_enc"
    ):
        load_foreign(tmp_path / "x.pth")


@pytest.mark.parametrize("family", ["beit", "beit3"])
def test_a_classifier_of_pictures_needs_no_tokenizer(family: str, tmp_path: Path) -> None:
    """As released: a table of relative positions in each layer (BEiT), and what BEiT-3 has for texts, unused."""
    torch.manual_seed(0)
    model = with_head(official.config(family).build(), CLASSES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    table = beit.classifier_table() if family == "beit" else beit3.imagenet_table()
    weights = table.revert(model.inner.state_dict())
    if family == "beit":
        weights |= {f"blocks.{n}.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.int64) for n in (0, 1)}
    torch.save({"model": weights}, tmp_path / "x.pth")
    loaded = load_foreign(tmp_path / "x.pth")
    assert loaded.words is None
    assert loaded.model.head.classes == ("0", "1", "2")  # type: ignore[union-attr]
    image = loaded.config.image
    assert (image.resize, image.crop) == ("center", 224 / 256)
    picture = torch.randn(2, 3, official.SIZE, official.SIZE)
    with torch.no_grad():
        found, expected = (one.classify([picture], TextBatch.of([[], []])) for one in (loaded.model, model))  # type: ignore[operator]
    assert torch.equal(found, expected)
    assert expected.std() > 0.1
    (tmp_path / "names.json").write_text('["cat", "dog", "fox"]')
    named = load_foreign(tmp_path / "x.pth", classes=tmp_path / "names.json")
    assert named.model.head.classes == ("cat", "dog", "fox")  # type: ignore[union-attr]


def test_a_checkpoint_with_a_name_too_many_or_too_few_is_refused(tmp_path: Path) -> None:
    _, folder = blip("BlipForConditionalGeneration", tmp_path)
    file = folder / "model.safetensors"
    whole = load_file(file)
    save_file(whole | {"surprise.weight": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"looks like BLIP of transformers, but does not fit: .*surprise\.weight"):
        load_foreign(folder)
    lacking = dict(whole)
    del lacking["vision_model.post_layernorm.weight"]
    save_file(lacking, file)
    with pytest.raises(CheckpointError, match=r"does not fit: .*vision.norm.weight"):
        load_foreign(folder)


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("open('pwned', 'w')",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"visual_encoder.x": _Evil()}))
    torch.save({"visual_encoder.x": _Evil()}, tmp_path / "evil.pt")
    for name in ("evil.pth", "evil.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_foreign(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_damaged_and_lying_files_are_refused(tmp_path: Path) -> None:
    _, folder = blip("BlipForConditionalGeneration", tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], (2**62).to_bytes(8, "little") + whole[8:], b""):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load_foreign(folder)


def test_the_tokenizer_has_to_be_there_and_to_be_its_own(tmp_path: Path) -> None:
    _, folder = blip("BlipForConditionalGeneration", tmp_path / "model")
    (folder / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer lies beside it .*vocab\.txt"):
        load_foreign(folder)
    other = tmp_path / "other.txt"
    other.write_text("\n".join(WORDS[:-1]) + "\n")
    with pytest.raises(CheckpointError, match=r"other\.txt has 14 tokens, the model 15"):
        load_foreign(folder, other)
    other.write_text("\n".join(WORDS) + "\n")
    assert load_foreign(folder, other).tokenizer.vocab_size == 15


def test_a_folder_without_settings_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has none of open_clip_config\.json, config\.json"):
        load_foreign(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_foreign(tmp_path)
    with pytest.raises(CheckpointError, match="hf:OWNER/NAME"):
        imglish.load(tmp_path / "nowhere")


def test_a_model_of_pictures_only_needs_no_tokenizer(tmp_path: Path) -> None:
    _, path = official.write("beit", tmp_path)
    (tmp_path / "vocab.txt").unlink()
    model = imglish.load(path, device="cpu")
    assert model.encode_images([Image.new("RGB", (40, 30))]).shape == (1, 64)
    with pytest.raises(CheckpointError, match=r"beit\) takes pictures only"):
        _ = model.tokenizer
