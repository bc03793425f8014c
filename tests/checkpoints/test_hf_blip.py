"""BLIP of transformers computes the same here: matching, and the captions that it writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from imglish.checkpoints import hf_blip
from imglish.checkpoints.blip import Parts
from imglish.data.batch import Batch, TextBatch
from imglish.generation.config import GenerationConfig
from imglish.generation.engine import generate
from imglish.models.blip import Blip
from imglish.models.capabilities import EncodedTexts

END = 3
VISION = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48, "intermediate_size": 96}
TEXT = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}


def wanted(**text: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    ids = {"vocab_size": 90, "bos_token_id": 88, "eos_token_id": END, "sep_token_id": END, "pad_token_id": 0}
    return transformers.BlipConfig(
        vision_config=VISION | {"image_size": 32, "patch_size": 8},
        text_config=TEXT | ids | {"max_position_embeddings": 24, "encoder_hidden_size": 48} | text,
        image_text_hidden_size=16,
    )


def pair(kind: str, **changes: Any) -> tuple[Any, Blip]:
    """Their model with random weights large enough to matter, and ours with the same."""
    import transformers

    given = wanted()
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(given).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2 if "embed" in name else 0.8 / parameter.shape[-1] ** 0.5)
    config = hf_blip.config_from_json(given.to_dict(), **changes)
    ours = config.build().eval()
    ours.load_state_dict(hf_blip.convert(theirs.state_dict(), ours.state_dict(), config).state)
    return theirs, ours


def test_matching_and_features() -> None:
    theirs, ours = pair("BlipForImageTextRetrieval", itc=False)
    images = torch.randn(3, 3, 32, 32)
    sequences = [[2, 9, 8, 7, END], [2, 5, END], [2, 20, 21, 22, 23, 24, END]]
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": images}
    with torch.no_grad():
        texts = TextBatch.of(sequences)
        encoded, written = ours.encode_images(images), ours.encode_texts(texts)
        similarity = theirs(**given, use_itm_head=False).itm_score
        torch.testing.assert_close(encoded.features @ written.features.T, similarity, rtol=1e-4, atol=1e-5)
        memory = ours.project_images(encoded.tokens)
        as_they_do = EncodedTexts(written.features, texts.segments, ours.embedding(texts))  # [CLS], not [ENC]
        logits = ours.match(memory, as_they_do, [0, 1, 2], [0, 1, 2])
        torch.testing.assert_close(logits, theirs(**given).itm_score, rtol=1e-4, atol=1e-5)
    back = hf_blip.table(ours.config, Parts(decoder=False, temperature=False)).revert(ours.state_dict())
    state = theirs.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_loss_of_captioning() -> None:
    theirs, ours = pair("BlipForConditionalGeneration", itc=False, itm=False)
    images, sequences = torch.randn(2, 3, 32, 32), [[88, 9, 8, 7, END], [88, 5, END]]
    ids = torch.tensor([s + [0] * (5 - len(s)) for s in sequences])
    labels = ids.masked_fill(ids == 0, -100)
    with torch.no_grad():
        expected = theirs(images, ids, (ids > 0).long(), labels=labels).loss
        found = ours.losses(Batch(images, TextBatch.of(sequences), torch.arange(2), torch.zeros(2, 2)))
    torch.testing.assert_close(found["lm"], expected, rtol=1e-5, atol=1e-5)


def up_to_end(row: list[int], start: int) -> list[int]:
    """A text of theirs without what fills it up."""
    return row[: row.index(END, start) + 1] if END in row[start:] else row


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, at least 9 tokens": {"min_length": 9},
    "3 beams": {"num_beams": 3},
    "4 beams, repetition": {"num_beams": 4, "repetition_penalty": 1.4, "min_length": 6},
    "3 beams, short ones first": {"num_beams": 3, "length_penalty": -0.5},
    "2 beams, no bigram twice": {"num_beams": 2, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_captions(way: str) -> None:
    """Greedy and beam search give the tokens that transformers gives."""
    theirs, ours = pair("BlipForConditionalGeneration", itc=False, itm=False)
    with torch.no_grad():  # an end that comes, but not at once
        theirs.text_decoder.cls.predictions.bias[END] = ours.lm_head.bias[END] = 1.8
    images, settings = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)), WAYS[way]
    opening = [88, 11, 12]
    prompt = torch.tensor([[*opening, END]]).repeat(6, 1)  # their generate takes the last token off
    expected = theirs.generate(images, prompt, max_length=16, do_sample=False, **settings).tolist()
    config = GenerationConfig(
        beams=settings.get("num_beams", 1),
        max_length=16,
        min_length=settings.get("min_length", 0),
        repetition_penalty=settings.get("repetition_penalty", 1.0),
        length_penalty=settings.get("length_penalty", 1.0),
        no_repeat_ngram=settings.get("no_repeat_ngram_size", 0),
    )
    found = generate(ours, ours.encode_images(images), [opening] * 6, END, config, [str(i) for i in range(6)])
    made = [[*opening, *best.ids, *([END] if best.ended else [])] for (best,) in found]
    assert made == [up_to_end(row, len(opening)) for row in expected]
    assert len({tuple(ids) for ids in made}) > 1  # the pictures matter
    assert len({len(ids) for ids in made}) > 1


def test_what_we_do_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_act 'relu' is not supported"):
        hf_blip.config_from_json(wanted(hidden_act="relu").to_dict())
    with pytest.raises(ValueError, match="bos_token_id is 7"):
        hf_blip.config_from_json(wanted(bos_token_id=7).to_dict())
