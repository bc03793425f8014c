"""open_clip's CoCa layout: names of both forms of its attention, other picture sizes, options that are refused."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from imglish.checkpoints import coca as official
from imglish.checkpoints.open_clip import UnknownOptionError
from imglish.checkpoints.rules import ConversionError
from imglish.models.coca import CocaConfig

JSON: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 48,
        "head_width": 16,
        "patch_size": 8,
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "attn_pooler_queries": 5,
        "output_tokens": True,
    },
    "text_cfg": {"context_length": 9, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2, "embed_cls": True},
    "multimodal_cfg": {"context_length": 9, "vocab_size": 50, "width": 32, "heads": 4, "layers": 1},
}


def changed(**groups: dict[str, Any]) -> dict[str, Any]:
    made = deepcopy(JSON)
    for name, group in groups.items():
        made[name] = made[name] | group
    return made


def weights(config: CocaConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return official.table(config).revert(config.build().state_dict())


def test_configuration_from_json() -> None:
    config = official.config_from_json(JSON)
    assert (config.max_length, config.unimodal_depth, config.multimodal_depth) == (9, 2, 1)
    assert (config.pool, config.cross, config.queries, config.pool_heads) == ("shared", "separate", 5, 4)
    assert config.cls_sees == "released"
    assert official.config_from_json(JSON, released=False) == replace(config, cls_sees="text")
    assert official.config_from_json({**JSON, "quick_gelu": True}).activation == "quick_gelu"
    assert official.is_coca(JSON)
    assert not official.is_coca({"vision_cfg": {}})


@pytest.mark.parametrize("width", [48, 32], ids=["own matrices", "one matrix"])
def test_attention_pooling_in_both_forms(width: int) -> None:
    """nn.MultiheadAttention keeps one matrix where the tokens are as wide as the queries."""
    config = official.config_from_json(changed(vision_cfg={"width": width}))
    names = weights(config)
    fused = "visual.attn_pool.attn.in_proj_weight" in names
    assert fused == (width == 32)
    assert ("visual.attn_pool.attn.q_proj_weight" in names) == (width == 48)
    attention = torch.nn.MultiheadAttention(32, 4, kdim=width, vdim=width)
    of_pool = {name.removeprefix("visual.attn_pool.attn.") for name in names if ".attn_pool.attn." in name}
    assert of_pool == set(attention.state_dict())
    state = official.convert(names, config).state
    model = config.build()
    model.load_state_dict(state)
    attention.load_state_dict({name: names[f"visual.attn_pool.attn.{name}"] for name in of_pool})
    tokens = torch.randn(2, 7, width)
    pool = model.caption_pool
    asked, read = pool.norm_queries(pool.queries)[:, None].expand(-1, 2, -1), pool.norm_tokens(tokens).transpose(0, 1)
    expected = pool.norm(attention(asked, read, read, need_weights=False)[0].transpose(0, 1))
    torch.testing.assert_close(pool(tokens), expected, rtol=1e-4, atol=1e-5)


def test_positions_of_another_size_are_resampled() -> None:
    config = official.config_from_json(JSON)
    longer = changed(vision_cfg={"image_size": 48}, text_cfg={"context_length": 12})
    converted = official.convert(weights(config), official.config_from_json(longer))
    assert set(converted.report) == {"visual.positional_embedding", "text.positional_embedding"}
    assert converted.state["vision.positions"].shape == (37, 48)
    assert converted.state["text.positions"].shape == (13, 32)


@pytest.mark.parametrize(
    ("groups", "option"),
    [
        ({"text_cfg": {"embed_cls": False}}, "text_cfg.embed_cls"),
        ({"vision_cfg": {"attentional_pool": False}}, "vision_cfg.attentional_pool"),
        ({"multimodal_cfg": {"heads": 2}}, "multimodal_cfg.heads"),
        ({"multimodal_cfg": {"vocab_size": 51}}, "multimodal_cfg.vocab_size"),
        ({"multimodal_cfg": {"norm_kwargs": {"eps": 1e-6}}}, "multimodal_cfg.norm_kwargs"),
        ({"text_cfg": {"hf_model_name": "roberta"}}, "text_cfg.hf_model_name"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_options_that_change_the_model_are_refused(groups: dict[str, Any], option: str) -> None:
    with pytest.raises(UnknownOptionError, match=option.replace(".", r"\.")):
        official.config_from_json(changed(**groups))


def test_the_joint_space_is_as_wide_as_the_text() -> None:
    with pytest.raises(UnknownOptionError, match=r"top\.embed_dim=64"):
        official.config_from_json({**JSON, "embed_dim": 64})


def test_every_name_is_accounted_for() -> None:
    config = official.config_from_json(JSON)
    names = weights(config)
    with pytest.raises(ConversionError, match="no rule knows"):
        official.convert(names | {"visual.unknown": torch.zeros(1)}, config)
    del names["text.cls_emb"]
    with pytest.raises(ConversionError, match=r"text\.cls"):
        official.convert(names, config)
