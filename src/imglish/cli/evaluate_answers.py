"""`imglish eval vqa`, `nlvr2`, `entailment` and `classification`: tasks that ask for an answer, by a model with a head
for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imglish.models.answering import RankRule

TASKS = {
    "vqa": "questions about pictures (VQA v2, DAQUAR): accuracy",
    "nlvr2": "statements about several pictures: accuracy, consistency",
    "entailment": "visual entailment (SNLI-VE): accuracy",
    "classification": "classes of pictures (ImageNet), by a classifier: accuracy",
}
ALONE = "classification"  # pictures without texts
DESCRIPTION = """\
{title}.

  imglish eval {name} --model runs/mine/model --data examples.jsonl --split val
  torchrun --nproc-per-node 8 -m imglish eval {name} --model ... --data ...

The model is one that `imglish finetune` has made, or a released one with this head. Prints the table; writes
predictions.jsonl (while it runs; the same command continues), {name}.json and report.html (the most confident mistakes,
the best, the worst) to --out.
"""


def add_jobs(jobs: Any) -> None:
    """The parsers of all tasks."""
    for name, what in TASKS.items():
        parser = jobs.add_parser(
            name,
            help=what,
            description=DESCRIPTION.format(name=name, title=what[:1].upper() + what[1:]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add = parser.add_argument
        add("--model", required=True, help="folder of an exported model with a head for the task")
        what = "folder with a folder for each class, or file of examples" if name == ALONE else "file of examples"
        add("--data", required=True, help=f"{what} (docs/tasks.md)")
        add("--images", help="folder of the pictures (default: images beside the file, or where the file lies)")
        add("--split", help="only examples whose field split says so")
        if name == "vqa":
            add("--annotations", help="second file of VQA v2 (default: beside the first, by its official name)")
            add("--answers", choices=("ranked", "generated"), default="ranked", help="of a model that writes answers")
            add("--shortlist", type=int, default=128, help="candidates that are scored to their end, 0: all (128)")
            add("--official", action="store_true", help="rank as the family's published code: see docs/tasks.md")
            add("--variant", default="official_2021", help="of the VQA accuracy (default: official_2021)")
        add("--held-out", type=float, metavar="SHARE", help="only what a training with this task.hold_out left out")
        add("--limit", type=int, help="only the first so many examples")
        if name != ALONE:
            add_exchange(parser)
        add("--max-errors", type=float, default=0.01, metavar="SHARE", help="of bad examples (default: 0.01)")
        add("--batch", type=int, default=64, help="examples at a time (default: 64)")
        add("--precision", choices=("float32", "bfloat16"), default="float32")
        add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
        add("--out", default="eval-out", help="folder of the results (default: eval-out)")


def add_exchange(parser: argparse.ArgumentParser) -> None:
    """The option ``--exchange-pictures``."""
    what = "a control: every text has another's pictures, shifted by this share of their number (alone: 0.5)"
    parser.add_argument("--exchange-pictures", nargs="?", type=float, const=0.5, metavar="SHARE", help=what)


def answers(arguments: argparse.Namespace) -> int:
    """Measure one task."""
    from dataclasses import replace

    from imglish.checkpoints.native import CheckpointError, load
    from imglish.data.errors import FILE, Errors
    from imglish.data.tasks.examples import TaskData, hold_out
    from imglish.evaluation.encoding import Machine
    from imglish.evaluation.exchanging import EXCHANGED, exchanged
    from imglish.evaluation.tasks import TASKS as KNOWN
    from imglish.evaluation.tasks.answering import answerer, questions
    from imglish.evaluation.tasks.report import task_report
    from imglish.evaluation.tasks.run import evaluate_task
    from imglish.models.heads import TaskModel, families
    from imglish.objectives.gather import rank
    from imglish.training.ranks import pick_device, process_group

    task = KNOWN[arguments.job]
    loaded, device, out = load(arguments.model), pick_device(arguments.device), Path(arguments.out)
    model = loaded.model
    if not isinstance(model, TaskModel):
        able = ", ".join(families("classes", task.texts))
        raise CheckpointError(
            f"{arguments.model} has no head for {task.name}: imglish finetune puts one on models of {able}"
        )
    if model.head.task != task.name:
        raise CheckpointError(f"{arguments.model} has a head for {model.head.task}, not for {task.name}")
    how: Any = getattr(arguments, "answers", "ranked")
    rule = {"variant": arguments.variant} if task.name == "vqa" else {}
    with process_group(device):
        errors = Errors(arguments.max_errors, out / FILE if rank() == 0 else None, "examples")
        annotations = getattr(arguments, "annotations", None)
        data = TaskData(
            Path(arguments.data), _path(arguments.images), _path(annotations), arguments.split, model.head.pictures
        )
        examples = task.read(data, errors)
        if arguments.held_out is not None:
            examples = hold_out(examples, arguments.held_out, True)
        examples = examples[: arguments.limit]
        exchange = getattr(arguments, "exchange_pictures", None)
        if exchange is not None:
            shown = exchanged([example.images for example in examples], exchange)
            examples = [replace(example, images=images) for example, images in zip(examples, shown, strict=True)]
        trained = loaded.meta.get("recipe", {}).get("data", {})
        words = questions(loaded.tokenizer, trained) if task.texts else None
        machine = Machine(image_block=arguments.batch, precision=arguments.precision)
        result = evaluate_task(
            model.to(device),
            words,
            task,
            examples,
            machine,
            answer=answerer(model, loaded.words, how, _rule(arguments, model.family)),
            predictions=out / "predictions.jsonl",
            how=f"{how}, {_rule(arguments, model.family)}, {arguments.precision}",
            errors=errors,
            **rule,
        )
        if exchange is not None:
            result = replace(result, notes=(EXCHANGED, *result.notes))
        first = rank() == 0
    if first:
        print(result.text())
        facts = {"model": arguments.model, "data": arguments.data, "split": arguments.split or "all"}
        facts["examples left out"] = str(len(errors))
        (out / f"{task.name}.json").write_text(result.to_json() + "\n", encoding="utf-8")
        print(f"report: {task_report(result, examples, task.title, facts).save(out / 'report.html')}")
    return 0


def _rule(arguments: argparse.Namespace, family: str) -> RankRule:
    """How candidates are ranked; ``--official``: ALBEF's code counts the first word twice, BLIP's ranks by its
    label-smoothed loss."""
    from imglish.models.answering import RankRule

    if arguments.job != "vqa":
        return RankRule()
    official = (
        {"albef": {"first_twice": True}, "blip": {"smoothing": 0.1}}.get(family, {}) if arguments.official else {}
    )
    return RankRule(arguments.shortlist, **official)  # type: ignore[arg-type]


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
