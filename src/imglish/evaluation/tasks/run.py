"""A task measured: every example answered once, written down as it is answered, then scored."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from imglish.data.batch import TextBatch
from imglish.data.errors import DataError, Errors, Problem, printable
from imglish.data.images import ImageError, decode
from imglish.data.pictures import Picture, picture_of, stack
from imglish.data.tasks.examples import Example
from imglish.evaluation.encoding import DEFAULT_MACHINE, Encodes, Machine, device_of
from imglish.evaluation.retrieval import text_table
from imglish.evaluation.sharing import blocks, mine
from imglish.evaluation.tasks.base import Task, best_constant
from imglish.generation.stream import read_ahead
from imglish.models.capabilities import Answers, Classifies, require
from imglish.models.heads import HeadConfig
from imglish.objectives.gather import rank, world_size

SHOWN = 5  # answers of an example that are kept
GROUPS = 20  # rows of groups in a table


@dataclass(frozen=True)
class Said:
    """What a model says to an example: its best answers with their probabilities (or scores), best first."""

    key: str
    answers: tuple[tuple[str, float], ...]

    @property
    def answer(self) -> str:
        return self.answers[0][0]

    @property
    def confidence(self) -> float:
        return self.answers[0][1]


@dataclass(frozen=True)
class TaskResult:
    """metrics, groups: in percent; constant: the answer that is right most often, with its metrics; unreachable:
    examples whose answers are none of the model's; seconds: wall clock."""

    task: str
    examples: int
    metrics: dict[str, float]
    groups: dict[str, float]
    constant: tuple[str, dict[str, float]]
    unreachable: int
    notes: tuple[str, ...]
    seconds: float
    said: tuple[Said, ...] = field(repr=False, compare=False)
    of_example: dict[str, float] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the predictions."""
        whole = asdict(self)
        return {name: value for name, value in whole.items() if name not in ("said", "of_example")}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The table as headers and rows of text; of more than 20 groups the 20 with the lowest scores."""
        answer, constant = self.constant
        rows = [["model", *(f"{self.metrics[name]:.2f}" for name in self.metrics)]]
        rows += [[f"always “{answer}”", *(f"{constant[name]:.2f}" for name in self.metrics)]]
        blank = [""] * (len(self.metrics) - 1)
        shown = sorted(self.groups, key=self.groups.__getitem__)[:GROUPS] if len(self.groups) > GROUPS else self.groups
        rows += [[f"model, {kind or 'no kind'}", f"{self.groups[kind]:.2f}", *blank] for kind in shown]
        return ["percent", *self.metrics], rows

    def text(self) -> str:
        """Table and facts for a terminal."""
        return "\n".join([f"{self.task}: {self.examples} examples", text_table(*self.rows()), *self.notes])


def evaluate_task(
    model: nn.Module,
    tokenizer: Encodes | None,
    task: Task,
    examples: Sequence[Example],
    machine: Machine = DEFAULT_MACHINE,
    *,
    answer: Answerer | None = None,
    predictions: Path | None = None,
    errors: Errors | None = None,
    load: Callable[[Path], Picture] | None = None,
    how: str = "",
    **rule: Any,
) -> TaskResult:
    """Answer ``examples`` and score the answers; under ``torchrun`` all ranks share the work.

    tokenizer: None for a task without texts. answer: how the model answers (default: by its classes); predictions: a
    JSONL file that receives each answer as soon as it is known, one file a rank; those that lie there are kept, so the
    same call continues. Examples whose pictures cannot be read are left out and counted in ``errors``. how: what else
    the answers depend on, in a word; rule: of the task's metric. Raises ``MissingCapabilityError`` for a model without
    a head for the task, :class:`DataError` for examples without answers.
    """
    if lacking := [example.place for example in examples if not example.answers]:
        raise DataError(f"{len(lacking)} examples have no answers to compare with; the first: {lacking[0]}")
    if not isinstance(model, Answers):
        require(model, Classifies, task.title)
    assert isinstance(model, (Classifies, Answers))
    beyond = out_of_reach(model.head, task, examples)
    began, training = time.perf_counter(), model.training
    model.eval()
    try:
        found, lost = _answers(model, tokenizer, examples, machine, answer or classes, predictions, load, how)
    finally:
        model.train(training)
    errors = Errors(what="examples") if errors is None else errors
    errors.extend_checked(lost.values(), len(examples))
    kept = [example for example in examples if example.key in found]
    if not kept:
        raise ImageError(f"no example can be answered ({errors.summary()})")
    scores = task.score(kept, {key: said.answer for key, said in found.items()}, **rule)
    constant = best_constant(kept, task)
    of_constant = task.score(kept, dict.fromkeys(found, constant), **rule).metrics
    unreachable = sum(example.key in beyond for example in kept)
    notes = list(scores.notes)
    if len(scores.groups) > GROUPS:
        notes.append(f"the {GROUPS} lowest of {len(scores.groups)} groups are shown, the JSON has all")
    if unreachable:
        notes.append(
            f"{unreachable} of {len(kept)} examples have no answer among the model's {len(model.head.classes)}"
        )
    if lost:
        notes.append(f"{len(lost)} examples are left out: their pictures cannot be read")
    return TaskResult(
        task.name,
        len(kept),
        scores.metrics,
        scores.groups,
        (constant, of_constant),
        unreachable,
        tuple(notes),
        time.perf_counter() - began,
        tuple(found[example.key] for example in kept),
        scores.of_example,
    )


def out_of_reach(head: HeadConfig, task: Task, examples: Sequence[Example]) -> set[str]:
    """Keys of the examples none of whose answers is among those of ``head``. Raises :class:`DataError` where these are
    all examples of a choice among classes."""
    known, rights = set(head.classes), task.weights if head.form == "classes" else task.written
    found = {example.key for example in examples if known.isdisjoint(rights(example))}
    if head.form == "classes" and examples and len(found) == len(examples):
        raise DataError(
            f"no example has an answer among the model's {len(known)}, which are {_some(known)}; the examples' are "
            f"{_some({answer for example in examples for answer in example.answers})}. Classes without names are "
            "numbers: name them as the data do (imglish convert --classes FILE)"
        )
    return found


def _some(names: set[str]) -> str:
    shown = ", ".join(printable(name, 30) for name in sorted(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown


Answerer = Callable[[Any, Sequence[Any], TextBatch], list[tuple[tuple[str, float], ...]]]
"""A model, the pictures of B texts (first, second, ...) and the texts -> the best answers of each."""


def classes(model: Any, images: Sequence[Any], texts: TextBatch) -> list[tuple[tuple[str, float], ...]]:
    """The most probable classes; with soft labels each has a probability of its own."""
    logits = model.classify(images, texts).double()
    chances = logits.sigmoid() if model.head.soft else logits.softmax(1)
    best = chances.topk(min(SHOWN, logits.shape[1]), dim=1)
    names = model.head.classes
    return [
        tuple((names[int(number)], float(chance)) for number, chance in zip(numbers, values, strict=True))
        for numbers, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _answers(
    model: nn.Module,
    tokenizer: Encodes | None,
    examples: Sequence[Example],
    machine: Machine,
    answer: Answerer,
    predictions: Path | None,
    load: Callable[[Path], Picture] | None,
    how: str,
) -> tuple[dict[str, Said], dict[str, Problem]]:
    """What is said to every example, and whose pictures cannot be read; by all ranks together."""
    before: dict[str, Said] = {}
    with ExitStack() as stack_of_files:
        file = None
        if predictions is not None:
            header = {"model": _digest(model), "examples": _examples_digest(examples), "how": how}
            before = _read(predictions, header)
            if world_size() > 1:
                dist.barrier()  # all have read before anyone writes
            name = predictions if rank() == 0 else predictions.with_suffix(f".{rank()}{predictions.suffix}")
            file = stack_of_files.enter_context(_opened(name, header))
        parts = blocks(len(examples), machine.image_block)
        own = [part for part in mine(len(parts)) if any(examples[i].key not in before for i in parts[part])]
        found: dict[str, Said] = {}
        lost: dict[str, Problem] = {}
        wanted = [examples[i] for part in own for i in parts[part]]
        with machine.bar(len(wanted), "answers", "example") as bar:
            for some, said in _stream(model, tokenizer, wanted, machine, answer, load):
                for example, one in zip(some, said, strict=True):
                    bar.update()
                    if isinstance(one, ImageError):
                        lost[example.key] = Problem(example.key, one.reason, f"{example.place}: {one}")
                        continue
                    found[example.key] = one
                    if file is not None and example.key not in before:
                        line = {"key": one.key, "answers": one.answers}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                        file.flush()
    if world_size() > 1:
        everyone: list[Any] = [None] * world_size()
        dist.all_gather_object(everyone, (found, lost))
        found = {key: one for part, _ in everyone for key, one in part.items()}
        lost = {key: problem for _, part in everyone for key, problem in part.items()}
    return before | found, lost


def _stream(
    model: Any,
    tokenizer: Encodes | None,
    examples: Sequence[Example],
    machine: Machine,
    answer: Answerer,
    load: Callable[[Path], Picture] | None,
) -> Iterator[tuple[Sequence[Example], list[Said | ImageError]]]:
    """Blocks of examples with what is said to them."""
    device, count = device_of(model), model.head.pictures
    transform = model.config.image.transform()

    def default(path: Path) -> Picture:
        return picture_of(transform(decode(path, name=path.name)), transform)

    one = load or default

    def pictures(example: Example) -> Any:
        return tuple(one(path) for path in example.images[:count])

    for some, loaded in read_ahead(examples, pictures, machine.image_block, machine.decoders):
        readable = [(e, p) for e, p in zip(some, loaded, strict=True) if not isinstance(p, ImageError)]
        said: dict[str, Said | ImageError] = {
            e.key: p for e, p in zip(some, loaded, strict=True) if isinstance(p, ImageError)
        }
        if readable:
            columns: Any = zip(*(p for _, p in readable), strict=True)
            images = [stack(column).to(device) for column in columns]
            asked = [e.text for e, _ in readable]
            texts = TextBatch.of([[] for _ in asked] if tokenizer is None else tokenizer.encode(asked)).to(device)
            with torch.no_grad(), machine.arithmetic(device):
                answers = answer(model, images, texts)
            said |= {e.key: Said(e.key, best) for (e, _), best in zip(readable, answers, strict=True)}
        yield some, [said[example.key] for example in some]


# ---- predictions on disk ---------------------------------------------------------------------------------------------


def _digest(model: nn.Module) -> str:
    """Of the weights: predictions of another model are none of this evaluation."""
    digest = blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _examples_digest(examples: Sequence[Example]) -> str:
    digest = blake2b(digest_size=16)
    for example in examples:
        digest.update(repr((example.key, example.text, [path.name for path in example.images])).encode())
    return digest.hexdigest()


def _read(file: Path, header: Mapping[str, str]) -> dict[str, Said]:
    """What lies in the files of all ranks; a line that a kill cut off is left out."""
    found: dict[str, Said] = {}
    for path in sorted(file.parent.glob(f"{file.stem}*{file.suffix}")):
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines[:-1]):  # the last one is empty, or was cut off
            entry = json.loads(line)
            if number == 0:
                if entry != dict(header):
                    raise DataError(
                        f"{path} holds answers of another model or to other examples: remove it or choose another --out"
                    )
                continue
            found[entry["key"]] = Said(entry["key"], tuple((str(a), float(p)) for a, p in entry["answers"]))
    return found


def _opened(path: Path, header: Mapping[str, str]) -> Any:
    """The file, to be continued; what a kill cut off at its end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_bytes() if path.exists() else b""
    kept = whole[: whole.rfind(b"\n") + 1] or (json.dumps(dict(header)) + "\n").encode()
    if kept != whole:
        path.write_bytes(kept)
    return path.open("a", encoding="utf-8")
