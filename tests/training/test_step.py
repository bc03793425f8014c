"""Gradients do not depend on how a batch is divided among parts and processes."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from imglish.data.batch import Batch, MaskedTexts, TextBatch
from imglish.data.loader import training_batches
from imglish.models.capabilities import MissingCapabilityError
from imglish.nn.segments import Segments
from imglish.training.config import Recipe
from imglish.training.setup import gather_materials, make_teacher, new_model, pair_dataset
from imglish.training.step import Stepper, StepSettings, split
from imglish.training.trainer import train
from tests.ranks import run_ranks
from tests.training.support import final_state, recipe, records


def prepare(family: str, **model: Any) -> tuple[torch.nn.Module, Any, Batch]:
    """Model, teacher and one batch of 8 pairs, two of them of one picture."""
    settings = recipe("unused", family, tokenizer={"append_sep": True})
    settings.model.update(model)
    materials = gather_materials(settings, records(), None, None)
    made = new_model(materials, seed=3)
    batch = next(training_batches(pair_dataset(settings, materials), 8, seed=1))[0]
    batch.image_ids[5] = batch.image_ids[1]
    return made, make_teacher(made, materials), batch


def gradients(family: str, parts: int, alpha: float = 0.4, **model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    made, teacher, batch = prepare(family, **model)
    if teacher is not None:
        teacher.alpha = alpha
    losses = Stepper(made, teacher, StepSettings(parts, seed=5, autocast=False))(batch, step=0)
    if teacher is not None:
        teacher.enqueue()
        losses["queue"] = teacher.queue.image.clone()
    return losses, {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def close(left: dict[str, Any], right: dict[str, Any], rtol: float = 1e-4) -> None:
    assert left.keys() == right.keys()
    for name in left:
        scale = float(right[name].abs().max())
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=1e-6 + 1e-4 * scale, msg=name)


def test_split_divides_every_part_of_a_batch() -> None:
    _, _, batch = prepare("albef")
    parts = split(batch, 4)
    assert [len(part) for part in parts] == [2] * 4
    assert batch.masked is not None
    labels = []
    for number, part in enumerate(parts):
        assert part.keys == batch.keys[2 * number : 2 * number + 2]
        assert part.masked is not None
        torch.testing.assert_close(part.masked.ids.shape, part.texts.ids.shape)
        unmasked = part.masked.ids.clone()
        unmasked[part.masked.rows] = part.masked.labels
        assert torch.equal(unmasked, part.texts.ids)
        labels.append(part.masked.labels)
    assert torch.equal(torch.cat(labels), batch.masked.labels)
    with pytest.raises(ValueError, match="does not divide"):
        split(batch, 3)


@pytest.mark.parametrize("loss", ["itc", "siglip", "hinge"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_clip_equals_one_batch(parts: int, loss: str) -> None:
    bias = {"logit_bias": -2.0} if loss == "siglip" else {}
    whole_losses, whole = gradients("clip", 1, loss=loss, **bias)
    losses, accumulated = gradients("clip", parts, loss=loss, **bias)
    close(losses, whole_losses)
    close(accumulated, whole)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_accumulated_albef_contrast_equals_one_batch(dropout: float) -> None:
    """ITC alone: exact; with dropout the cached and the second pass must draw alike."""
    itc = {"itm": False, "mlm": False, "dropout": dropout}
    losses, accumulated = gradients("albef", 4, **itc)
    if dropout == 0:
        whole_losses, whole = gradients("albef", 1, **itc)
        close(losses, whole_losses)
        close(accumulated, whole)
    again_losses, again = gradients("albef", 4, **itc)
    assert all(torch.equal(accumulated[name], again[name]) for name in again)
    assert torch.equal(losses["itc"], again_losses["itc"])


EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "albef without ITM": ("albef", {"itm": False}),
    "albef without ITC and ITM": ("albef", {"itc": False, "itm": False}),
    "blip without ITM": ("blip", {"itm": False}),
    "blip with a prompt, captioning alone": ("blip", {"itc": False, "itm": False, "prompt": "a picture of the "}),
    "coca": ("coca", {}),
    "vilt": ("vilt", {}),
    "vilt in one forward": ("vilt", {"one_forward": True}),
    "vlmo without ITM": ("vlmo", {"itm": False}),
}


@pytest.mark.parametrize("name", EXACT)
def test_accumulated_losses_and_gradients_are_those_of_the_whole_batch(name: str) -> None:
    """Of every objective but the ITM with hard negatives, which are drawn within a part. Means over words are the
    whole's, though one part has more of them than the other."""
    family, model = EXACT[name]
    (whole_losses, whole), (losses, accumulated) = (gradients(family, parts, **model) for parts in (1, 2))
    exact = [key for key in whole_losses if not key.startswith("metric/")]
    close({key: losses[key] for key in exact}, {key: whole_losses[key] for key in exact})
    close(accumulated, whole)
    _, _, batch = prepare(family, **model)
    words = [part.masked_words or part.texts.segments.total for part in split(batch, 2)]
    assert words[0] != words[1]


def test_split_divides_the_masks_of_several_captions_a_picture() -> None:
    batch = several_captions()
    parts = split(batch, 2)
    assert batch.masked is not None
    for part in parts:
        assert part.masked is not None
        assert len(part.masked.counts) == len(part.texts) == 4
        unmasked = part.masked.ids.clone()
        unmasked[part.masked.rows] = part.masked.labels
        assert torch.equal(unmasked, part.texts.ids)
        assert part.mean(lambda b: b.masked_words) == batch.masked_words / 2 == 7 / 2


def several_captions() -> Batch:
    """4 pictures with two captions of three tokens each, the k-th of which has k % 3 masked ones."""
    counts = tuple(k % 3 for k in range(8))
    texts = TextBatch(torch.arange(24), Segments.equal(8, 3))
    rows = torch.tensor([3 * text + k for text, count in enumerate(counts) for k in range(count)])
    masked = MaskedTexts(texts.ids.index_fill(0, rows, 99), rows, texts.ids[rows], counts)
    return Batch(torch.zeros(4, 3, 8, 8), texts, torch.arange(4), torch.zeros(4, 2), masked, captions=2)


def test_accumulation_with_all_objectives_keeps_the_contrastive_value() -> None:
    whole, _ = gradients("albef", 1)
    parts, accumulated = gradients("albef", 2)
    assert parts.keys() == whole.keys()
    torch.testing.assert_close(parts["itc"], whole["itc"])
    torch.testing.assert_close(parts["queue"], whole["queue"])
    assert all(torch.isfinite(gradient).all() for gradient in accumulated.values())


DIVISIONS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "clip in two parts": ("clip", 2, {}),
    "albef": ("albef", 1, {}),
    "albef's ITC in two parts": ("albef", 2, {"itm": False, "mlm": False}),
}


def on_rank(rank: int, folder: str) -> dict[str, Any]:
    """Everything that needs two processes, in one start of them: gradients, then whole runs that are stopped."""
    found: dict[str, Any] = {}
    for name, (family, parts, model) in DIVISIONS.items():
        made, teacher, batch = prepare(family, **model)
        if teacher is not None:
            teacher.alpha = 0.4
        mine = split(batch, 2)[rank]
        stepper = Stepper(made, teacher, StepSettings(parts, seed=5, autocast=False), probe=mine)
        stepper(mine, step=0)
        grads = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
        found[name] = {"grads": grads, "idle": stepper.idle}
    real = Stepper.__call__

    def interrupted(self: Stepper, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        if step == 6 and rank == 1:  # one process alone is told to stop
            signal.raise_signal(signal.SIGTERM)
        return real(self, batch, step)

    Stepper.__call__ = interrupted  # type: ignore[method-assign]
    for family in ("clip", "albef"):
        result = train(validated(f"{folder}/{family}-two", family), records(), records(10))
        found[f"run of {family}"] = (result.step, result.stopped)
    return found


def validated(output: str, family: str) -> Recipe:
    return recipe(output, family, validation={"every": 1.0}, average=0.9)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(2, on_rank, str(folder))


@pytest.mark.parametrize("name", DIVISIONS)
def test_two_processes_give_the_gradients_of_one(two_processes: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    family, _, model = DIVISIONS[name]
    _, expected = gradients(family, 1, **model)
    found = [one[name] for one in two_processes[1]]
    for one in found:
        close(one["grads"], expected)
    assert all(torch.equal(found[0]["grads"][name], found[1]["grads"][name]) for name in expected)
    assert any("itm_head" in name for name in found[0]["idle"]) == ("itm" in model)


@pytest.mark.parametrize("family", ["clip", "albef"])
def test_two_processes_train_like_one(
    tmp_path: Path, two_processes: tuple[Path, list[dict[str, Any]]], family: str
) -> None:
    """Two processes begin a run, agree to stop when one gets a signal, and a single one ends it."""
    folder, found = two_processes
    steps, stopped = zip(*(one[f"run of {family}"] for one in found), strict=True)
    assert steps[0] == steps[1]
    assert 7 <= steps[0] < 12
    assert stopped[1] == "SIGTERM"
    assert stopped[0] is not None
    one = train(validated(str(tmp_path / "one"), family), records(), records(10))
    two = train(validated(f"{folder}/{family}-two", family), records(), records(10))
    expected, state = final_state(tmp_path / "one"), final_state(f"{folder}/{family}-two")
    for name in expected:
        # keys' biases have no gradient but noise, which Adam blows up; they do not change what a model computes
        if name.startswith(("/model", "/teacher", "/average")) and not name.endswith(("qkv.bias", "kv.bias")):
            torch.testing.assert_close(state[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)
    for event, other in zip(one.events, two.events, strict=True):
        assert (event["event"], event["step"]) == (other["event"], other["step"])
        if event["event"] == "step":
            assert other["losses"] == pytest.approx(event["losses"], rel=1e-4)
        if event["event"] == "validation":
            assert other["towers"] == event["towers"]


def test_what_cannot_be_trained_is_said() -> None:
    with pytest.raises(MissingCapabilityError, match=r"training needs a model .* Families that do: albef, "):
        Stepper(torch.nn.Linear(2, 2), None, StepSettings(1, 0, autocast=False))
