"""Settings of transformers, one at a time away from its default: ours computes what theirs computes then, or refuses.

A setting that is read over gives other numbers in silence, which nobody sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from imglish.checkpoints.foreign import load_foreign
from imglish.checkpoints.hf_export import export_transformers
from imglish.checkpoints.native import CheckpointError
from tests.checkpoints.test_transformers import COUNT, END, LAYOUTS, SIZES, TEXTS, VISION, WORDS, compare, saved, towers

transformers = pytest.importorskip("transformers")

CONTRAST = ("CLIPModel", "ChineseCLIPModel", "SiglipModel")
_VISION: list[tuple[str, Any]] = [
    ("vision_config.layer_norm_eps", 0.1),
    ("vision_config.num_attention_heads", 4),
    ("vision_config.intermediate_size", 80),
    ("vision_config.image_size", 48),
    ("vision_config.patch_size", 8),
]
_TEXT: list[tuple[str, Any]] = [
    ("text_config.layer_norm_eps", 0.1),
    ("text_config.num_attention_heads", 4),
    ("text_config.intermediate_size", 80),
    ("text_config.max_position_embeddings", 20),
]
_VILT: list[tuple[str, Any]] = [
    ("layer_norm_eps", 0.1),
    ("num_attention_heads", 4),
    ("intermediate_size", 80),
    ("image_size", 96),
    ("patch_size", 16),
    ("modality_type_vocab_size", 4),
]
COUNTS = [  # class, setting, value: reaches our model, and the numbers agree
    *(("CLIPModel", *one) for one in [*_VISION, *_TEXT]),
    *(("SiglipModel", *one) for one in [*_VISION, *_TEXT]),
    *(("ChineseCLIPModel", *one) for one in _TEXT),
    *(("BlipForImageTextRetrieval", *one) for one in [*_VISION[:2], *_TEXT[:3]]),
    ("BlipForQuestionAnswering", "text_config.layer_norm_eps", 0.1),
    *(("ViltForMaskedLM", *one) for one in _VILT),
    ("ViltForQuestionAnswering", "layer_norm_eps", 0.1),
    ("BeitForMaskedImageModeling", "layer_norm_eps", 0.1),
    ("BeitForImageClassification", "layer_norm_eps", 0.1),
    ("BeitForImageClassification", "num_attention_heads", 4),
    ("CLIPModel", "vision_config.hidden_act", "gelu"),
    ("CLIPModel", "text_config.hidden_act", "gelu_new"),
    ("SiglipModel", "vision_config.hidden_act", "gelu"),
    ("SiglipModel", "text_config.hidden_act", "quick_gelu"),
    ("CLIPModel", "text_config.hidden_size", 64),
    ("CLIPModel", "projection_dim", 40),
    ("BlipForImageTextRetrieval", "image_text_hidden_size", 40),
]
IDLE = [  # the numbers agree, and nothing of the model changes
    ("CLIPModel", "vision_config.projection_dim", 7),
    ("CLIPModel", "text_config.pad_token_id", 5),
    ("ChineseCLIPModel", "text_config.pad_token_id", 3),
    ("SiglipModel", "text_config.eos_token_id", 9),
    ("BlipForImageTextRetrieval", "text_config.sep_token_id", 7),
    ("BlipForImageTextRetrieval", "projection_dim", 7),
]
REFUSED = [  # class, setting, value, what the error says
    ("CLIPModel", "vision_config.hidden_act", "relu", "hidden_act 'relu' is not supported"),
    (
        "ChineseCLIPModel",
        "text_config.hidden_act",
        "quick_gelu",
        "hidden_act 'quick_gelu' is not supported, only 'gelu'",
    ),
    ("BlipForImageTextRetrieval", "text_config.hidden_act", "relu", "hidden_act 'relu' is not supported, only 'gelu'"),
    (
        "BlipForImageTextRetrieval",
        "vision_config.hidden_act",
        "quick_gelu",
        "'quick_gelu' is not supported, only 'gelu'",
    ),
    ("ViltForMaskedLM", "hidden_act", "gelu_new", "hidden_act 'gelu_new' is not supported, only 'gelu'"),
    ("ViltForMaskedLM", "qkv_bias", False, r"blocks\.0\.attn\.qkv\.bias"),
    ("ViltForMaskedLM", "image_size", [64, 96], r"image_size \[64, 96\] is not supported: pictures and patches are sq"),
    ("CLIPModel", "vision_config.num_channels", 1, r"vision\.patch_embed\.weight: \(32, 1, 16, 16\), expected"),
    ("SiglipModel", "vision_config.vision_use_head", False, r"no name like vision_model\.head\.probe"),
    ("SiglipModel", "text_config.projection_size", 64, "must be embed_dim"),
    ("BlipForImageTextRetrieval", "text_config.is_decoder", False, r"layers\.0\.cross\.q\.weight"),
    ("BlipForConditionalGeneration", "text_config.bos_token_id", 7, "bos_token_id is 7, expected 22"),
    ("BlipForConditionalGeneration", "text_config.sep_token_id", 7, "ends texts with token 3, the settings .* with 7"),
    ("BlipForConditionalGeneration", "text_config.sep_token_id", None, "sep_token_id is None: expected the number of"),
    ("BlipForQuestionAnswering", "text_config.sep_token_id", 7, "ends texts with token 3, the settings .* with 7"),
    ("CLIPModel", "text_config.eos_token_id", 7, "ends texts with token 3, the settings .* with 7"),
    ("CLIPModel", "text_config.eos_token_id", 2, f"ends texts with token 3, the settings .* with {COUNT - 1}"),
]


def changed(cls: str, setting: str, value: Any) -> Any:
    """Their configuration with one setting of it changed."""
    config = LAYOUTS[cls][0]()
    *parts, name = setting.split(".")
    setattr(getattr(config, parts[0]) if parts else config, name, value)
    return config


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Class -> our configuration of theirs as it is."""

    @cache
    def made(cls: str) -> Any:
        folder = tmp_path_factory.mktemp(cls)
        saved(cls, folder)
        return load_foreign(folder).config

    return made


@pytest.mark.parametrize(("cls", "setting", "value"), [*COUNTS, *IDLE])
def test_a_setting_counts_as_it_does_there(
    cls: str, setting: str, value: Any, tmp_path: Path, plain: Callable[[str], Any]
) -> None:
    theirs = saved(cls, tmp_path, changed(cls, setting, value))
    loaded = load_foreign(tmp_path)
    assert (loaded.config != plain(cls)) == ((cls, setting, value) in COUNTS)
    compare(cls, theirs, loaded)


@pytest.mark.parametrize(("cls", "setting", "value", "said"), REFUSED)
def test_a_setting_that_ours_has_not_is_refused(cls: str, setting: str, value: Any, said: str, tmp_path: Path) -> None:
    saved(cls, tmp_path, changed(cls, setting, value))
    with pytest.raises(CheckpointError, match=said):
        load_foreign(tmp_path)


def edited(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    given = json.loads(file.read_text())
    change(given)
    file.write_text(json.dumps(given))


@pytest.mark.parametrize("cls", CONTRAST)
def test_settings_of_towers_in_older_files(cls: str, tmp_path: Path) -> None:
    """``text_config_dict`` wins over ``text_config`` where their classes still read it: with their own defaults."""
    theirs = saved(cls, tmp_path)
    file = tmp_path / "config.json"

    def older(given: dict[str, Any]) -> None:
        for part in ("text_config", "vision_config"):
            given[f"{part}_dict"] = given[part]
            given[part] = given[part] | {"layer_norm_eps": 0.1, "num_attention_heads": 1}

    edited(file, older)
    again = getattr(transformers, cls).from_pretrained(tmp_path).eval()
    if cls != "SiglipModel":
        assert again.config.text_config.layer_norm_eps == theirs.config.text_config.layer_norm_eps
    compare(cls, again, load_foreign(tmp_path))


def test_squares_may_be_said_by_both_sides(tmp_path: Path) -> None:
    theirs = saved("CLIPModel", tmp_path)
    edited(tmp_path / "config.json", lambda c: c["vision_config"].update(image_size=[32, 32], patch_size=[16, 16]))
    compare("CLIPModel", theirs, load_foreign(tmp_path))


def test_sizes_that_are_none_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    saved("CLIPModel", tmp_path)
    good = (tmp_path / "config.json").read_text()
    for key, value, said in (
        ("num_attention_heads", -2, "num_attention_heads is -2: expected a number above 0"),
        ("hidden_size", "32", "hidden_size is '32': expected"),
        ("layer_norm_eps", [], r"layer_norm_eps is \[\]: expected a small number"),
        ("num_hidden_layers", 10**9, "1000000000 layers: more than 1000 are not built"),
        ("patch_size", 0, "does not fit: .*zero"),
        ("image_size", {}, "does not fit"),
    ):
        edited(tmp_path / "config.json", lambda c, k=key, v=value: c["vision_config"].update({k: v}))
        with pytest.raises(CheckpointError, match=said):
            load_foreign(tmp_path)
        (tmp_path / "config.json").write_text(good)


TIED = {
    "ViltForMaskedLM": [
        ("vilt.embeddings.text_embeddings.word_embeddings.weight", "mlm_score.decoder.weight"),
    ],
    "BlipForConditionalGeneration": [
        ("text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight"),
        ("text_decoder.cls.predictions.bias", "text_decoder.cls.predictions.decoder.bias"),
    ],
}


@pytest.mark.parametrize("cls", TIED)
def test_of_tied_names_a_file_may_have_either(cls: str, tmp_path: Path) -> None:
    config = LAYOUTS[cls][0]()
    config.tie_word_embeddings = True
    theirs = saved(cls, tmp_path, config)
    whole = load_file(tmp_path / "model.safetensors")
    for pair in TIED[cls]:
        for kept, left in (pair, pair[::-1]):
            values = {name: value for name, value in whole.items() if name != left}
            values[kept] = whole[kept] if kept in whole else whole[left]
            save_file(values, tmp_path / "model.safetensors")
            compare(cls, theirs, load_foreign(tmp_path))


def test_other_models_with_the_same_names_are_told_apart(tmp_path: Path) -> None:
    text = SIZES | {"vocab_size": COUNT, "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": END}
    made = {
        "MetaClip2Model": (transformers.MetaClip2Config(text_config=text, vision_config=VISION, projection_dim=24), ""),
        "VisionTextDualEncoderModel": (
            transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
                transformers.CLIPVisionConfig(**VISION), transformers.BertConfig(**SIZES, vocab_size=COUNT)
            ),
            "",
        ),
        "Siglip2Model": (
            transformers.Siglip2Config(text_config=text, vision_config=SIZES | {"patch_size": 16, "num_patches": 4}),
            "",
        ),
        "CLIPTextModelWithProjection": (transformers.CLIPTextConfig(**text, projection_dim=24), "one tower alone"),
        "CLIPVisionModelWithProjection": (transformers.CLIPVisionConfig(**VISION), "one tower alone"),
        "SiglipVisionModel": (transformers.SiglipVisionConfig(**VISION), "one tower alone; take the whole model"),
        "CLIPForImageClassification": (towers("CLIPConfig"), ""),
    }
    for cls, (config, more) in made.items():
        folder = tmp_path / cls
        getattr(transformers, cls)(config).save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        with pytest.raises(CheckpointError, match=rf"is of no known kind\. .* calls it {cls} .*{more}.*Nearest is"):
            load_foreign(folder)


# --- texts ----------------------------------------------------------------------------------------------------------


def test_a_vocabulary_is_used_as_the_settings_beside_it_say(tmp_path: Path) -> None:
    saved("ViltModel", tmp_path)
    file = tmp_path / "tokenizer_config.json"
    assert load_foreign(tmp_path).tokenizer.encode(["A DOG"]) == load_foreign(tmp_path).tokenizer.encode(["a dog"])
    for lower in (True, False):
        file.write_text(json.dumps({"do_lower_case": lower, "tokenizer_class": "BertTokenizer"}))
        theirs = transformers.BertTokenizer.from_pretrained(tmp_path, do_lower_case=lower)
        texts = [*TEXTS, "A dog in THE snow"]
        assert load_foreign(tmp_path).tokenizer.encode(texts) == theirs(texts)["input_ids"]
    for said in ({"do_lower_case": True, "strip_accents": False}, {"tokenize_chinese_chars": False}):
        file.write_text(json.dumps(said))
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: strip_accents .* are not supported"):
            load_foreign(tmp_path)


def test_texts_are_closed_as_the_family_does_it_whatever_the_file_says(tmp_path: Path) -> None:
    """BERT's ``tokenizer.json`` closes a text; one that was trained here may not."""
    saved("ViltModel", tmp_path)
    words = load_foreign(tmp_path).tokenizer
    (tmp_path / "vocab.txt").unlink()
    words.closed(False).save(tmp_path / "tokenizer.json")
    assert not words.closed(False).append_sep
    assert load_foreign(tmp_path).tokenizer.encode(TEXTS) == words.encode(TEXTS)


@pytest.mark.parametrize("said", ["[PAD]", {"content": "[PAD]", "lstrip": False}])
def test_texts_are_filled_up_with_the_token_that_the_tokenizer_names(said: Any, tmp_path: Path) -> None:
    """SigLIP reads what fills a text up; ``pad_token_id`` of its settings is read by nobody."""
    theirs = saved("SiglipModel", tmp_path / "theirs")
    assert load_foreign(tmp_path / "theirs").config.text.pad_id == 1
    file = tmp_path / "theirs" / "tokenizer_config.json"
    file.write_text(json.dumps({"pad_token": said}))
    loaded = load_foreign(tmp_path / "theirs")
    assert loaded.config.text.pad_id == 0
    compare("SiglipModel", theirs, loaded)
    written, _ = export_transformers(tmp_path / "ours", loaded)
    assert transformers.AutoTokenizer.from_pretrained(written).pad_token == "[PAD]"
    assert load_foreign(written).config == loaded.config
    file.write_text(json.dumps({"pad_token": "<nothing>"}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: pad_token '<nothing>': .* has no <nothing>"):
        load_foreign(tmp_path / "theirs")


def test_byte_pairs_that_are_not_clips_are_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    saved("SiglipModel", tmp_path)
    (tmp_path / "vocab.txt").unlink()
    Tokenizer(BPE({word: number for number, word in enumerate(WORDS)}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: a vocabulary of byte pairs that is not CLIP's"):
        load_foreign(tmp_path)


# --- pictures -------------------------------------------------------------------------------------------------------

PREPARED: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.2], "do_center_crop": True}


def test_what_files_of_squares_say_besides_does_not_matter(tmp_path: Path) -> None:
    """As files on the hub have it: a divisor that the processor of BLIP does not read, and settings of no value."""
    saved("BlipForConditionalGeneration", tmp_path)
    said = {"do_pad": True, "size_divisor": 32, "size": {"height": 32, "width": 32}, "crop_size": None, "resample": 3}
    said |= {"do_rescale": None, "do_normalize": None, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    image = load_foreign(tmp_path).config.image
    assert (image.mean, image.std, image.resize, image.crop) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "squash", 1.0)


def test_pictures_are_prepared_as_a_processor_of_version_5_says(tmp_path: Path) -> None:
    """There ``processor.save_pretrained`` writes the settings of pictures into a file of both."""
    saved("CLIPModel", tmp_path)
    pictures = transformers.CLIPImageProcessor(
        image_mean=PREPARED["image_mean"],
        image_std=[0.2, 0.3, 0.2],
        size={"shortest_edge": 32},
        crop_size=32,
        resample=2,
    )
    tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path)
    transformers.CLIPProcessor(pictures, tokenizer).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    image = load_foreign(tmp_path).config.image
    assert (image.mean, image.std, image.interpolation) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.2), "bilinear")
    assert image.transform().interpolation == "bilinear"


@pytest.mark.parametrize(
    ("cls", "said", "error"),
    [
        ("CLIPModel", {"do_resize": False}, "do_resize False is not supported"),
        ("CLIPModel", {"do_rescale": False}, "do_rescale False is not supported"),
        ("CLIPModel", {"rescale_factor": 1 / 127.5}, "rescale_factor .* is not supported, only 1/255"),
        ("CLIPModel", {"resample": 0}, "resample 0 is not supported"),
        ("CLIPModel", {"size": {"shortest_edge": 224}, "crop_size": 224}, "prepared with 224 pixels a side for .* 32"),
        ("CLIPModel", {"size": {"height": 32, "width": 48}}, r"pictures of \[32, 48\] pixels are not supported"),
        (
            "CLIPModel",
            {"size": {"shortest_edge": 32}, "do_center_crop": False},
            "the shortest edge without do_center_crop",
        ),
        ("CLIPModel", {"image_std": [0.5, 0.0, 0.5]}, "deviations above 0"),
        ("CLIPModel", {"image_mean": 0.5}, "does not fit"),
        (
            "SiglipModel",
            {"size": {"height": 64, "width": 64}, "do_center_crop": None},
            "prepared with 64 pixels a side",
        ),
        ("ViltModel", {"size": {"shortest_edge": 96}}, "prepared with 96 pixels a side for .* 64"),
        ("ViltModel", {"resample": 2, "do_center_crop": False}, "not prepared with interpolation bilinear"),
        ("ViltModel", {"size_divisor": 8, "do_center_crop": False}, "size_divisor 8 is not supported"),
    ],
)
def test_pictures_that_are_prepared_otherwise_are_refused(cls: str, said: Any, error: str, tmp_path: Path) -> None:
    saved(cls, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPARED, **said}))
    with pytest.raises(CheckpointError, match=error):
        load_foreign(tmp_path)


@pytest.mark.parametrize("size", [{"shortest_edge": 40}, {"height": 40, "width": 40}, {"shortest_edge": 32}])
def test_how_pictures_are_prepared_goes_there_and_back(size: Any, tmp_path: Path) -> None:
    saved("CLIPModel", tmp_path / "theirs")
    said = {**PREPARED, "size": size, "crop_size": {"height": 32, "width": 32}, "resample": 2}
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(said))
    loaded = load_foreign(tmp_path / "theirs")
    written, _ = export_transformers(tmp_path / "ours", loaded)
    assert load_foreign(written).config == loaded.config
    theirs = transformers.CLIPImageProcessor.from_pretrained(written)
    assert ({k: v for k, v in dict(theirs.size).items() if v}, theirs.resample) == (size, 2)


def test_pictures_that_are_not_normalised(tmp_path: Path) -> None:
    saved("CLIPModel", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPARED, "do_normalize": False}))
    image = load_foreign(tmp_path).config.image
    assert (image.mean, image.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
