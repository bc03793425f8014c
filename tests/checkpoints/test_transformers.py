"""Every layout of transformers: what their model computes after save_pretrained, ours computes when it is loaded, and
theirs again of what we write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from imglish.checkpoints import hf_settings, native
from imglish.checkpoints.foreign import load_foreign
from imglish.checkpoints.hf_export import export_transformers, kinds
from imglish.checkpoints.loading import load_any
from imglish.checkpoints.native import CheckpointError, Loaded
from imglish.data.batch import PatchMasks, TextBatch
from imglish.generation.config import GenerationConfig
from imglish.generation.engine import generate
from imglish.models.capabilities import EncodedImages
from imglish.models.vilt import Pairs
from imglish.nn.segments import Ragged
from tests.checkpoints import official

transformers = pytest.importorskip("transformers")

WORDS = official.WORDS
COUNT, END = len(WORDS), WORDS.index("[SEP]")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = SIZES | {"image_size": 32, "patch_size": 16}
TEXTS = ["a dog in the snow", "a man in red"]
Compute = Callable[[Any, Loaded, Tensor], dict[str, tuple[Tensor, Tensor]]]
"""Their model, ours and pictures -> name -> what theirs computes, what ours computes."""


def ids(loaded: Loaded, opening: int | None = None) -> tuple[TextBatch, Tensor, Tensor]:
    """The texts for us, and for them padded with their mask; ``opening`` in place of the first token."""
    rows = loaded.tokenizer.encode(TEXTS)
    theirs = [row if opening is None else [opening, *row[1:]] for row in rows]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in theirs])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return TextBatch.of(rows), padded, mask


def contrast(theirs: Any, loaded: Loaded, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    texts, padded, mask = ids(loaded)
    if loaded.config.pool == "map":  # SigLIP reads what fills a text up
        whole = torch.full((len(texts), loaded.config.max_length), loaded.config.text.pad_id)
        whole[:, : padded.shape[1]] = padded.masked_fill(mask == 0, loaded.config.text.pad_id)
        out = theirs(input_ids=whole, pixel_values=images)
    else:
        out = theirs(input_ids=padded, attention_mask=mask, pixel_values=images)
    model: Any = loaded.model
    picture, text = model.encode_images(images).features, model.encode_texts(texts).features
    logits = model.logit_scale.exp() * text @ picture.T
    if model.logit_bias is not None:
        logits = logits + model.logit_bias
    return {
        "pictures": (out.image_embeds, picture),
        "texts": (out.text_embeds, text),
        "logits": (out.logits_per_text, logits),
    }


def vilt_states(theirs: Any, loaded: Loaded, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    texts, padded, mask = ids(loaded)
    given = {"input_ids": padded, "attention_mask": mask, "pixel_values": images}
    model: Any = loaded.model
    tokens, words = model.embed_images(images).tokens, model.embed_texts(texts)
    pairs = Pairs.of(Ragged(words.rows, words.segments), tokens, np.arange(2), np.arange(2))
    states = model.read_pairs(pairs)
    if type(theirs).__name__ == "ViltForMaskedLM":
        rows = np.concatenate([np.arange(s, s + n) for s, n in zip(pairs.segments.bounds, pairs.words)])
        return {"words": (theirs(**given).logits[:, : padded.shape[1]][mask.bool()], model._words(states[rows]))}
    if type(theirs).__name__ == "ViltForImageAndTextRetrieval":
        logits = model.match(tokens_memory(model, images), words, [0, 1], [0, 1])
        return {"score": (theirs(**given).logits[:, 0], logits[:, 1] - logits[:, 0])}
    pooled = model.pool(states[torch.tensor(pairs.segments.bounds[:2])])
    return {"pooled": (theirs(**given).pooler_output, pooled)}


def tokens_memory(model: Any, images: Tensor) -> Any:
    return model.project_images(model.embed_images(images).tokens)


def vilt_task(theirs: Any, loaded: Loaded, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    texts, padded, mask = ids(loaded)
    model: Any = loaded.model
    if model.head.pictures == 2:
        pair = torch.stack([images, images.flip(0)], dim=1)
        logits = theirs(input_ids=padded, attention_mask=mask, pixel_values=pair).logits
        return {"logits": (logits, model.classify([images, images.flip(0)], texts))}
    logits = theirs(input_ids=padded, attention_mask=mask, pixel_values=images).logits
    return {"logits": (logits, model.classify([images], texts))}


def blip_matching(theirs: Any, loaded: Loaded, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    model: Any = loaded.model
    texts, padded, mask = ids(loaded)
    _, opened, _ = ids(loaded, opening=model.config.encode_id)  # as BLIP was trained; theirs takes what it is given
    encoded, written = model.encode_images(images), model.encode_texts(texts)
    similarity = theirs(padded, images, attention_mask=mask, use_itm_head=False).itm_score
    logits = model.match(model.project_images(encoded.tokens), written, [0, 1], [0, 1])
    return {
        "cosine": (similarity, encoded.features @ written.features.T),
        "match": (theirs(opened, images, attention_mask=mask).itm_score, logits),
    }


def blip_captions(theirs: Any, loaded: Loaded, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    model: Any = loaded.model
    opening = [model.config.decode_id, 5, 6]
    with torch.no_grad():
        expected = theirs.generate(images, torch.tensor([[*opening, END]] * len(images)), max_length=12, num_beams=2)
        config = GenerationConfig(beams=2, max_length=12)
        found = generate(model, model.encode_images(images), [opening] * 2, END, config, ["first", "second"])
    made = [[*opening, *best.ids, *([END] if best.ended else [])] for (best,) in found]
    padded = torch.zeros_like(expected)
    for row, text, theirs_row in zip(padded, made, expected, strict=True):
        row[: len(text)] = torch.tensor(text)
        ends = (theirs_row[len(opening) :] == END).nonzero()
        theirs_row[len(opening) + 1 + int(ends[0]) if len(ends) else len(theirs_row) :] = 0
    return {"ids": (expected, padded)}


def padded(rows: list[list[int]]) -> Tensor:
    return torch.tensor([row + [0] * (12 - len(row)) for row in rows])


def blip_answers(theirs: Any, loaded: Loaded, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Question by question: theirs lets the decoder look at what fills a question up."""
    model: Any = loaded.model
    form, made, expected, logits, written = model.caption_form(), [], [], [], []
    for row, image in zip(loaded.tokenizer.encode(TEXTS), images[:, None], strict=True):
        states = model.questions([image], TextBatch.of([row]))
        encoded = EncodedImages(states.rows.new_zeros(1, 0), states)
        [(best,)] = generate(model, encoded, [[form.start]], END, GenerationConfig(beams=3, max_length=10), [""])
        made.append([form.start, *best.ids, *([END] if best.ended else [])])
        question = torch.tensor([[model.config.encode_id, *row[1:]]])  # as BLIP was trained; theirs takes what it gets
        (found,) = theirs.generate(question, image, max_length=10, num_beams=3).tolist()
        expected.append(found)
        answer = torch.tensor([[form.start, 5, 6]])
        seen = theirs.text_encoder(question, encoder_hidden_states=theirs.vision_model(image)[0])[0]
        logits.append(theirs.text_decoder(answer, encoder_hidden_states=seen).logits[0, -1])
        state = model.start_captions(encoded, 4)
        written.append(model.continue_captions(state, TextBatch.of(answer.tolist()))[0])
    return {
        "ids": (padded(expected), padded(made)),
        "logits": (torch.stack(logits), torch.stack(written)),
    }


def vilt_config(**changes: Any) -> Any:
    return transformers.ViltConfig(
        **SIZES,
        vocab_size=COUNT,
        max_position_embeddings=16,
        image_size=64,
        patch_size=32,
        max_image_length=-1,
        layer_norm_eps=1e-6,
        **changes,
    )


def blip_config() -> Any:
    text = SIZES | {"vocab_size": COUNT + 2, "max_position_embeddings": 32, "encoder_hidden_size": 32}
    text |= {"bos_token_id": COUNT, "sep_token_id": END, "eos_token_id": END, "pad_token_id": 0, "projection_dim": 16}
    return transformers.BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=16, projection_dim=16)


def towers(kind: str) -> Any:
    text = SIZES | {"vocab_size": COUNT, "max_position_embeddings": 16}
    ends = {"bos_token_id": 2, "eos_token_id": END, "pad_token_id": 1}
    if kind == "ChineseCLIPConfig":
        return transformers.ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    if kind == "SiglipConfig":
        return transformers.SiglipConfig(text_config=text | ends, vision_config=VISION)
    return transformers.CLIPConfig(text_config=text | ends, vision_config=VISION, projection_dim=24)


def beit_codes(theirs: Any, loaded: Loaded, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[0, 3:7] = masked[1, 10:] = True
    model: Any = loaded.model
    patches = PatchMasks(masked.flatten().nonzero()[:, 0], (4, 6), 16)
    logits = theirs(images, bool_masked_pos=masked).logits
    return {"codes": (logits[masked], model.fill_patches(images, patches))}


def beit_classes(theirs: Any, loaded: Loaded, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    model: Any = loaded.model
    return {"logits": (theirs(images).logits, model.classify([images], TextBatch.of([[], []])))}


def beit_config(**changes: Any) -> Any:
    return transformers.BeitConfig(**SIZES, image_size=32, patch_size=8, vocab_size=40, layer_norm_eps=1e-3, **changes)


LAYOUTS: dict[str, tuple[Callable[[], Any], Compute, str, int]] = {  # class -> config, comparison, our kind, side
    "CLIPModel": (lambda: towers("CLIPConfig"), contrast, "hf-clip", 32),
    "ChineseCLIPModel": (lambda: towers("ChineseCLIPConfig"), contrast, "hf-chinese-clip", 32),
    "SiglipModel": (lambda: towers("SiglipConfig"), contrast, "hf-siglip", 32),
    "ViltModel": (vilt_config, vilt_states, "hf-vilt", 64),
    "ViltForMaskedLM": (lambda: vilt_config(tie_word_embeddings=False), vilt_states, "hf-vilt", 64),
    "ViltForImageAndTextRetrieval": (vilt_config, vilt_states, "hf-vilt", 64),
    "ViltForQuestionAnswering": (lambda: vilt_config(num_labels=5), vilt_task, "hf-vilt-task", 64),
    "ViltForImagesAndTextClassification": (
        lambda: vilt_config(num_labels=2, num_images=2, modality_type_vocab_size=3),
        vilt_task,
        "hf-vilt-task",
        64,
    ),
    "BlipForImageTextRetrieval": (blip_config, blip_matching, "hf-blip", 32),
    "BlipForConditionalGeneration": (blip_config, blip_captions, "hf-blip", 32),
    "BlipForQuestionAnswering": (blip_config, blip_answers, "hf-blip-vqa", 32),
    "BeitForMaskedImageModeling": (
        lambda: beit_config(use_mask_token=True, use_shared_relative_position_bias=True),
        beit_codes,
        "hf-beit",
        32,
    ),
    "BeitForImageClassification": (
        lambda: beit_config(use_relative_position_bias=True, num_labels=5),
        beit_classes,
        "hf-beit-classes",
        32,
    ),
}
KINDS = {"ViltForImageAndTextRetrieval": "matching", "BlipForConditionalGeneration": "captioning"}


def saved(cls: str, folder: Path, config: Any = None) -> Any:
    """A random model of theirs (config: if not that of LAYOUTS), written by save_pretrained with a vocabulary."""
    torch.manual_seed(0)
    config = config or LAYOUTS[cls][0]()
    theirs = getattr(transformers, cls)(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2 if "embed" in name else 0.8 / parameter.shape[-1] ** 0.5)
        if hasattr(theirs, "generate"):
            theirs.text_decoder.cls.predictions.bias[END] = 1.5
    theirs.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return theirs


def compare(cls: str, theirs: Any, loaded: Loaded) -> None:
    side = loaded.config.image.size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, (expected, found) in LAYOUTS[cls][1](theirs, loaded, images).items():
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("cls", LAYOUTS)
def test_there_and_back(cls: str, tmp_path: Path) -> None:
    theirs = saved(cls, tmp_path / "theirs")
    loaded = load_foreign(tmp_path / "theirs")
    assert loaded.meta["from"]["format"] == LAYOUTS[cls][2]
    compare(cls, theirs, loaded)
    if cls == "ViltModel" or cls.startswith("Beit"):
        return  # has no head for anything that we would write; BEiT is read alone
    written, _ = export_transformers(tmp_path / "ours", loaded, KINDS.get(cls))
    again = getattr(transformers, cls).from_pretrained(written).eval()
    compare(cls, again, loaded)
    state = theirs.state_dict()
    for name, value in again.state_dict().items():
        expected = state[name]
        if cls == "ChineseCLIPModel" and "word_embeddings" in name:  # theirs clears [PAD] when it loads
            value, expected = value[1:], expected[1:]
        torch.testing.assert_close(value, expected, msg=lambda m, n=name: f"{n}: {m}")
    second = load_foreign(written)
    assert second.config == loaded.config
    rewritten, _ = export_transformers(tmp_path / "second", second, KINDS.get(cls))
    for file in written.iterdir():
        assert (rewritten / file.name).read_bytes() == file.read_bytes(), file.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(written)
    assert tokenizer(TEXTS)["input_ids"] == loaded.tokenizer.encode(TEXTS)


def test_the_body_of_a_blip_without_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.BlipModel(blip_config()).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    loaded = load_foreign(tmp_path)
    assert loaded.meta["from"]["format"] == "hf-blip-backbone"
    assert "pooled state" in loaded.meta["conversion"]["text_projection.weight"]
    images = torch.randn(2, 3, 32, 32)
    model: Any = loaded.model
    texts, padded, mask = ids(loaded)
    with torch.no_grad():
        tokens = model.encode_images(images).tokens
        torch.testing.assert_close(tokens, theirs.vision_model(images).last_hidden_state, rtol=1e-4, atol=1e-4)
        rows = model.embedding(texts)
        for layer in model.layers:
            rows = layer(rows, texts.segments)
        expected = theirs.text_model(padded, attention_mask=mask).last_hidden_state[mask.bool()]
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


def test_what_their_files_leave_out_is_known() -> None:
    """``config.json`` on the hub holds only what differs from the defaults of the configuration classes."""
    classes = {"clip": "CLIP", "chinese_clip": "ChineseCLIP", "siglip": "Siglip", "blip": "Blip", "vilt": "Vilt"}
    classes["beit"] = "Beit"
    for kind, name in classes.items():
        theirs = getattr(transformers, f"{name}Config")().to_dict()
        for key, value in hf_settings.DEFAULTS[kind].items():
            inner = {key: theirs[key]} if not isinstance(value, dict) else {k: theirs[key][k] for k in value}
            assert inner == ({key: value} if not isinstance(value, dict) else value), (kind, key)


def test_settings_that_say_little_are_filled_up(tmp_path: Path) -> None:
    saved("SiglipModel", tmp_path)
    given = json.loads((tmp_path / "config.json").read_text())
    short = {"model_type": "siglip"}
    for part in ("vision_config", "text_config"):
        default = hf_settings.DEFAULTS["siglip"][part]
        short[part] = {k: v for k, v in given[part].items() if k in default and v != default[k]}  # type: ignore[assignment]
    (tmp_path / "config.json").write_text(json.dumps(short))
    assert load_foreign(tmp_path).config.text.depth == 2


def test_names_of_answers_travel(tmp_path: Path) -> None:
    saved("ViltForQuestionAnswering", tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    names = ["yes", "no", "2", "red", "a dog"]
    config["id2label"] = {str(number): name for number, name in enumerate(names)}
    file.write_text(json.dumps(config))
    loaded = load_foreign(tmp_path / "theirs")
    head: Any = loaded.model.head
    assert head.classes == tuple(names)
    assert head.soft
    written, _ = export_transformers(tmp_path / "ours", loaded)
    assert transformers.ViltConfig.from_pretrained(written).id2label[3] == "red"
    larger: Any = load_any(written, image_size=96).model
    assert set(load_any(written, image_size=96).meta["resized"]) == {"inner.vilt.pictures.positions"}
    with torch.no_grad():
        assert larger.classify([torch.randn(2, 3, 96, 96)], ids(loaded)[0]).shape == (2, 5)
    given = tmp_path / "names.json"
    given.write_text(json.dumps({name: number for number, name in enumerate("vwxyz")}))
    renamed: Any = load_foreign(tmp_path / "theirs", classes=given).model
    assert renamed.head.classes == tuple("vwxyz")
    given.write_text(json.dumps(["one"]))
    with pytest.raises(CheckpointError, match="the head has 5 answers, 1 names are given"):
        load_foreign(tmp_path / "theirs", classes=given)


def test_pictures_are_prepared_as_the_files_say(tmp_path: Path) -> None:
    saved("CLIPModel", tmp_path)
    assert load_foreign(tmp_path).config.image.resize == "center"
    said = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    image = load_foreign(tmp_path).config.image
    assert (image.mean, image.std, image.resize) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "squash")


@pytest.mark.parametrize(
    ("cut", "resize", "crop"),
    [
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, "center", 0.8),
        ({"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}, "squash", 0.8),
        ({"size": 32, "crop_size": 32}, "center", 1.0),  # as older versions wrote it
    ],
)
def test_what_is_cut_out_of_a_picture(cut: Any, resize: str, crop: float, tmp_path: Path) -> None:
    """As their image processor does it, up to the rounding of one resize in place of resize and cut."""
    saved("CLIPModel", tmp_path)
    said = {"do_center_crop": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, **cut}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    loaded = load_foreign(tmp_path)
    image = loaded.config.image
    assert (image.resize, image.crop) == (resize, crop)
    assert load_foreign(export_transformers(tmp_path / "ours", loaded)[0]).config == loaded.config
    picture = Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).convert("RGB")
    shown = image.transform()(picture)
    size = cut["size"] if isinstance(cut["size"], dict) else {"shortest_edge": cut["size"]}
    side = size.get("shortest_edge") or size["height"]
    wide = side * 90 // 60 if "shortest_edge" in size else side
    resized = picture.resize((wide, side), Image.Resampling.BICUBIC)
    left, upper = (wide - 32) // 2, (side - 32) // 2
    expected = np.asarray(resized.crop((left, upper, left + 32, upper + 32)))
    assert np.abs(shown.astype(int) - expected).mean() < 2
    assert np.abs(shown.astype(int) - np.asarray(picture.resize((32, 32)))).mean() > 4


def test_classes_of_pictures_keep_their_names(tmp_path: Path) -> None:
    saved("BeitForImageClassification", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["id2label"] = {str(number): name for number, name in enumerate(["cat", "crane", "dog", "crane", "fox"])}
    file.write_text(json.dumps(config))
    (tmp_path / "vocab.txt").unlink()  # nothing is read
    loaded = load_foreign(tmp_path)
    head: Any = loaded.model.head
    assert head.classes == ("cat", "crane (1)", "dog", "crane (3)", "fox")
    assert loaded.words is None
    again = native.load(native.export(tmp_path / "ours", loaded.model, loaded.words, loaded.meta))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = [model.classify([images], TextBatch.of([[], []])) for model in (loaded.model, again.model)]  # type: ignore[operator]
    assert torch.equal(*logits)
    larger: Any = load_any(tmp_path, image_size=48)
    assert set(larger.meta["resized"]) == {f"inner.body.relative.{layer}.table" for layer in range(2)}
    with torch.no_grad():
        assert larger.model.classify([torch.randn(2, 3, 48, 48)], TextBatch.of([[], []])).shape == (2, 5)


def test_what_transformers_cannot_express_is_refused(tmp_path: Path) -> None:
    for family, said in (("albef", "no class for this albef"), ("coca", "no class for this coca")):
        _, path = official.write(family, tmp_path)
        with pytest.raises(CheckpointError, match=said):
            export_transformers(tmp_path / "out", load_foreign(path))
    _, path = official.write("vilt", tmp_path)  # the published one has two epsilons
    with pytest.raises(CheckpointError, match=r"ViltForMaskedLM cannot express this model's text_norm_eps: 1e-12"):
        export_transformers(tmp_path / "out", load_foreign(path))
    _, path = official.write("blip", tmp_path)
    loaded = load_foreign(path)
    assert kinds(loaded) == ["matching", "captioning"]
    with pytest.raises(CheckpointError, match="kind 'words' is none of matching, captioning"):
        export_transformers(tmp_path / "out", loaded, "words")
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="is no model of transformers: choose another folder"):
        export_transformers(tmp_path / "mine", loaded)
    _, left_out = export_transformers(tmp_path / "out", loaded)
    assert "temperature" in left_out
    assert "lm_head.bias" in left_out
