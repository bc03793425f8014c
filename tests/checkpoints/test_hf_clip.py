from __future__ import annotations

import pytest
import torch

from imglish.checkpoints import hf_clip
from imglish.data.batch import TextBatch

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "layer_norm_eps": 1e-4}


def test_a_transformers_clip_computes_the_same_here() -> None:
    transformers = pytest.importorskip("transformers")
    vision = SMALL | {"intermediate_size": 128, "image_size": 32, "patch_size": 8, "hidden_act": "gelu"}
    text = SMALL | {"intermediate_size": 256, "vocab_size": 90, "max_position_embeddings": 9, "eos_token_id": 89}
    wanted = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=48)
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(wanted).eval()
    config = hf_clip.config_from_json(wanted.to_dict())
    ours = config.build().eval()
    ours.load_state_dict(hf_clip.convert(theirs.state_dict(), config).state)
    images, sequences = torch.randn(3, 3, 32, 32), [[88, 4, 5, 89], [88, 7, 89], [88, 3, 2, 1, 9, 89]]
    padded = torch.tensor([x + [0] * (9 - len(x)) for x in sequences])
    with torch.no_grad():
        expected = theirs(input_ids=padded, pixel_values=images)
        image = ours.encode_images(images).features
        text_features = ours.encode_texts(TextBatch.of(sequences)).features
        logits = ours.logit_scale.exp() * image @ text_features.T
    torch.testing.assert_close(image, expected.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text_features, expected.text_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=1e-4, atol=1e-4)
    back = hf_clip.TABLE.revert(ours.state_dict())
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())


def test_an_unknown_activation_is_refused() -> None:
    part = SMALL | {"intermediate_size": 128, "image_size": 32, "patch_size": 8, "hidden_act": "swish"}
    with pytest.raises(ValueError, match="hidden_act 'swish' is not supported"):
        hf_clip.config_from_json({"vision_config": part, "text_config": part})
