"""What the golden tests of ALBEF and BLIP have in common: inputs, the contrast, hard negatives, what a step leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imglish.data.batch import Batch, MaskedTexts, TextBatch
from imglish.models.aligned import AlignedFusion
from imglish.models.capabilities import Embedded
from imglish.models.vit import ImageInput, VitConfig
from imglish.nn.segments import Segments
from imglish.objectives.itm import negative_weights
from imglish.objectives.momentum import MomentumTeacher
from tests.golden.support import Case, check, check_grad_norms, official_gradients


def vision_of(overrides: Any, image_size: int) -> VitConfig:
    """The vision Transformer of a case: ``vit_overrides`` is a dictionary, or a text that says there are none."""
    vit = overrides if isinstance(overrides, dict) else {}
    return VitConfig(
        image=ImageInput(image_size),
        patch=vit.get("patch_size", 16),
        width=vit.get("embed_dim", 768),
        depth=vit.get("depth", 12),
        heads=vit.get("num_heads", 12),
        mlp_ratio=vit.get("mlp_ratio", 4.0),
    )


def bert_of(bert: dict[str, Any]) -> dict[str, Any]:
    """Settings of ours from an official BERT configuration."""
    return {
        "vocab_size": bert["vocab_size"],
        "max_length": bert["max_position_embeddings"],
        "width": bert["hidden_size"],
        "depth": bert["num_hidden_layers"],
        "heads": bert["num_attention_heads"],
        "hidden": bert["intermediate_size"],
        "norm_eps": bert["layer_norm_eps"],
        "dropout": 0.0,
    }


def load_queue(case: Case, weights: dict[str, Tensor], teacher: MomentumTeacher[Any]) -> None:
    """Features of the fill rule in a full queue, at the official pointer."""
    queue = teacher.queue
    assert queue is not None
    queue.image.copy_(weights["image_queue"].T)
    queue.text.copy_(weights["text_queue"].T)
    queue.ids.copy_(case.inputs.get("initial_idx_queue", torch.full((1, queue.ids.shape[0]), -1))[0])
    pointer = weights["queue_ptr"] if "queue_ptr" in weights else weights["ptr_queue"]
    queue.pointer, queue.filled = int(pointer), queue.ids.shape[0]


def texts_of(ids: Tensor, mask: Tensor) -> TextBatch:
    return TextBatch(ids[mask.bool()], Segments.of(mask.sum(1).tolist()))


def masked_of(ids: Tensor, labels: Tensor, mask: Tensor) -> MaskedTexts:
    kept = labels[mask.bool()]
    rows = torch.nonzero(kept != -100).squeeze(1)
    counts = tuple(int(n) for n in ((labels != -100) & mask.bool()).sum(1))
    return MaskedTexts(ids[mask.bool()], rows, kept[rows], counts)


def valid_rows(padded: Tensor, mask: Tensor) -> Tensor:
    return padded[mask.bool()]


def check_rows(case: Case, name: str, rows: Tensor, mask: Tensor) -> None:
    """Packed ``rows`` against an output that is stored padded; where only every p-th value is stored, against those
    of them that are no padding."""
    padded = torch.zeros(*mask.shape, rows.shape[1])
    padded[mask.bool()] = rows.detach()
    how = case.meta["outputs"][name]
    step = 1 if how["stored"] == "full" else int(how["stored"].split("::")[1].rstrip("]"))
    real = mask.bool()[:, :, None].expand(padded.shape).reshape(-1)[::step]
    expected = case.outputs[name].reshape(-1)[real]
    torch.testing.assert_close(padded.reshape(-1)[::step][real], expected, rtol=0, atol=1e-4 * float(how["absmax"]))


@dataclass(frozen=True)
class Step:
    """One official training forward: its inputs, and the name that its outputs begin with."""

    case: Case
    prefix: str
    alpha: float

    @property
    def inputs(self) -> dict[str, Tensor]:
        given = self.case.inputs.items()
        return {name.removeprefix(self.prefix): value for name, value in given if name.startswith(self.prefix)}

    def batch(self, masked: MaskedTexts | None = None) -> Batch:
        """The batch; where it has no image ids, other ones than any in the queue."""
        inputs = self.inputs
        texts = texts_of(inputs["text.input_ids"], inputs["text.attention_mask"])
        count = len(texts)
        ids = inputs["idx"] if "idx" in inputs else torch.arange(count) + 10**6 * (1 + len(self.prefix))
        return Batch(inputs["image"], texts, ids, torch.zeros(count, 2), masked)

    def draws(self, image_to_text: Tensor, text_to_image: Tensor, ids: Tensor) -> Tensor:
        """Numbers by which our draw, from similarities ``(B, B)``, gives the negatives that the case prescribes."""
        pictures, texts = (negative_weights(s, ids, ids) for s in (text_to_image, image_to_text))
        inputs = self.inputs
        chosen = (pictures, inputs["neg_image_idx"]), (texts, inputs["neg_text_idx"])
        return torch.stack([draws_for(weights, wanted) for weights, wanted in chosen], dim=1)

    def check(self, name: str, value: Tensor) -> None:
        check(self.case, self.prefix + name, value)

    def check_known(self, found: dict[str, Tensor]) -> None:
        """Those of ``found`` that the case has as outputs."""
        for name, value in found.items():
            if self.prefix + name in self.case.outputs:
                self.check(name, value)

    def check_weights(self, name: str, similarity: Tensor, ids: Tensor, added: float = 0.0) -> None:
        """Probabilities of the negatives; officially zeroed after the softmax, after ``added`` was added to each."""
        expected = (self.case.outputs[self.prefix + name] - added).clamp(min=0)
        expected = expected / expected.sum(1, keepdim=True)
        torch.testing.assert_close(negative_weights(similarity, ids, ids), expected, rtol=1e-3, atol=1e-4)


def draws_for(weights: Tensor, chosen: Tensor) -> Tensor:
    """Uniform numbers by which the inverse cumulative distribution gives just ``chosen``."""
    upper = weights.double().cumsum(1)
    at = chosen[:, None].long()
    middle = upper.gather(1, at) - weights.double().gather(1, at) / 2
    return (middle / upper[:, -1:]).squeeze(1).float()


def check_towers(step: Step, model: AlignedFusion, batch: Batch, teacher: MomentumTeacher[Any]) -> Embedded:
    """Features of student and teacher and all similarities."""
    embedded = model.embed(batch, teacher)
    itc = model.distilled_itc(embedded, teacher)
    image_m, text_m = embedded.momentum()
    found = {
        "image_feat": embedded.image,
        "text_feat": embedded.text,
        "image_feat_m": image_m,
        "text_feat_m": text_m,
        "sim_i2t_m": itc.i2t_teacher,
        "sim_t2i_m": itc.t2i_teacher,
        "image_embeds": embedded.towers.tokens,
    }
    for name, value in (("sim_i2t", itc.i2t), ("sim_t2i", itc.t2i)):
        if step.case.meta["outputs"][step.prefix + name]["shape"] == list(value.shape):
            found[name] = value
    step.check_known(found)
    return embedded


def with_draws(step: Step, model: AlignedFusion, batch: Batch, embedded: Embedded) -> Batch:
    """The batch with numbers that draw the negatives of the case."""
    image_m, text_m = embedded.momentum()
    i2t, t2i = embedded.image @ text_m.T / model.temperature, embedded.text @ image_m.T / model.temperature
    return replace(batch, draws=step.draws(i2t, t2i, batch.image_ids))


def official_pairs(step: Step, count: int) -> tuple[list[int], list[int]]:
    """The rows of the official ITM pass: B positives, B (text b, drawn picture), B (drawn text, picture b)."""
    own, inputs = list(range(count)), step.inputs
    return own + inputs["neg_image_idx"].tolist() + own, own + own + inputs["neg_text_idx"].tolist()


def check_gradients(
    case: Case,
    model: torch.nn.Module,
    convert: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    """Norms of all gradients, and the gradients that are stored; ``convert(official, target)`` gives our names."""
    tied = {name: first for first, name in case.meta["ties"]}
    left_out = tied.keys() | set(case.meta["kept_official"])
    shapes = {name: shape for name, shape in case.shapes.items() if name not in left_out}
    target = {name: value.double() for name, value in model.state_dict().items()}

    def numbered(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        return convert(numbers | {name: numbers[first] for name, first in tied.items() if first in numbers}, target)

    found = official_gradients(numbered, shapes, model)
    check_grad_norms(case, {name: norm for name, norm in case.grad_norms.items() if name not in tied}, found)
    for name in case.outputs:
        if name.startswith("grad/"):
            gradient = found[name.removeprefix("grad/")]
            assert gradient is not None
            check(case, name, gradient)


def check_after(step: Step, teacher: MomentumTeacher[Any], official: dict[str, Tensor]) -> None:
    """The queue after the step, and the moved weights of the teacher under their official names."""
    case, queue = step.case, teacher.queue
    assert queue is not None
    step.check("after/image_queue", queue.image.T.contiguous())
    step.check("after/text_queue", queue.text.T.contiguous())
    pointer = "queue_ptr" if f"{step.prefix}after/queue_ptr" in case.outputs else "ptr_queue"
    assert queue.pointer == int(case.outputs[f"{step.prefix}after/{pointer}"])
    if f"{step.prefix}after/idx_queue" in case.outputs:
        assert torch.equal(queue.ids, case.outputs[f"{step.prefix}after/idx_queue"][0])
    for name in case.outputs:
        place = name.removeprefix(f"{step.prefix}ema/")
        if name.startswith(f"{step.prefix}ema/") and place in official:
            check(case, name, official[place].reshape(-1)[: case.outputs[name].numel()])
