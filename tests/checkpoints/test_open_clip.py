from __future__ import annotations

import copy
import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch

from imglish.checkpoints import clip as openai
from imglish.checkpoints import open_clip
from imglish.checkpoints.foreign import load_foreign
from imglish.checkpoints.native import CheckpointError
from imglish.checkpoints.rules import ConversionError
from imglish.models.clip import CONFIGS, ClipConfig, ResNetConfig
from imglish.models.vit import VitConfig
from tests.checkpoints import official

MODEL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 50, "width": 64, "heads": 2, "layers": 1},
}
SIGLIP: dict[str, Any] = {
    "embed_dim": 768,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 64,
        "vocab_size": 32000,
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
        "width": 768,
        "heads": 12,
        "layers": 12,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    model = copy.deepcopy(MODEL)
    *where, key = path.split(".")
    (model[where[0]] if where else model)[key] = value
    return model


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vision_cfg.attentional_pool", True),
        ("vision_cfg.pool_type", "none"),
        ("vision_cfg.pos_embed_type", "sin_cos_2d"),
        ("vision_cfg.qk_norm", True),
        ("vision_cfg.block_type", "custom"),
        ("vision_cfg.image_size", [32, 48]),
        ("vision_cfg.act_kwargs", {"approximate": "else"}),
        ("vision_cfg.norm_kwargs", {"bias": False}),
        ("vision_cfg.layers", [1, 2, 3]),
        ("vision_cfg.timm_model_name", "convnext_base"),
        ("text_cfg.embed_cls", True),
        ("text_cfg.hf_model_name", "roberta-base"),
        ("text_cfg.pool_type", "none"),
        ("text_cfg.proj_type", "mlp"),
        ("multimodal_cfg", {"width": 4}),
        ("something_new", 3),
        ("something_new", False),
        ("vision_cfg.something_new", 0),
        ("vision_cfg", None),
        ("text_cfg.something_new", None),
        ("text_cfg.tokenizer_mode", "syntax"),
    ],
)
def test_what_we_do_not_build_is_refused_by_name(path: str, value: Any) -> None:
    with pytest.raises(open_clip.UnknownOptionError, match=path.rsplit(".", maxsplit=1)[-1]):
        open_clip.config_from_json(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vision_cfg.image_size", [32, 32]),
        ("vision_cfg.patch_dropout", 0.5),
        ("vision_cfg.qk_norm", False),
        ("vision_cfg.ls_init_value", None),
        ("text_cfg.hf_tokenizer_name", "some/name"),
        ("custom_text", True),
    ],
)
def test_what_changes_nothing_is_accepted(path: str, value: Any) -> None:
    assert open_clip.config_from_json(changed(path, value)) == open_clip.config_from_json(MODEL)


def test_every_option_reaches_the_configuration() -> None:
    def config(path: str, value: Any) -> ClipConfig:
        return open_clip.config_from_json(changed(path, value))

    def vision(path: str, value: Any) -> VitConfig:
        tower = config(f"vision_cfg.{path}", value).vision
        assert isinstance(tower, VitConfig)
        return tower

    assert vision("head_width", 16).heads == 4
    assert vision("mlp_ratio", 2.0).mlp_ratio == 2.0
    assert vision("ls_init_value", 0.1).layer_scale == 0.1
    assert not vision("no_ln_pre", True).norm_before
    assert not vision("final_ln_after_pool", True).norm_after
    assert vision("norm_kwargs", {"eps": 1e-3}).norm_eps == 1e-3
    assert vision("act_kwargs", {"approximate": "tanh"}).activation == "gelu_tanh"
    assert config("vision_cfg.pool_type", "avg").pool == "mean"
    assert config("quick_gelu", True).text.activation == "quick_gelu"
    assert config("init_logit_bias", -5).loss == "siglip"
    assert config("init_logit_scale", 0.0).temperature == 1.0
    assert config("text_cfg.no_causal_mask", True).text.padded
    assert config("text_cfg.pool_type", "last").text.padded
    assert config("text_cfg.pad_id", 7).text.pad_id == 7
    assert not config("text_cfg.pool_type", "eos").text.padded
    resnet = config("vision_cfg.layers", [1, 2, 1, 1]).vision
    assert isinstance(resnet, ResNetConfig)
    assert resnet.heads == 32


def test_siglip_with_its_timm_tower() -> None:
    config = open_clip.config_from_json(SIGLIP)
    with torch.device("meta"):
        ours = config.build().state_dict()
    official = open_clip.table(config, custom_text=True).revert(ours)
    assert official["visual.trunk.attn_pool.latent"].shape == (1, 1, 768)
    assert official["visual.trunk.pos_embed"].shape == (1, 196, 768)
    assert official["text.text_projection.weight"].shape == (768, 768)
    parts = ("kv.bias", "kv.weight", "latent", "mlp.fc1.bias", "mlp.fc1.weight", "mlp.fc2.bias", "mlp.fc2.weight")
    parts += ("norm.bias", "norm.weight", "proj.bias", "proj.weight", "q.bias", "q.weight")
    pool = "visual.trunk.attn_pool."
    assert sorted(name.removeprefix(pool) for name in official if name.startswith(pool)) == list(parts)
    assert "visual.trunk.blocks.11.attn.proj.weight" in official
    converted = open_clip.convert(official, config)
    assert {name: value.shape for name, value in converted.state.items()} == {n: v.shape for n, v in ours.items()}
    named = CONFIGS["siglip-b-16"]()
    assert (config.vision.width, config.text.pool, config.pool) == (named.vision.width, named.text.pool, named.pool)


def test_siglip_positions_are_resampled_without_a_class_token() -> None:
    small = copy.deepcopy(SIGLIP)
    small["vision_cfg"]["image_size"] = 256
    config = open_clip.config_from_json(small)
    with torch.device("meta"):
        official = open_clip.table(config, custom_text=True).revert(config.build().state_dict())
    official["visual.trunk.pos_embed"] = torch.zeros(1, 196, 768)
    converted = open_clip.convert(official, config)
    assert converted.state["vision.positions"].shape == (256, 768)
    assert converted.report == {"visual.trunk.pos_embed": "resampled from (1, 196, 768) to (1, 256, 768)"}


@pytest.mark.parametrize("name", ["clip-vit-b-32", "clip-vit-l-14-336", "clip-rn50", "clip-rn50x4"])
def test_configuration_from_official_weights(name: str) -> None:
    config = CONFIGS[name]()
    with torch.device("meta"):
        official = openai.table(config).revert(config.build().state_dict())
        archived = {n: torch.zeros(()) for n in ("input_resolution", "context_length", "vocab_size")}
    assert openai.config_from_weights(official) == config
    converted = openai.convert(official | archived, config)
    assert set(converted.report) == set(archived)


def test_foreign_weights_and_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"neither visual\.proj nor visual\.attnpool"):
        openai.config_from_weights({"x": torch.zeros(1)})
    config = CONFIGS["clip-tiny"]()
    official = openai.table(config).revert(config.build().state_dict())
    with pytest.raises(ConversionError, match="queue"):
        openai.convert(official | {"queue": torch.zeros(1)}, config)
    arguments = {"embed_dim": 8, "image_resolution": 32, "vision_layers": 1, "vision_width": 64, "vision_patch_size": 8}
    arguments |= {"context_length": 5, "vocab_size": 9, "transformer_width": 8, "transformer_heads": 2}
    arguments |= {"transformer_layers": 1}
    assert openai.config_from_arguments(arguments).text.heads == 2
    with pytest.raises(ValueError, match="dropout"):
        openai.config_from_arguments(arguments | {"dropout": 0.1})
    with pytest.raises(ValueError, match="four stages, not 3"):
        openai.config_from_arguments(arguments | {"vision_layers": [1, 1, 1]})


def test_half_precision_files_become_float32() -> None:
    config = CONFIGS["clip-tiny"]()
    official = openai.table(config).revert(config.build().half().state_dict())
    assert {v.dtype for v in openai.convert(official, config).state.values()} == {torch.float32}


def tiny(folder: Path, **changes: Any) -> Path:
    """A random CLIP of open_clip in a folder, with a vocabulary; changes: of its text_cfg and preprocess_cfg."""
    text = {"context_length": 12, "vocab_size": len(official.WORDS), "width": 64, "heads": 1, "layers": 1}
    settings: dict[str, Any] = {
        "model_cfg": {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
            "text_cfg": text | changes.get("text_cfg", {}),
        },
        "preprocess_cfg": changes.get("preprocess_cfg", {}),
    }
    model = open_clip.config_from_json(settings["model_cfg"]).build()
    weights = open_clip.table(model.config, custom_text=False).revert(model.state_dict())
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("\n".join(official.WORDS) + "\n")
    return folder


def test_texts_are_cleaned_as_the_settings_say(tmp_path: Path) -> None:
    """``clean: canonicalize`` of SigLIP: lower case, no punctuation, underscores as spaces."""
    plain = load_foreign(tiny(tmp_path / "plain")).tokenizer
    kwargs = {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "canonicalize"}}
    cleaned = load_foreign(tiny(tmp_path / "cleaned", text_cfg=kwargs)).tokenizer
    texts = ["A dog's, (in) the_snow!", "the  red\tdog.", "one-two"]
    table = str.maketrans("", "", string.punctuation)
    expected = [" ".join(text.replace("_", " ").translate(table).lower().split()) for text in texts]
    assert cleaned.encode(texts) == plain.encode(expected) != plain.encode(texts)
    for kwargs in ({"clean": "else"}, {"strip_sep_token": True}):
        with pytest.raises(CheckpointError, match=r"text_cfg\.tokenizer_kwargs=.* is not supported"):
            load_foreign(tiny(tmp_path / "other", text_cfg={"tokenizer_kwargs": kwargs}))
    with pytest.raises(CheckpointError, match=r"ends texts with token 3, the settings of .* with 7"):
        load_foreign(tiny(tmp_path / "ends", text_cfg={"pool_type": "eos", "eos_id": 7}))


def test_pictures_are_prepared_as_the_settings_say(tmp_path: Path) -> None:
    given = {"size": [32, 32], "mode": "RGB", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "fill_color": 0}
    given |= {"interpolation": "bilinear", "resize_mode": "squash"}
    image = load_foreign(tiny(tmp_path, preprocess_cfg=given)).config.image
    assert (image.mean, image.resize, image.interpolation) == ((0.5, 0.4, 0.3), "squash", "bilinear")
    for key, value in (("size", 48), ("mode", "L"), ("interpolation", "random"), ("resize_mode", "longest"), ("x", 1)):
        with pytest.raises(CheckpointError, match=rf"{value}|has x, which is not known"):
            load_foreign(tiny(tmp_path, preprocess_cfg=given | {key: value}))
