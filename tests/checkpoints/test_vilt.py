"""ViLT's state dicts of transformers: every name accounted for, the same outputs, and back again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from imglish.checkpoints import hf_vilt
from imglish.checkpoints.rules import ConversionError
from imglish.checkpoints.vilt import convert, table
from imglish.data.batch import TextBatch
from imglish.data.patches import PatchBatch
from imglish.models.vilt import Pairs, Vilt, ViltConfig
from imglish.models.vilt_heads import ViltRanking
from imglish.models.vilt_pictures import AspectInput
from imglish.nn.segments import Ragged

transformers = pytest.importorskip("transformers")
SHAPES = [(32, 48), (48, 32), (32, 32)]


def ours(**changes: Any) -> Vilt:
    image = AspectInput(32, longest=53, patch=16)
    settings = {"vocab_size": 50, "max_length": 12, "width": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0, **changes}
    return ViltConfig(image=image, dropout=0.0, **settings).build().eval()


def peer_config() -> Any:
    return transformers.ViltConfig(
        vocab_size=50,
        max_position_embeddings=12,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=16,
        layer_norm_eps=1e-6,
    )


def test_same_outputs_as_transformers() -> None:
    torch.manual_seed(0)
    peer = transformers.ViltForMaskedLM(peer_config()).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(0, 0.3)
    model = ours(text_norm_eps=1e-6)
    official = peer.state_dict()
    converted = hf_vilt.convert(official, model.state_dict())
    model.load_state_dict(converted.state)
    assert set(converted.report) - {"itm_head.weight", "itm_head.bias"} <= set(official)
    back = hf_vilt.table(with_words=True).revert(model.state_dict())
    assert back.keys() == {name for name in official if not name.endswith("position_ids")}
    assert all(torch.equal(value, official[name]) for name, value in back.items())
    older = official | {"mlm_score.bias": official["mlm_score.decoder.bias"]}
    again = hf_vilt.convert(older, model.state_dict()).state
    assert all(torch.equal(value, converted.state[name]) for name, value in again.items())
    body = {name.removeprefix("vilt."): value for name, value in official.items() if name.startswith("vilt.")}
    alone = hf_vilt.convert(body, model.state_dict())
    assert "mlm_words.weight" in alone.report

    texts = [[1, 7, 9, 2], [1, 5, 6, 8, 3, 2], [1, 2]]
    pixels, mask = torch.zeros(3, 3, 48, 48), torch.zeros(3, 48, 48, dtype=torch.int64)
    parts = []
    for number, (high, wide) in enumerate(SHAPES):
        picture = torch.randn(1, 3, high, wide)
        pixels[number, :, :high, :wide], mask[number, :high, :wide] = picture[0], 1
        parts.append(PatchBatch.cut(picture, 16))
    pictures = PatchBatch(torch.cat([p.pixels for p in parts]), tuple(p.grids[0] for p in parts), (None,) * 3)
    ids = torch.tensor([text + [0] * (6 - len(text)) for text in texts])
    present = torch.tensor([[1] * len(text) + [0] * (6 - len(text)) for text in texts])
    with torch.no_grad():
        theirs = peer(input_ids=ids, attention_mask=present, pixel_values=pixels, pixel_mask=mask).logits
        tokens, words = model.embed_images(pictures).tokens, model.embed_texts(TextBatch.of(texts))
        assert isinstance(tokens, Ragged)
        assert words.rows is not None
        pairs = Pairs.of(Ragged(words.rows, words.segments), tokens, np.arange(3), np.arange(3))
        states = model.read_pairs(pairs)
        rows = np.concatenate([np.arange(s, s + n) for s, n in zip(pairs.segments.bounds, pairs.words)])
        torch.testing.assert_close(model._words(states[rows]), theirs[:, :6][present.bool()], rtol=1e-4, atol=1e-4)


def test_what_a_checkpoint_lacks_is_said() -> None:
    model = ours()
    official = table().revert(model.state_dict())
    again = convert(official, model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state.items())
    del official["transformer.norm.bias"]
    with pytest.raises(ConversionError, match=r"norm\.bias"):
        convert(official, model.state_dict())
    with pytest.raises(ConversionError, match="mpp_score"):
        convert(table().revert(model.state_dict()) | {"mpp_score.bias": torch.zeros(2)}, model.state_dict())


def test_ranking_starts_as_the_matched_row() -> None:
    model = ours(mlm=False)
    ranking = ViltRanking(model)
    assert model.itm_head is not None
    assert torch.equal(ranking.head.weight, model.itm_head.weight[1:])
    official = table("rank_output").revert(ranking.state_dict())
    again = convert(official, ranking.state_dict())
    assert all(torch.equal(value, ranking.state_dict()[name]) for name, value in again.state.items())
