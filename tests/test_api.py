from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import imglish
from imglish.checkpoints import beit, native
from imglish.data.batch import TextBatch
from imglish.data.images import ImageError
from imglish.data.pictures import stack
from imglish.data.tokenizers import Tokenizer
from imglish.models import registry
from imglish.models.capabilities import MissingCapabilityError
from imglish.models.heads import HeadConfig, with_head

TEXTS = ["a red hat", "two blue shoes and a bag", "黑色上衣", "a hat"]


def _export(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train_wordpiece(TEXTS, 80, max_length=16)
    model = registry.build(dataclasses.replace(registry.named(name), vocab_size=tokenizer.vocab_size))
    return native.export(folder / name, model, tokenizer, {"step": 7})


@pytest.fixture(scope="module")
def albef(tmp_path_factory: pytest.TempPathFactory) -> imglish.Model:
    return imglish.load(_export(tmp_path_factory.mktemp("models"), "albef-tiny"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    paths = []
    for i in range(5):
        small = Image.fromarray(rng.integers(0, 255, (3, 4, 3), dtype=np.uint8))
        small.resize((60, 50)).save(folder / f"{i}.png")
        paths.append(folder / f"{i}.png")
    return paths


def test_pictures_of_all_kinds_give_the_same_features(albef: imglish.Model, photos: list[Path]) -> None:
    features = albef.encode_images(photos)
    assert features.shape == (5, albef.config.embed_dim)
    assert torch.allclose(features.norm(dim=1), torch.ones(5), atol=1e-5)
    buffer = io.BytesIO()
    Image.open(photos[1]).save(buffer, "PNG")
    kinds = [str(photos[1]), photos[1].read_bytes(), Image.open(photos[1]), buffer.getvalue()]
    assert torch.allclose(albef.encode_images(kinds), features[[1] * 4], atol=1e-6)


def test_texts_are_encoded_in_any_number(albef: imglish.Model) -> None:
    many = albef.encode_texts(TEXTS * 20)
    assert torch.allclose(many[:4], albef.encode_texts(TEXTS), atol=1e-5)
    assert torch.allclose(many[-1], albef.encode_texts(["a hat"])[0], atol=1e-5)


def test_match_gives_the_probability_of_each_pair(albef: imglish.Model, photos: list[Path]) -> None:
    found = albef.match(photos, TEXTS)
    assert found.shape == (5, 4)
    network = albef.network
    pixels = albef._pixels(photos[2])[None]
    with torch.no_grad():
        tokens = network.encode_images(pixels).tokens
        text = network.encode_texts(TextBatch.of(albef.tokenizer.encode([TEXTS[1]])))
        logits = network.match(network.project_images(tokens), text, [0], [0])
    assert found[2, 1] == pytest.approx(logits.softmax(1)[0, 1].item(), abs=1e-5)
    long = albef.match(photos[:2], TEXTS * 80)  # more texts than pass the fusion at once
    assert torch.allclose(long[:, :4], found[:2], atol=1e-5)
    assert torch.allclose(long[:, -4:], found[:2], atol=1e-5)


def test_rank_reorders_what_the_towers_propose(albef: imglish.Model, photos: list[Path]) -> None:
    gallery = albef.gallery(photos)
    cosine = gallery.features @ albef.encode_texts(TEXTS[:1])[0]
    match = albef.match(gallery, TEXTS[:1])[:, 0]
    towers = albef.rank(TEXTS[0], gallery, rerank=0)
    assert [found.index for found in towers] == cosine.argsort(descending=True).tolist()
    assert all(found.match is None and found.score == found.cosine for found in towers)
    first = cosine.argsort(descending=True)[:3]
    found = albef.rank(TEXTS[0], photos, rerank=3)
    assert {f.index for f in found[:3]} == set(first.tolist())
    assert [f.index for f in found[3:]] == [f.index for f in towers[3:]]
    assert [f.score for f in found[:3]] == pytest.approx([match[f.index].item() for f in found[:3]], abs=1e-5)
    rule = albef.gallery(photos)
    logits = albef._logits(rule, [f.index for f in found[:3]], albef.read_texts(TEXTS[:1]))[:, 0]
    margins = (logits[:, 1] - logits[:, 0]).tolist()
    assert albef.score_rule == "itm"  # and yet what stands higher never has a smaller probability
    assert margins == sorted(margins, reverse=True)
    assert found[0].picture == photos[found[0].index]
    assert len(albef.rank(TEXTS[0], gallery, top=2)) == 2


def test_a_model_without_fusion_ranks_by_towers(tmp_path: Path, photos: list[Path]) -> None:
    clip = imglish.load(_export(tmp_path, "clip-tiny"))
    assert not clip.matches
    assert clip.rank("a hat", photos)[0].match is None
    with pytest.raises(MissingCapabilityError, match="albef"):
        clip.match(photos, TEXTS)


def with_task(folder: Path, name: str, head: HeadConfig) -> imglish.Model:
    torch.manual_seed(1)
    words = Tokenizer.train_wordpiece(TEXTS, 80, append_sep=True, max_length=16)
    config: Any = registry.named(name)
    if hasattr(config, "vocab_size"):
        config = dataclasses.replace(config, vocab_size=words.vocab_size)
    model = with_head(registry.build(config), head)
    with torch.no_grad():
        for parameter in (dict(model.named_parameters())[name] for name in model.head_parameters()):
            parameter.normal_(0, 0.5)
    meta = {"recipe": {"data": {"clean": "albef", "max_words": 3}}}
    return imglish.load(native.export(folder / name, model, words if head.texts else None, meta))


def test_answers(tmp_path: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the classes of the model itself over texts cleaned as in training, whatever the blocks."""
    head = HeadConfig("nlvr2", classes=("false", "true", "no idea"), pictures=2)
    model = with_task(tmp_path, "albef-tiny", head)
    pairs, texts = [photos[:2], photos[2:4], [photos[4], photos[0]]], ["A hat!", "two blue shoes and a bag", "red"]
    found = model.answer(pairs, texts)
    cleaned = model.tokenizer.encode(["a hat", "two blue shoes", "red"])
    images = [stack([model._pixels(pair[n]) for pair in pairs]) for n in (0, 1)]
    with torch.no_grad():
        chances = model.network.classify(images, TextBatch.of(cleaned)).softmax(1)  # type: ignore[operator]
    for said, chance in zip(found, chances, strict=True):
        assert [one.text for one in said] == [head.classes[i] for i in chance.argsort(descending=True)]
        torch.testing.assert_close(torch.tensor([one.probability for one in said]), chance.sort(descending=True)[0])
    monkeypatch.setattr("imglish.api.BATCH", 2)
    for said, again in zip(found, model.answer(pairs, texts), strict=True):
        assert [one.text for one in said] == [one.text for one in again]
    with pytest.raises(ValueError, match="1 pictures at place 1: the task has 2"):
        model.answer([photos[:2], photos[0]], ["a", "b"])
    with pytest.raises(ValueError, match="1 times pictures for 2 texts"):
        model.answer([photos[:2]], ["a", "b"])
    with pytest.raises(TypeError, match="a model for nlvr2 takes texts"):
        model.answer([photos[:2]])
    with pytest.raises(TypeError, match="expected lists"):
        model.answer([photos[:2]], "a hat")


def test_answers_about_pictures_alone_and_written_ones(tmp_path: Path, photos: list[Path]) -> None:
    model = with_task(tmp_path, "beit-tiny", HeadConfig("classification", classes=tuple("abcdefg"), texts=False))
    weights = beit.classifier_table().revert(model.network.inner.state_dict())
    torch.save({"model": weights}, tmp_path / "beit.pth")
    (tmp_path / "names.json").write_text('["u", "v", "w", "x", "y", "z", "a"]')
    named = imglish.load(tmp_path / "beit.pth", classes=tmp_path / "names.json")
    assert named.answer(photos)[0][0].text in "uvwxyza"
    found = model.answer(photos)
    assert [len(said) for said in found] == [5] * 5
    assert all(said[0].probability >= said[1].probability for said in found)
    with pytest.raises(TypeError, match="a model for classification takes pictures alone"):
        model.answer(photos, ["x"] * 5)
    writer = with_task(tmp_path, "albef-tiny", HeadConfig("vqa", "answers", ("a red hat", "blue shoes"), start=2))
    said = writer.answer(photos[:1], ["what?"])[0]
    assert {one.text for one in said} == {"a red hat", "blue shoes"}


def test_mistakes_have_messages(albef: imglish.Model, photos: list[Path], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="list of texts"):
        albef.encode_texts("a hat")
    with pytest.raises(TypeError, match="list of pictures"):
        albef.encode_images(str(photos[0]))
    with pytest.raises(ImageError, match=r"nothing\.jpg"):
        albef.encode_images([tmp_path / "nothing.jpg"])
    with pytest.raises(ValueError, match="keep_tokens"):
        albef.match(albef.gallery(photos, keep_tokens=False), TEXTS)
    with pytest.raises(native.CheckpointError, match="no model"):
        imglish.load(tmp_path / "nowhere")
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = imglish.nothing_here


def test_the_package_imports_without_torch() -> None:
    code = "import sys, imglish; assert 'torch' not in sys.modules; print(imglish.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == imglish.__version__
