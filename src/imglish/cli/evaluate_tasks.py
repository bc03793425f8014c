"""`imglish eval compositional`, `zeroshot`, `linear-probe` and `grounding`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imglish.cli.evaluate_answers import add_exchange
from imglish.cli.source_options import add_source_options, source_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from imglish.checkpoints.native import Loaded
    from imglish.evaluation.encoding import Encodes, Machine
    from imglish.report import Report

COMPOSITIONAL = """\
Captions that differ in who has what: SugarCrepe, ARO (one picture, a true and a false caption), Winoground, COLA (two
pictures, two captions). The layout is recognised by its fields.

  imglish eval compositional --model runs/flickr8k-albef/model --data sugarcrepe --images coco/val2017

Prints the table; writes compositional.json and report.html (the most confident mistakes, the best) to --out.
"""

ZEROSHOT = """\
Classify pictures by texts: a folder of folders (their names are the classes), or a file whose caption is the class.

  imglish eval zeroshot --model runs/flickr8k-clip/model --data photos --templates en
  imglish eval zeroshot --model ... --data list.jsonl --captions label --templates zh --names classes-zh.json

Prints the tables; writes zeroshot.json and report.html to --out.
"""


PROBE = """\
Fit a linear classifier on the features of pictures: folders whose names are the classes, or any layout whose caption is
the class.

  imglish eval linear-probe --model runs/flickr8k-clip/model --data photos/train --test photos/val
  imglish eval linear-probe --model MODEL --data list.jsonl --captions label --split train --test list.jsonl \\
    --test-split val

The penalty is chosen on a fifth of the training pictures. Prints the tables; writes linear-probe.json and report.html.
"""

GROUNDING = """\
Do the heat maps of texts (docs/explain.md) lie on what the texts are about? Is the highest point inside of the right
box (pointing game), and which of the proposed boxes does the map choose (RefCOCO)?

  imglish eval grounding --model runs/flickr8k-albef/model --data references.jsonl --images coco/train2014
  imglish eval grounding --model MODEL --data boxes.jsonl --images photos --template "a photo of a {}"

Lines {"image", "text", "bbox", "proposals"}, or {"image", "objects": [{"label", "bbox_xywh"}]}, whose labels are the
texts. Prints the table; writes grounding.json and report.html to --out.
"""


def add_jobs(jobs: Any) -> None:
    """The parsers of these commands."""
    form = argparse.RawDescriptionHelpFormatter
    suite = jobs.add_parser(
        "compositional", help="SugarCrepe, ARO, Winoground, COLA", description=COMPOSITIONAL, formatter_class=form
    )
    suite.add_argument("--model", required=True, help="folder of an exported model")
    suite.add_argument("--data", required=True, help="file of items, or a folder of such files")
    suite.add_argument("--images", help="folder of the pictures (default: where the file lies)")
    add_exchange(suite)
    suite.add_argument("--least", type=int, default=1, help="items that a group needs to count in the mean (ARO: 25)")
    _add_max_errors(suite)
    _add_scoring(suite)
    _add_machine(suite)
    classes = jobs.add_parser(
        "zeroshot", help="classes as texts, written into templates", description=ZEROSHOT, formatter_class=form
    )
    classes.add_argument("--model", required=True, help="folder of an exported model")
    classes.add_argument("--data", required=True, help="folder of folders, or a file of any layout (docs/data.md)")
    add_source_options(classes)
    classes.add_argument("--limit", type=int, help="only the first so many pictures")
    classes.add_argument("--templates", default="en", help="en, zh, plain, or a file with one a line (default: en)")
    classes.add_argument("--names", metavar="FILE", help="JSON: class of the data -> what it is called in a sentence")
    classes.add_argument("--rerank", type=int, default=10, metavar="K", help="classes that the fusion scores")
    _add_scoring(classes)
    _add_machine(classes)
    probe = jobs.add_parser(
        "linear-probe", help="a linear classifier on features", description=PROBE, formatter_class=form
    )
    probe.add_argument("--model", required=True, help="folder of an exported model")
    probe.add_argument("--data", required=True, help="training pictures: folder of folders, or a file of any layout")
    probe.add_argument("--test", required=True, help="test pictures, in the same layout")
    probe.add_argument("--test-split", help="only records of this split of --test")
    add_source_options(probe)
    probe.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    _add_machine(probe)
    boxes = jobs.add_parser(
        "grounding", help="heat maps of texts against boxes", description=GROUNDING, formatter_class=form
    )
    boxes.add_argument("--model", required=True, help="folder of an exported model")
    boxes.add_argument("--data", required=True, help="file of texts with boxes, JSON or JSON lines")
    boxes.add_argument("--images", help="folder of the pictures (default: where the file lies)")
    boxes.add_argument("--template", default="{}", help="what labels are written into (default: {}, the label alone)")
    boxes.add_argument("--layer", type=int, help="of the fusion's cross-attention, from 0 (default: the middle one)")
    boxes.add_argument("--limit", type=int, help="only the first so many references")
    _add_max_errors(boxes)
    _add_machine(boxes)


def _add_max_errors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-errors", type=float, default=0.01, metavar="SHARE", help="of the items that may be bad (default: 0.01)"
    )


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--score-rule", choices=("itm", "itm_probability", "itm+itc"), help="default: as the checkpoint says")
    add("--pairs", type=int, default=512, help="pairs that pass the fusion at a time (default: 512)")
    add("--precision", choices=("float32", "bfloat16"), default="float32")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch", type=int, default=64, help="pictures that pass the tower at a time (default: 64)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--out", default="eval-out", help="folder of the results (default: eval-out)")


def compositional(arguments: argparse.Namespace) -> int:
    """``imglish eval compositional``; the exit status."""
    from dataclasses import replace

    from imglish.data.errors import FILE, Errors
    from imglish.evaluation.compositional import evaluate_compositional, read_items
    from imglish.evaluation.exchanging import EXCHANGED, exchanged
    from imglish.evaluation.retrieval import record_loader
    from imglish.evaluation.task_reports import compositional_report
    from imglish.objectives.gather import rank
    from imglish.training.ranks import process_group

    loaded, device, machine, rule = _opened(arguments)
    with process_group(device):
        file = Path(arguments.out) / FILE if rank() == 0 else None
        errors = Errors(arguments.max_errors, file, what="items")
        images = Path(arguments.images) if arguments.images else None
        items = read_items(Path(arguments.data), images, errors)
        if arguments.exchange_pictures is not None:
            shown = exchanged([item.pictures for item in items], arguments.exchange_pictures)
            items = [replace(item, pictures=pictures) for item, pictures in zip(items, shown, strict=True)]
        model = loaded.model.to(device)
        load = record_loader(model)
        result = evaluate_compositional(model, _cleaning(loaded), items, load, machine, rule, arguments.least)
        if arguments.exchange_pictures is not None:
            result = replace(result, notes=[EXCHANGED, *result.notes])
        first = rank() == 0
    if first:
        facts = {"model": arguments.model, "data": arguments.data, "items left out": len(errors)}
        _deliver(arguments, result, lambda: compositional_report(result, items, "Compositional suites", facts))
    return 0


def zeroshot(arguments: argparse.Namespace) -> int:
    """``imglish eval zeroshot``; the exit status."""
    from imglish.data.errors import FILE
    from imglish.data.sources import open_source
    from imglish.evaluation.classify import ZeroShotConfig, evaluate_zeroshot
    from imglish.evaluation.retrieval import record_loader
    from imglish.evaluation.task_reports import classes_report
    from imglish.evaluation.templates import templates_of
    from imglish.objectives.gather import rank
    from imglish.training.ranks import process_group

    templates = templates_of(arguments.templates)
    names = _names(Path(arguments.names)) if arguments.names else None
    loaded, device, machine, rule = _opened(arguments)
    config = ZeroShotConfig(templates, arguments.rerank, names, rule, machine)
    with process_group(device):
        file = Path(arguments.out) / FILE if rank() == 0 else None
        source = open_source(source_config(arguments, arguments.data), errors_file=file)
        records = source[: arguments.limit]
        model = loaded.model.to(device)
        result = evaluate_zeroshot(model, _cleaning(loaded), records, record_loader(model), config)
        first = rank() == 0
    if first:
        facts = {"model": arguments.model, "data": arguments.data, "templates": " | ".join(templates)}
        _deliver(arguments, result, lambda: classes_report(result, records, "Zero-shot classification", facts))
    return 0


def _names(path: Path) -> dict[str, str]:
    """From class to what it is called in a sentence."""
    from imglish.data.errors import DataError
    from imglish.data.tasks.examples import parsed, text_of

    held = parsed(text_of(path), path.name)
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held.values()):
        raise DataError(f'{path}: expected an object from class to its name in a sentence: {{"n02084071": "dog"}}')
    return held


def linear_probe(arguments: argparse.Namespace) -> int:
    """``imglish eval linear-probe``; the exit status."""
    from dataclasses import replace

    from imglish.checkpoints.native import load
    from imglish.data.errors import FILE
    from imglish.data.sources import open_source
    from imglish.evaluation.encoding import Machine
    from imglish.evaluation.probe import evaluate_probe
    from imglish.evaluation.retrieval import record_loader
    from imglish.evaluation.task_reports import classes_report
    from imglish.objectives.gather import rank
    from imglish.training.ranks import pick_device, process_group

    device = pick_device(arguments.device)
    loaded = load(arguments.model)
    machine = Machine(image_block=arguments.batch, precision=arguments.precision)
    with process_group(device):
        file = Path(arguments.out) / FILE if rank() == 0 else None
        train = source_config(arguments, arguments.data)
        test = replace(source_config(arguments, arguments.test), split=arguments.test_split)
        shown, asked = (open_source(source, errors_file=file)[:] for source in (train, test))
        model = loaded.model.to(device)
        result = evaluate_probe(model, shown, asked, record_loader(model), machine)
        first = rank() == 0
    if first:
        facts = {"model": arguments.model, "training data": arguments.data, "test data": arguments.test}
        tested = [asked[number] for number in result.kept]
        _deliver(arguments, result, lambda: classes_report(result, tested, "Linear probe", facts))
    return 0


def grounding(arguments: argparse.Namespace) -> int:
    """``imglish eval grounding``; the exit status."""
    from imglish.checkpoints.native import load
    from imglish.data.errors import FILE, Errors
    from imglish.evaluation.encoding import Machine
    from imglish.evaluation.referring import evaluate_grounding, read_references
    from imglish.evaluation.task_reports import grounding_report
    from imglish.objectives.gather import rank
    from imglish.training.ranks import pick_device, process_group

    device = pick_device(arguments.device)
    loaded = load(arguments.model)
    with process_group(device):
        file = Path(arguments.out) / FILE if rank() == 0 else None
        errors = Errors(arguments.max_errors, file, what="references")
        images = Path(arguments.images) if arguments.images else None
        references = read_references(Path(arguments.data), images, errors, arguments.template)[: arguments.limit]
        model, machine = loaded.model.to(device), Machine(image_block=arguments.batch)
        layer = arguments.layer
        result = evaluate_grounding(model, loaded.tokenizer, references, machine, layer, errors)
        first = rank() == 0
    if first:
        facts = {"model": arguments.model, "data": arguments.data, "items left out": len(errors)}
        _deliver(arguments, result, lambda: grounding_report(result, references, model, loaded.tokenizer, facts, layer))
    return 0


def _opened(arguments: argparse.Namespace) -> tuple[Loaded, Any, Machine, Any]:
    """The checkpoint, the device, how evaluation computes, and the rule that pairs are scored by."""
    from imglish.checkpoints.native import load
    from imglish.evaluation.encoding import Machine
    from imglish.training.ranks import pick_device

    machine = Machine(image_block=arguments.batch, pair_block=arguments.pairs, precision=arguments.precision)
    loaded = load(arguments.model)
    stored = loaded.score_rule if loaded.score_rule != "itc" else "itm"  # without a fusion the rule is not used
    return loaded, pick_device(arguments.device), machine, arguments.score_rule or stored


def _cleaning(loaded: Loaded) -> Encodes:
    """The tokenizer, behind the clean-up of captions that the model was trained with."""
    from functools import partial

    from imglish.data.text import clean_caption
    from imglish.evaluation.encoding import Cleaned

    trained = loaded.meta.get("recipe", {}).get("data", {})
    clean = partial(clean_caption, max_words=trained.get("max_words", 30), style=trained.get("clean", "none"))
    return Cleaned(loaded.tokenizer, clean)


def _deliver(arguments: argparse.Namespace, result: Any, report: Callable[[], Report]) -> None:
    """Print the table, write JSON and the page."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    print(result.text())
    (out / f"{arguments.job}.json").write_text(result.to_json() + "\n", encoding="utf-8")
    print(f"report: {report().save(out / 'report.html')}")
