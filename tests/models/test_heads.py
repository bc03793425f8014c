"""Heads on models of every family that has one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imglish.checkpoints import native
from imglish.checkpoints.loading import load_any
from imglish.data.batch import Batch, TextBatch
from imglish.data.pictures import picture_of, stack
from imglish.data.tasks.batch import Answers, TaskBatch
from imglish.data.tokenizers import Tokenizer
from imglish.generation.config import GenerationConfig
from imglish.generation.engine import generate
from imglish.models import registry
from imglish.models.albef_heads import AlbefAssignment
from imglish.models.answering import RankRule
from imglish.models.capabilities import Answers as Answering
from imglish.models.capabilities import Classifies, EncodedImages, MissingCapabilityError
from imglish.models.depths import depths
from imglish.models.heads import AnswerModel, AssignmentModel, HeadConfig, after_assignment, for_assignment, with_head
from tests.training.support import MODELS

torch.set_num_threads(1)
NAMES = ("yes", "no", "perhaps")


def base(family: str, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {k: v for k, v in MODELS[family].items() if k != "name"} if family in MODELS else {}
    whole = registry.to_dict(registry.named(f"{family}-tiny"))

    def laid(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
        return {k: laid(v, over[k]) if isinstance(over.get(k), dict) else over.get(k, v) for k, v in under.items()}

    return registry.from_dict(family, laid(whole, settings | changes)).build().eval()


def pictures_of(model: Any, count: int, seed: int) -> Any:
    transform, rng = model.config.image.transform(), np.random.default_rng(seed)
    drawn = [Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)) for _ in range(count)]
    return stack([picture_of(transform(one), transform) for one in drawn])


TEXTS = TextBatch.of([[2, 5, 6, 7], [2, 8], [2, 9, 9]])


@pytest.mark.parametrize("family", ["albef", "beit3", "blip", "vilt", "vlmo"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_head_reads_all_pictures_and_each_text_alone(family: str, count: int) -> None:
    model = with_head(base(family, vocab_size=20), HeadConfig("nlvr2", classes=NAMES, pictures=count)).eval()
    assert isinstance(model, Classifies)
    images = [pictures_of(model, 3, number) for number in range(count)]
    with torch.no_grad():
        logits = model.classify(images, TEXTS)
        alone = model.classify([some[1:2] for some in images], TextBatch.of([[2, 8]]))
        assert logits.shape == (3, 3)
        torch.testing.assert_close(logits[1:2], alone, rtol=1e-4, atol=1e-5)
        for number in range(count):
            other = [pictures_of(model, 3, 9) if n == number else some for n, some in enumerate(images)]
            assert not torch.allclose(model.classify(other, TEXTS), logits)
    heads, names = model.head_parameters(), dict(model.named_parameters())
    assert 0 < len(heads) < len(names)
    labels = torch.tensor([0, 2, 1])
    model.losses(TaskBatch(tuple(images), TEXTS, labels))["classes"].backward()
    assert all(names[name].grad is not None for name in heads)


@pytest.mark.parametrize(("family", "form"), [("albef", "classes"), ("vilt", "classes"), ("blip", "answers")])
def test_a_head_is_exported_and_loaded(family: str, form: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train_wordpiece(["a red hat", "two blue shoes"], 60, append_sep=True, max_length=16)
    tokenizer = tokenizer.with_special(("[DEC]", "[ENC]")) if family == "blip" else tokenizer
    head = HeadConfig(
        "vqa" if form == "answers" else "nlvr2", form, NAMES, pictures=1 if form == "answers" else 2, start=2
    )
    model = with_head(base(family, vocab_size=tokenizer.vocab_size), head).eval()
    again = native.load(native.export(tmp_path / "model", model, tokenizer)).model
    assert again.head == head
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    description = tmp_path / "model" / "imglish.json"
    description.write_text(description.read_text().replace('"pictures"', '"piktures"'))
    with pytest.raises(native.CheckpointError, match=r"imglish\.json: the head cannot be used"):
        native.load(tmp_path / "model")


@pytest.mark.parametrize("family", ["beit", "beit3"])
def test_a_head_for_pictures_alone(family: str, tmp_path: Path) -> None:
    head = HeadConfig("classification", classes=NAMES, texts=False, smoothing=0.1)
    first = base(family)
    if family == "beit":
        torch.nn.init.normal_(first.relative.table)
    kept = {name: value.clone() for name, value in first.state_dict().items()}
    images = pictures_of(first, 3, 0)
    model = with_head(first, head).eval()
    assert isinstance(model, Classifies)
    held = model.state_dict()
    for name, value in kept.items():
        ours = f"inner.body.{name.removeprefix('body.')}"
        if ours in held:
            assert torch.equal(held[ours], value), name
    if family == "beit":  # every layer begins with the table that they shared, and then has its own
        for layer in range(model.config.depth):
            assert torch.equal(held[f"inner.body.relative.{layer}.table"], kept["relative.table"])
    texts = TextBatch.of([[], [], []])
    with torch.no_grad():
        logits = model.classify([images], texts)
        assert logits.shape == (3, 3)
        torch.testing.assert_close(logits[1:2], model.classify([images[1:2]], TextBatch.of([[]])), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits, model.classify([pictures_of(model, 3, 5)], texts))
    labels = torch.tensor([0, 2, 1])
    found = model.losses(TaskBatch((images,), texts, labels))["classes"]
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert {name.split(".")[1] for name in model.head_parameters()} == {"norm", "head"}
    levels = depths(model)
    if family == "beit":
        assert levels["inner.body.relative.0.table"] == levels["inner.body.blocks.0.ffn.all.fc1.weight"] > 1
        assert levels[f"inner.body.relative.{model.config.depth - 1}.table"] == 1
        for layer in model.inner.body.relative:
            assert layer.table.grad is not None
    assert levels["inner.head.weight"] == 0
    again = native.load(native.export(tmp_path / "model", model, None))
    assert again.words is None
    assert again.model.head == head
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_heads_that_cannot_be() -> None:
    for wrong, said in (
        ({"texts": False, "pictures": 2}, "one picture to choose a class for"),
        ({"texts": False, "form": "answers"}, "one picture to choose a class for"),
        ({"smoothing": 0.1, "soft": True}, "only a choice of one class is smoothed"),
        ({"smoothing": 1.0}, "below 1"),
    ):
        with pytest.raises(ValueError, match=said):
            HeadConfig("classification", classes=NAMES, **wrong)
    with pytest.raises(MissingCapabilityError, match=r"a model that reads pictures, .* have: beit, beit3"):
        with_head(base("clip"), HeadConfig("classification", classes=NAMES, texts=False))


@pytest.mark.parametrize(("family", "pictures"), [("beit3", 1), ("beit3", 2), ("vilt", 1)])
def test_a_head_travels_to_another_size(family: str, pictures: int, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train_wordpiece(["a red hat", "two blue shoes"], 60, append_sep=True, max_length=16)
    head = HeadConfig("nlvr2", classes=NAMES, pictures=pictures)
    model = with_head(base(family, vocab_size=tokenizer.vocab_size), head).eval()
    path = native.export(tmp_path / "model", model, tokenizer)
    size = 2 * model.config.image.size
    larger = load_any(path, image_size=size).model
    assert larger.config.image.size == size  # type: ignore[union-attr]
    images = [pictures_of(larger, 3, number) for number in range(pictures)]
    with torch.no_grad():
        assert larger.classify(images, TEXTS).shape == (3, 3)  # type: ignore[operator]


def test_families_without_a_head_are_told_who_has_one() -> None:
    with pytest.raises(MissingCapabilityError, match="albef, beit3, blip, vilt, vlmo"):
        with_head(base("clip"), HeadConfig("vqa", classes=NAMES))
    with pytest.raises(MissingCapabilityError, match=r"writes answers.*albef, blip"):
        with_head(base("vilt"), HeadConfig("vqa", "answers", NAMES))
    with pytest.raises(ValueError, match="a choice needs two"):
        HeadConfig("vqa", classes=("yes", "yes"))


def test_new_token_types_begin_as_the_first_pictures() -> None:
    model = with_head(base("vilt"), HeadConfig("nlvr2", classes=NAMES, pictures=3))
    table = model.inner.vilt.types.weight
    assert len(table) == 4
    assert torch.equal(table[1], table[3])
    assert model.config.types == 4


def answering(family: str) -> AnswerModel:
    model = with_head(base(family, vocab_size=30), HeadConfig("vqa", "answers", NAMES, start=2)).eval()
    assert isinstance(model, AnswerModel)
    assert isinstance(model, Answering)
    return model


CANDIDATES = [[11, 3], [12, 13, 3], [12, 13, 14, 3], [12, 3], [15, 16, 3], [11, 12, 13, 3]]


@pytest.mark.parametrize("family", ["albef", "blip"])
def test_ranking_gives_the_log_probability_of_each_whole_answer(family: str) -> None:
    model = answering(family)
    start = model.inner.decoder.start
    with torch.no_grad():
        questions = model.questions([pictures_of(model, 3, 0)], TEXTS)
        numbers, scores = model.rank(questions, CANDIDATES, RankRule(0), keep=6)
        texts = TextBatch.of([[start, *candidate] for _ in range(3) for candidate in CANDIDATES])
        logits, targets, owner = model.inner.decoder.written(questions, Answers(texts, (6, 6, 6), torch.ones(18)))
    of_token = logits.log_softmax(1).gather(1, targets[:, None])[:, 0].double().numpy()
    whole = np.bincount(owner, of_token).reshape(3, 6)
    assert np.allclose(np.sort(whole, 1)[:, ::-1], scores, atol=1e-4)
    assert np.allclose(np.take_along_axis(whole, numbers, 1), scores, atol=1e-4)
    few, _ = model.rank(questions, CANDIDATES, RankRule(2), keep=6)
    assert few.shape == (3, 2)


def test_the_rules_of_the_published_code_rank_otherwise() -> None:
    model = answering("albef")
    with torch.no_grad():
        questions = model.questions([pictures_of(model, 3, 0)], TEXTS)
        plain, twice, smooth = (
            model.rank(questions, CANDIDATES, rule, keep=6)[1].sum()
            for rule in (RankRule(0), RankRule(0, first_twice=True), RankRule(0, smoothing=0.1))
        )
    assert len({round(float(x), 3) for x in (plain, twice, smooth)}) == 3


def test_a_learned_answer_is_ranked_first_and_written() -> None:
    model = answering("blip").train()
    batch = TaskBatch(
        (pictures_of(model, 3, 0),),
        TEXTS,
        answers=Answers(
            TextBatch.of([[model.inner.decoder.start, *c] for c in CANDIDATES[:3]]), (1, 1, 1), torch.ones(3)
        ),
    )
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        model.losses(batch)["answers"].backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        states = model.questions(batch.images, TEXTS)
        assert model.rank(states, CANDIDATES)[0][:, 0].tolist() == [0, 1, 2]
        encoded = EncodedImages(torch.zeros(3, 0), states)
        start, config = model.inner.decoder.start, GenerationConfig(beams=2, max_length=6)
        found = generate(model, encoded, [[start]] * 3, 3, config, ["a", "b", "c"])
    assert [list(best.ids) for (best,) in found] == [c[:-1] for c in CANDIDATES[:3]]


@pytest.mark.parametrize("form", ["classes", "answers"])
def test_the_momentum_copy_takes_part(form: Any) -> None:
    head = HeadConfig("vqa", form, NAMES, alpha=0.4, start=2)
    model = with_head(base("albef", vocab_size=30), head)
    teacher = model.make_teacher()
    assert teacher is not None
    answers = Answers(TextBatch.of([[2, *c] for c in CANDIDATES[:3]]), (1, 1, 1), torch.ones(3))
    batch = TaskBatch((pictures_of(model, 3, 0),), TEXTS, torch.tensor([0, 1, 2]), answers)
    teacher.at(0)
    hard = float(model.losses(batch, teacher)[form].detach())
    teacher.at(1)
    assert teacher.alpha == pytest.approx(0.4)
    assert float(model.losses(batch, teacher)[form].detach()) != pytest.approx(hard)
    assert with_head(base("albef"), dataclasses.replace(head, alpha=0.0)).make_teacher() is None


def test_text_assignment_gives_each_case_a_third_and_never_the_captions_own_picture_as_another() -> None:
    inner = AlbefAssignment(base("albef"))
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(3000, 8, generator=generator), dim=1)
    ids = torch.arange(3000) // 2  # two captions a picture
    first, second, case = inner.assign(features, ids, torch.rand(3000, 2, generator=generator))
    own = torch.arange(3000)
    assert all(abs(int((case == c).sum()) - 1000) < 120 for c in range(3))
    assert torch.equal(first[case == 0], own[case == 0])
    assert torch.equal(second[case == 1], own[case == 1])
    assert (ids[second[case == 0]] != ids[case == 0]).all()
    assert (ids[first[case == 1]] != ids[case == 1]).all()
    for chosen in (first, second):
        assert (ids[chosen[case == 2]] != ids[case == 2]).all()
    assert (first[case == 2] != second[case == 2]).all()


def test_nlvr2_begins_with_the_layers_of_text_assignment() -> None:
    model = for_assignment(base("albef", vocab_size=30))
    assert isinstance(model, AssignmentModel)
    batch = Batch(pictures_of(model, 3, 0), TEXTS, torch.arange(3), torch.rand(3, 2))
    model.losses(batch)["assignment"].backward()
    held = {name: value.clone() for name, value in model.inner.reasoning.albef.state_dict().items()}
    next_one = after_assignment(model, HeadConfig("nlvr2", classes=("false", "true"), pictures=2))
    assert all(torch.equal(value, next_one.inner.albef.state_dict()[name]) for name, value in held.items())
    assert next_one.classify([batch.squares, batch.squares], TEXTS).shape == (3, 2)
    with pytest.raises(MissingCapabilityError, match="of ALBEF for NLVR2"):
        for_assignment(base("vilt"))
